"""What a job tells while it runs and at its end: a progress bar, a line of figures, metrics."""

import sys
import time
from collections import Counter
from typing import Any

from tqdm import tqdm

from handler.batch.output import Output
from handler.batch.shard import failed_name, part_name, part_summary
from handler.batch.source import Shard


class Progress:
    """A bar over photos; shards and errors stand behind it. The total is known for folders."""

    def __init__(self, shards: list[Shard], waiting: list[Shard]) -> None:
        self.shards, self.done = len(shards), len(shards) - len(waiting)
        self.rows = self.errors = 0
        self.started = time.perf_counter()
        total = sum(len(shard.photos) for shard in waiting) or None
        self.bar = tqdm(total=total, unit=" photos", file=sys.stderr, disable=None)

    def add(self, summary: dict[str, Any]) -> None:
        self.done += 1
        self.rows += summary.get("rows", 0)
        self.errors += sum(summary.get("errors", {}).values())
        self.bar.update(summary.get("rows", 0))
        self.bar.set_postfix_str(f"shards {self.done}/{self.shards}, errors {self.errors}")
        if "failed" in summary:
            self.bar.write(f"failed: {summary['failed']}", file=sys.stderr)

    def close(self) -> dict[str, Any]:
        """Figures of this start: photos, seconds since the first worker was asked for, and rate."""
        self.bar.close()
        seconds = time.perf_counter() - self.started
        return {
            "photos_now": self.rows,
            "seconds": round(seconds, 3),
            "photos_per_second": round(self.rows / seconds, 3) if seconds else 0.0,
        }


def totals(output: Output, shards: list[Shard]) -> dict[str, Any]:
    """Photos, captions, errors by type, and shards of the whole job, all starts together."""
    names = output.names()
    errors: Counter[str] = Counter()
    photos = 0
    parts = [shard for shard in shards if part_name(shard) in names]
    for shard in parts:
        summary = part_summary(output, shard)
        photos += summary["rows"]
        errors.update(summary["errors"])
    return {
        "photos": photos,
        "captioned": photos - sum(errors.values()),
        "errors": dict(sorted(errors.items())),
        "shards": len(shards),
        "shards_done": len(parts),
        "shards_failed": sum(failed_name(shard) in names for shard in shards),
    }


def line(figures: dict[str, Any]) -> str:
    errors = ", ".join(f"{kind} {count}" for kind, count in figures["errors"].items()) or "none"
    return (
        f"{figures['photos']} photos, {figures['captioned']} captioned, errors: {errors}; "
        f"shards: {figures['shards_done']} of {figures['shards']}, "
        f"{figures['shards_failed']} failed; {figures['photos_now']} photos now in "
        f"{figures['seconds']:.1f} s ({figures['photos_per_second']:.1f} a second)"
    )
