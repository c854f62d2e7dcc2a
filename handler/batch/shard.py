"""Captions one shard and writes one Parquet file, completely or not at all. This module does not
depend on Ray, and captioning a shard again gives the same rows."""

import hashlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Semaphore
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from handler.batch.output import Output
from handler.batch.source import URL, Photo, Shard, read
from handler.captioner import Captioner
from handler.errors import UserError
from handler.files import as_utf8
from handler.request import describe_error

# Photos captioned at once; tests/benchmarks/batch.py compares sizes.
BATCH = {"cpu": 32, "cuda": 64}
# Threads that read and decode photos while the model runs. A GPU is faster than two such threads,
# and threads that fetch from a network mostly wait.
DECODERS = {"cpu": 2, "cuda": 8}
FETCHERS = 16

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.string()),
        ("caption", pa.string()),
        (
            "captions",
            pa.list_(
                pa.struct(
                    [("caption", pa.string()), ("score", pa.float64()), ("log_prob", pa.float64())]
                )
            ),
        ),
        ("error", pa.struct([("type", pa.string()), ("message", pa.string())])),
    ]
)
DEVICE_FAILED = 70  # exit status
COUNTS = b"captioner"  # key of the summary in the footer of a part

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a worker needs to start: the folder of an export, options for `Captioner.options`, the
    folder or URL of the parts, the device, the number of torch threads, and whether its process
    was cut off from the network."""

    export: str
    options: dict[str, Any]
    out: str
    device: str = "cpu"
    threads: int = 1
    offline: bool = False


def part_name(shard: Shard) -> str:
    address = shard.address.encode(errors="surrogateescape")
    return f"part-{hashlib.sha256(address).hexdigest()[:24]}.parquet"


def failed_name(shard: Shard) -> str:
    return part_name(shard).replace(".parquet", ".failed.json")


def error_row(photo_id: str, kind: str, message: str) -> Row:
    error = {"type": kind, "message": as_utf8(message)}
    return {"id": photo_id, "caption": None, "captions": None, "error": error}


class Worker:
    """Captions shards, one after another, with one loaded export."""

    def __init__(self, job: Job) -> None:
        self.job, self.output = job, Output(job.out)
        self.captioner = Captioner.load(job.export, job.device, job.threads)
        self.options = self.captioner.options(**job.options)
        device = torch.device(job.device).type
        self.batch, self.decoders = BATCH[device], DECODERS[device]

    def caption(self, shard: Shard) -> dict[str, Any]:
        """Captions a shard and writes its part. Returns what `finish` returns."""
        return finish(self.output, shard, self._rows(shard))

    def caption_singly(self, shard: Shard, start: int) -> Iterator[str | Row]:
        """Captions one photo at a time from number `start` on. Yields the id of each photo before
        it is tried, then its row."""
        for photo in itertools.islice(self._photos(shard), start, None):
            yield photo.id
            yield self._caption_batch([(photo.id, self._prepare(photo))])[0]

    def _rows(self, shard: Shard) -> Iterator[Row]:
        photos = self._photos(shard)
        first = list(itertools.islice(photos, 1))
        is_remote = URL.match(shard.url) or any(photo.is_remote for photo in first)
        threads = FETCHERS if is_remote else self.decoders
        photos = itertools.chain(first, photos)
        with closing(ahead(self._prepare, photos, threads, self.batch)) as ready:
            while batch := list(itertools.islice(ready, self.batch)):
                yield from self._caption_batch(batch)

    def _photos(self, shard: Shard) -> Iterator[Photo]:
        for photo in read(shard):
            if self.job.offline and photo.is_remote:
                raise UserError(
                    f"{photo.content!r}: this job has no network, because no file of its source "
                    "begins with URLs; use --shards 0/1, which keeps the network"
                )
            yield photo

    def _prepare(self, photo: Photo) -> Tensor | Exception:
        try:
            content = photo.fetch()
            return content if isinstance(content, Exception) else self.captioner.preprocess(content)
        except Exception as error:  # becomes a row; the job goes on
            return error

    def _caption_batch(self, batch: list[tuple[str, Tensor | Exception]]) -> list[Row]:
        good = [image for _, image in batch if isinstance(image, Tensor)]
        captions = iter(self._captions(good))
        rows = []
        for photo_id, image in batch:
            answer = next(captions) if isinstance(image, Tensor) else image
            if isinstance(answer, Exception):
                body = describe_error(answer)
                rows.append(error_row(photo_id, body["type"], body["message"]))
            else:
                rows.append(
                    {"id": photo_id, "caption": answer[0]["caption"], "captions": answer}
                    | {"error": None}
                )
        return rows

    def _captions(self, images: list[Tensor]) -> list[list[Row] | Exception]:
        if not images:
            return []
        try:
            captions = self.captioner.caption_tensors(
                torch.stack(images), [self.options] * len(images)
            )
        except torch.AcceleratorError as error:
            # Every later call would fail as well. A new process can use the device again.
            print(f"the device failed: {error}", file=sys.stderr, flush=True)
            os._exit(DEVICE_FAILED)
        except Exception as error:
            # A batch that fails is captioned photo by photo: one photo must not affect the others.
            if len(images) == 1:
                return [error]
            return [answer for image in images for answer in self._captions([image])]
        return [
            [{"caption": c.text, "score": c.score, "log_prob": c.log_prob} for c in photo]
            for photo in captions
        ]


def ahead(
    prepare: Callable[[Photo], Any], photos: Iterable[Photo], threads: int, depth: int
) -> Generator[tuple[str, Any]]:
    """Yields (id, prepared photo) in order. While the caller processes one, another thread reads
    and `threads` threads prepare up to `depth` photos ahead. Raises what `photos` raises."""
    slots = Semaphore(depth)
    ready: SimpleQueue[tuple[str, Future[Any]] | None] = SimpleQueue()
    is_closed = False

    def read_ahead() -> None:
        try:
            for photo in photos:
                slots.acquire()
                if is_closed:
                    return
                ready.put((photo.id, workers.submit(prepare, photo)))
        finally:
            ready.put(None)

    with ThreadPoolExecutor(threads) as workers, ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read_ahead)
        try:
            while item := ready.get():
                slots.release()
                yield item[0], item[1].result()
            reading.result()
        finally:
            is_closed = True
            slots.release()


def finish(output: Output, shard: Shard, rows: Iterable[Row]) -> dict[str, Any]:
    """Writes the part of a shard when all its rows are complete, or `.failed.json` if the shard
    cannot be read. Returns {rows, errors: {type: count}, seconds}, or {failed: message, seconds}.
    """
    started = time.perf_counter()
    try:
        done = [{**row, "shard": as_utf8(shard.address)} for row in rows]
    except (UserError, OSError, ValueError) as error:
        return give_up(output, shard, str(error)) | {"seconds": time.perf_counter() - started}
    counts: dict[str, int] = {}
    for row in done:
        if row["error"]:
            counts[row["error"]["type"]] = counts.get(row["error"]["type"], 0) + 1
    summary = {"rows": len(done), "errors": counts}
    table = pa.Table.from_pylist(done, SCHEMA.with_metadata({COUNTS: json.dumps(summary)}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    output.write(part_name(shard), buffer.getvalue())
    output.remove(failed_name(shard))
    return summary | {"seconds": time.perf_counter() - started}


def give_up(output: Output, shard: Shard, reason: str) -> dict[str, Any]:
    """Writes the `.failed.json` of a shard that cannot be read. Returns {failed: message}."""
    message = f"{shard.address}: {' '.join(reason.split())}"
    failure = {"shard": shard.address, "error": {"type": "ShardError", "message": message}}
    output.write(failed_name(shard), json.dumps(failure).encode())
    return {"failed": message}


def part_summary(output: Output, shard: Shard) -> dict[str, Any]:
    """Reads {rows, errors} from the footer of an existing part. Raises UserError if another program
    has changed it."""
    name = part_name(shard)
    with output.open(name) as file:
        try:
            return json.loads(pq.read_metadata(file).metadata[COUNTS])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{output.url}/{name}: damaged, or written by another program; move it elsewhere "
                "and start again"
            ) from error
