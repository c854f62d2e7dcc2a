"""`python -m tests.benchmarks.batch --source DIR --export DIR`: handler.batch over a folder, tars
and Parquet beside the best in-process rate on the same cores, one worker beside two, the memory of
all processes together, and whether each photo is one row with the caption of `Captioner.caption`.

The in-process rate is that of `Captioner.caption_tensors` in batches of 8, 32 and 64, photos read
and decoded beside it, in one process with a thread a core or in one process a core. Start-up counts
for neither. The best of these rates is measured again before and after every job, which is compared
with the mean of the two: a shared machine is not equally fast all the time. Medians of the rounds.
`--photos 10000 --rounds 1` is the whole proof; the in-process rates and one worker beside two take
a part of the photos.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from handler.batch.shard import DECODERS, ahead
from handler.batch.source import Photo
from handler.captioner import Captioner
from tests.benchmarks.timing import machine, report, table
from tests.photos import encoded, smooth

CORES = len(os.sched_getaffinity(0))
BATCHES = (8, 32, 64)
SHARD = 250  # photos of a tar and of a row group
# Photos that are enough for the in-process rates, and for one worker beside two.
BASELINE, PAIR = 1024, 1024
# To read the memory of processes of a gigabyte each second takes 3 % of two cores.
SAMPLE_SECONDS = 10
BROKEN_EVERY, DRAWN_EVERY = 100, 10  # one photo in a hundred is broken, one in ten is drawn


def write_photos(source: Path, count: int, folder: Path) -> list[Path]:
    """`count` photos: those of `source` again and again, drawn and broken ones between them."""
    real = sorted(path for path in source.iterdir() if path.suffix == ".jpg")
    drawn = [encoded(smooth(320, 240, seed), "JPEG") for seed in range(50)]
    folder.mkdir()
    for number in range(count):
        if number % BROKEN_EVERY == BROKEN_EVERY // 2:
            content = real[number % len(real)].read_bytes()[:200]
        elif number % DRAWN_EVERY == 0:
            content = drawn[number // DRAWN_EVERY % len(drawn)]
        else:
            content = real[number % len(real)].read_bytes()
        (folder / f"{number:06}.jpg").write_bytes(content)
    return sorted(folder.iterdir())


def write_tars(photos: list[Path], folder: Path) -> str:
    folder.mkdir()
    for start in range(0, len(photos), SHARD):
        with tarfile.open(folder / f"{start // SHARD:05}.tar", "w") as tar:
            for path in photos[start : start + SHARD]:
                tar.add(path, path.name)
    return str(folder)


def write_parquet(photos: list[Path], file: Path) -> str:
    schema = pa.schema([("id", pa.string()), ("image", pa.binary())])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(photos), SHARD):
            rows = [
                {"id": path.name, "image": path.read_bytes()}
                for path in photos[start : start + SHARD]
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return str(file)


def in_process(
    export: str, beams: int, photos: list[str], threads: int, batch: int, connection: Any
) -> None:
    """One process of the baseline: loads, says so, and captions when it is told to."""
    captioner = Captioner.load(export, threads=threads)
    options = captioner.options(num_beams=beams)

    def prepare(photo: Photo) -> torch.Tensor | None:
        try:
            return captioner.preprocess(Path(photo.id).read_bytes())
        except ValueError:
            return None

    def caption(paths: list[str]) -> None:
        ready = ahead(prepare, (Photo(path, b"") for path in paths), DECODERS["cpu"], batch)
        while part := list(islice(ready, batch)):
            images = [image for _, image in part if image is not None]
            captioner.caption_tensors(torch.stack(images), [options] * len(images))

    caption(photos[:batch])
    connection.send("loaded")
    connection.recv()
    caption(photos)
    connection.send("done")


def baseline(export: str, beams: int, photos: list[str], processes: int, batch: int) -> float:
    """Photos a second of `processes` that share the photos, one core each or one with all."""
    spawn = multiprocessing.get_context("spawn")
    connections, workers = [], []
    for index in range(processes):
        ours, theirs = spawn.Pipe()
        given = (export, beams, photos[index::processes], CORES // processes, batch, theirs)
        workers.append(spawn.Process(target=in_process, args=given))
        workers[-1].start()
        connections.append(ours)
    for connection in connections:
        connection.recv()
    started = time.perf_counter()
    for connection in connections:
        connection.send("go")
    for connection in connections:
        connection.recv()
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return len(photos) / seconds


def megabytes(process: psutil.Process) -> float:
    """Memory of a process and all below it; what they share counts once."""
    total = 0
    with suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                total += one.memory_full_info().pss
    return total / 1e6


def run_batch(source: str, out: Path, *given: str) -> dict[str, Any]:
    """The job's figures, and `megabytes`: every sample since its first part was there."""
    figures, samples = out.with_suffix(".json"), []
    command = ["-m", "handler.batch", "--source", source, "--out", str(out), *given]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *command, "--metrics", str(figures)],
        stdout=subprocess.DEVNULL,
    )
    known = psutil.Process(process.pid)

    def watch() -> None:
        while process.poll() is None:
            if list(out.glob("part-*")):
                samples.append(megabytes(known))
            time.sleep(SAMPLE_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    watcher.join()
    if status not in (0, 1):
        raise SystemExit(f"handler.batch ended with status {status}")
    return json.loads(figures.read_text()) | {"megabytes": samples[:-1] or [0.0]}


def rows_of(out: Path) -> Iterator[dict[str, Any]]:
    for part in sorted(out.glob("part-*.parquet")):
        yield from pq.read_table(part, columns=["id", "caption", "error"]).to_pylist()


def expected(export: str, beams: int, photos: list[Path]) -> dict[str, str | None]:
    """Captions of `Captioner.caption`; None for a photo that it refuses."""
    captioner = Captioner.load(export, threads=CORES)
    contents = list(dict.fromkeys(path.read_bytes() for path in photos))
    captions: dict[bytes, str | None] = dict.fromkeys(contents)

    def is_good(content: bytes) -> bool:
        with suppress(ValueError):
            captioner.preprocess(content)
            return True
        return False

    good = filter(is_good, contents)
    while batch := list(islice(good, max(BATCHES))):
        answers = captioner.caption(batch, num_beams=beams)
        captions |= {
            content: answer[0].text for content, answer in zip(batch, answers, strict=True)
        }
    return {path.name: captions[path.read_bytes()] for path in photos}


def check(out: Path, captions: dict[str, str | None]) -> str:
    counts: Counter[str] = Counter()
    other = broken = 0
    for row in rows_of(out):
        counts[row["id"]] += 1
        other += row["caption"] != captions[row["id"]]
        broken += row["error"] is not None
    is_exact = counts.keys() == captions.keys() and set(counts.values()) == {1}
    return (
        f"{len(counts)} ids, {'one row each' if is_exact else 'NOT one row each'}; "
        f"{broken} errors; {other} captions differ"
    )


def flatness(samples: list[float]) -> str:
    """Peak, and the means of the first and of the last third of the time."""
    third = max(1, len(samples) // 3)
    return f"{max(samples):.0f} ({mean(samples[:third]):.0f}, {mean(samples[-third:]):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="a folder of .jpg photos")
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=1024)
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for photos and captions (default: /tmp)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.out) as work:
        measure(arguments, Path(work))


