"""What a job reports: a progress bar while it runs; a line of figures and metrics at its end."""

import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from handler.batch.output import Output
from handler.batch.shard import failed_name, part_name, part_summary
from handler.batch.source import Shard

READERS = 16  # threads that read the footers of parts, since an object store answers slowly


class Progress:
    """A progress bar over shards: their number, and so the time left, is known for every source. It
    also shows photos, photos per second and errors."""

    def __init__(self, shards: list[Shard], waiting: list[Shard]) -> None:
        self.rows = self.errors = 0
        self.start_seconds: float | None = None
        self.summaries: dict[Shard, dict[str, Any]] = {}
        self.started = time.perf_counter()
        self.bar = tqdm(
            total=len(shards),
            initial=len(shards) - len(waiting),
            unit=" shards",
            file=sys.stderr,
            disable=None,
        )

    def add(self, shard: Shard, summary: dict[str, Any]) -> None:
        if self.start_seconds is None:
            self.start_seconds = self._seconds() - summary["seconds"]
        if "failed" in summary:
            self.bar.write(f"failed: {summary['failed']}", file=sys.stderr)
        else:
            self.summaries[shard] = summary
            self.rows += summary["rows"]
            self.errors += sum(summary["errors"].values())
        self.bar.set_postfix_str(
            f"{self.rows} photos, {self._rate():.1f} photos/s, {self.errors} errors", refresh=False
        )
        self.bar.update()

    def close(self) -> dict[str, Any]:
        """The figures of this start: photos, seconds, seconds before the first shard began, and
        photos per second after that."""
        self.bar.close()
        return {
            "photos_now": self.rows,
            "seconds": round(self._seconds(), 3),
            "start_seconds": round(self.start_seconds or 0.0, 3),
            "photos_per_second": round(self._rate(), 3),
        }

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    def _rate(self) -> float:
        seconds = self._seconds() - (self.start_seconds or 0.0)
        return self.rows / seconds if seconds else 0.0


def totals(
    output: Output, shards: list[Shard], known: dict[Shard, dict[str, Any]]
) -> dict[str, Any]:
    """Counts photos, captions, errors by type and shards of the whole job, over all its starts.
    `known` holds the summaries of parts that need not be read again."""
    names = output.names()
    errors: Counter[str] = Counter()
    photos = 0
    parts = [shard for shard in shards if part_name(shard) in names]
    with ThreadPoolExecutor(READERS) as readers:
        for summary in readers.map(
            lambda shard: known.get(shard) or part_summary(output, shard), parts
        ):
            photos += summary["rows"]
            errors.update(summary["errors"])
    return {
        "photos": photos,
        "captioned": photos - sum(errors.values()),
        "errors": dict(sorted(errors.items())),
        "shards": len(shards),
        "shards_done": len(parts),
        "shards_failed": sum(
            failed_name(shard) in names and part_name(shard) not in names for shard in shards
        ),
    }


def line(figures: dict[str, Any]) -> str:
    errors = ", ".join(f"{kind} {count}" for kind, count in figures["errors"].items()) or "none"
    return (
        f"{figures['photos']} photos, {figures['captioned']} captioned, errors: {errors}; "
        f"shards: {figures['shards_done']} of {figures['shards']}, "
        f"{figures['shards_failed']} failed; {figures['photos_now']} photos now in "
        f"{figures['seconds']:.1f} s ({figures['photos_per_second']:.1f} a second)"
    )
