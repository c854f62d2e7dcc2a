"""How long `make serve` takes to the first caption, and what a second worker costs in memory.

    python -m tests.benchmarks.start --export build/export/NAME --photo FILE [--rounds 3]

A server of its own, on free ports, with `handler/model-config.yaml` as it is but for the number of
workers. Its parts are those of a worker, measured in a process that does what the worker does:
importing the handler, loading the export, and the first caption. The rest is TorchServe itself.

The memory of a worker is what it has for itself (unique set size) and what it shares with others,
after some captions.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil

from tests.benchmarks.serving import Connection, archived, shipped, start
from tests.benchmarks.timing import machine, report, table
from tests.live import worker_processes

PARTS = ("importing the handler", "loading the export", "first caption")
# What a worker does until its first answer; prints the milliseconds of each of PARTS.
ALONE = """
import sys, time
started = time.perf_counter()
from pathlib import Path
from handler import caption_handler
from handler.captioner import Captioner
imported = time.perf_counter()
captioner = Captioner.load(sys.argv[1], threads=int(sys.argv[3]))
loaded = time.perf_counter()
captioner.caption([Path(sys.argv[2]).read_bytes()])
print(*(1000 * t for t in (imported - started, loaded - imported, time.perf_counter() - loaded)))
"""


def parts_alone(export: Path, photo: Path) -> list[float]:
    """Milliseconds of PARTS in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-c", ALONE, export, photo, shipped().threads]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return [float(value) for value in done.stdout.split()]


def start_server(export: Path, photo: bytes, workers: int) -> tuple[list[float], list[list[float]]]:
    """Milliseconds until the server says that it is ready and until the first caption after that;
    the private and the shared megabytes of each worker."""
    setting = replace(shipped(), workers=workers)
    with archived(export, setting) as folder:
        started = time.perf_counter()
        server = start(folder)
        ready = time.perf_counter()
        connection = Connection(server, folder)
        connection.ask(photo)
        times = [1000 * (ready - started), 1000 * (time.perf_counter() - ready)]
        for _ in range(8 * workers):  # so that every worker has had some
            connection.ask(photo)
        memory = []
        for process in worker_processes(server):
            status = process.memory_full_info()
            memory.append([status.uss / 2**20, (status.rss - status.uss) / 2**20])
    return times, sorted(memory, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    photo = arguments.photo.read_bytes()
    alone, served, memory = [], [], {}
    parts_alone(arguments.export, arguments.photo)  # reads the files from the disk, and compiles
    for _ in range(arguments.rounds):
        alone.append(parts_alone(arguments.export, arguments.photo))
        for workers in (1, 2):
            times, memory[workers] = start_server(arguments.export, photo, workers)
            if workers == 1:
                served.append(times)
    parts = [statistics.median(values) for values in zip(*alone, strict=True)]
    ready, first = (statistics.median(values) for values in zip(*served, strict=True))
    rows = [[name, f"{value:.0f} ms"] for name, value in zip(PARTS, parts, strict=True)]
    rows += [
        ["TorchServe with one worker, until it is ready", f"{ready:.0f} ms"],
        ["first caption of the server", f"{first:.0f} ms"],
    ]
    text = table(("part", "median"), rows) + "\n\n"
    rows = [
        [f"{workers}", f"{number}", f"{private:.0f} MB", f"{shared:.0f} MB"]
        for workers, found in memory.items()
        for number, (private, shared) in enumerate(found, start=1)
    ]
    text += table(("workers", "worker", "private", "shared"), rows)
    title = f"{arguments.export}; {machine()}; {psutil.virtual_memory().available >> 20} MB free"
    report("start", f"{title}\n\n{text}", {"parts": parts, "server": [ready, first], **memory})


if __name__ == "__main__":
    main()
