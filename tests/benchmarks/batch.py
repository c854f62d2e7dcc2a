"""`python -m tests.benchmarks.batch --source DIR --export DIR`: photos a second of handler.batch's
worker beside `Captioner.caption` in process, over batch sizes, photos decoded beside the model in
both; one thread each. Medians of interleaved rounds. No Ray."""

import argparse
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from handler.batch import shard
from handler.batch.shard import DECODERS, Job, Worker
from handler.batch.source import Photo, cut, find, read
from tests.benchmarks.timing import machine, medians, report, table


def in_process(worker: Worker, photos: list[Photo], batch: int) -> None:
    """The baseline: every photo decoded in threads, then captioned in batches."""
    with ThreadPoolExecutor(DECODERS) as decoders:
        images = decoders.map(worker.captioner.preprocess, [photo.content for photo in photos])
        waiting = []
        for image in images:
            waiting.append(image)
            if len(waiting) == batch:
                worker._captions(waiting)
                waiting = []
        worker._captions(waiting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=256)
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    _, root, names = find(arguments.source)
    [one, *_] = cut(root, names[: arguments.photos])
    photos = list(read(one))
    with tempfile.TemporaryDirectory() as out:
        worker = Worker(Job(str(arguments.export), {"num_beams": arguments.num_beams}, out))

        def ours() -> None:
            worker.caption(one)

        def theirs(batch: int) -> Callable[[], None]:
            return lambda: in_process(worker, photos, batch)

        contenders = {"shard": ours} | {f"in process, {n}": theirs(n) for n in (8, 16, 32, 64)}
        seconds = medians(contenders, arguments.rounds)
    rates = {name: len(photos) / value for name, value in seconds.items()}
    text = table(["", "photos a second"], [[name, f"{rate:.1f}"] for name, rate in rates.items()])
    report("batch", f"{machine()}; batches of {shard.BATCH['cpu']}\n\n{text}", rates)


if __name__ == "__main__":
    main()