def measure(arguments: argparse.Namespace, work: Path) -> None:
    export, beams = str(arguments.export.absolute()), arguments.num_beams
    photos = write_photos(arguments.source, arguments.photos, work / "folder")
    layouts = {
        "folder": str(work / "folder"),
        "tars": write_tars(photos, work / "tars"),
        "Parquet": write_parquet(photos, work / "photos.parquet"),
    }
    captions = expected(export, beams, photos)
    paths = [str(path) for path in photos[:BASELINE]]
    few = write_tars(photos[:PAIR], work / "few")
    given = ("--export", export, "--num-beams", str(beams), "--threads", "1")
    settings = [(count, batch) for count in dict.fromkeys((1, CORES)) for batch in BATCHES]
    half = paths[: BASELINE // 2]  # to choose the best
    alone = {setting: baseline(export, beams, half, *setting) for setting in settings}
    best = max(alone, key=alone.__getitem__)
    beside = [baseline(export, beams, paths, *best)]
    runs: dict[str, list[Any]] = {name: [] for name in layouts}
    pairs: list[float] = []
    for number in range(arguments.rounds):
        for name, where in layouts.items():
            out = work / f"out-{name}-{number}"
            figures = run_batch(where, out, *given, "--workers", str(CORES))
            beside.append(baseline(export, beams, paths, *best))
            share = figures["photos_per_second"] / mean(beside[-2:])
            runs[name].append(figures | {"checked": check(out, captions), "share": share})
        one_and_all = [
            run_batch(few, work / f"few-{number}-{place}", *given, "--workers", str(workers))
            for place, workers in enumerate((CORES, 1, CORES))
        ]
        before, one, after = (figures["photos_per_second"] for figures in one_and_all)
        pairs.append((before + after) / 2 / one)
    report(
        "batch",
        text_of(arguments, alone, beside, runs, pairs),
        {"alone": list(alone.values())} | {"beside": beside, "runs": runs, "scaling": pairs},
    )


def text_of(
    arguments: argparse.Namespace,
    alone: dict[tuple[int, int], float],
    beside: list[float],
    runs: dict[str, list[Any]],
    pairs: list[float],
) -> str:
    speeds = [
        [f"{count} x {CORES // count}", str(batch), f"{rate:.1f}"]
        for (count, batch), rate in alone.items()
    ]
    jobs = [
        [
            name,
            f"{median(run['photos_per_second'] for run in each):.1f}",
            f"{median(run['share'] for run in each):.1%}",
            each[-1]["checked"],
            flatness(each[-1]["megabytes"]),
        ]
        for name, each in runs.items()
    ]
    again = ", ".join(f"{rate:.1f}" for rate in beside)
    return "\n\n".join(
        [
            f"{machine()}; {arguments.photos} photos, {arguments.num_beams} beams, "
            f"{arguments.rounds} rounds",
            table(["processes x threads in process", "batch", "photos a second"], speeds),
            f"The best of these again, before, between and after the jobs: {again} photos a second",
            table(
                ["job", "photos a second", "of the best in process", "rows"]
                + ["MB at most (first, last third)"],
                jobs,
            ),
            f"{CORES} workers of one thread / 1: {median(pairs):.2f}",
        ]
    )


if __name__ == "__main__":
    main()
