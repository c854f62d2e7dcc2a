"""What the server costs and gives: end to end against in process, on the same photographs.

    python -m tests.benchmarks.serving --export build/export/NAME --photos DIR

One client: both ways take turns, photo by photo, so that what else the machine does falls on both.
Eight clients against batches of eight in process: rounds take turns. Every photo with the default
options, as a raw body. The server is one of its own, on free ports, with `model-config.yaml` as it
is but for --threads and --delay. Its caption is compared with the library's, of every photo.
"""

import argparse
import http.client
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from export.archive import build_archive
from handler import serve
from handler.captioner import Captioner
from tests.live import change_settings, client_of, configure, key

CLIENTS, BATCH, PHOTOS, ROUNDS = 8, 8, 64, 3


class Connection:
    """One client's connection, kept open."""

    def __init__(self, server: serve.Server, folder: Path) -> None:
        self.http = http.client.HTTPConnection(urlsplit(server.inference).netloc, timeout=120)
        token = key(client_of(server, folder))
        self.headers = {"Authorization": f"Bearer {token}", "Content-Type": "image/jpeg"}

    def caption(self, photo: bytes) -> str:
        self.http.request("POST", "/predictions/captioner", photo, self.headers)
        body = json.loads(self.http.getresponse().read())
        return str(body["caption"])


def one_client(
    captioner: Captioner, connection: Connection, photos: Sequence[bytes], seconds: float
) -> dict[str, float]:
    """Median milliseconds a photo, in process and through the server."""
    taken: dict[str, list[float]] = {"in process": [], "server": []}
    ways = {
        "in process": lambda photo: captioner.caption([photo])[0][0].text,
        "server": connection.caption,
    }
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        photo = photos[number % len(photos)]
        said = set()
        for name, caption in ways.items():
            start = time.perf_counter()
            said.add(caption(photo))
            taken[name].append(1000 * (time.perf_counter() - start))
        assert len(said) == 1, said
        number += 1
    return {name: statistics.median(values) for name, values in taken.items()}


def batches(captioner: Captioner, photos: Sequence[bytes], seconds: float) -> float:
    """Photos a second of batches in process."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        captioner.caption([photos[(done + i) % len(photos)] for i in range(BATCH)])
        done += BATCH
    return done / (time.perf_counter() - start)


def many_clients(
    server: serve.Server, folder: Path, photos: Sequence[bytes], seconds: float
) -> tuple[float, list[float]]:
    """Photos a second of CLIENTS that each wait for their answer, and all their milliseconds."""
    taken: list[float] = []

    def ask(number: int) -> None:
        connection = Connection(server, folder)
        while time.perf_counter() < start + seconds:
            asked = time.perf_counter()
            connection.caption(photos[number % len(photos)])
            taken.append(1000 * (time.perf_counter() - asked))
            number += CLIENTS

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(taken) / (time.perf_counter() - start), taken


def measure(
    server: serve.Server,
    folder: Path,
    captioner: Captioner,
    photos: Sequence[bytes],
    seconds: float,
) -> dict[str, float]:
    many_clients(server, folder, photos, seconds / 3)  # the first requests are slower
    batches(captioner, photos, seconds / 3)
    medians = one_client(captioner, Connection(server, folder), photos, seconds)
    inside, outside, taken = [], [], []
    for _ in range(ROUNDS):
        inside.append(batches(captioner, photos, seconds / ROUNDS))
        rate, part = many_clients(server, folder, photos, seconds / ROUNDS)
        outside.append(rate)
        taken += part
    return {
        "1 client, in process, p50 ms": medians["in process"],
        "1 client, server, p50 ms": medians["server"],
        "overhead, p50 ms": medians["server"] - medians["in process"],
        "batches of 8, in process, photos/s": statistics.median(inside),
        "8 clients, server, photos/s": statistics.median(outside),
        "server / in process": statistics.median(outside) / statistics.median(inside),
        "8 clients, server, p50 ms": statistics.median(taken),
        "8 clients, server, p95 ms": statistics.quantiles(taken, n=20)[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", type=Path, default=Path("build/export/scenes"))
    parser.add_argument("--photos", type=Path, default=Path("build/data/scenes/images"))
    parser.add_argument("--threads", type=int, default=2, help="of torch, here and in the worker")
    parser.add_argument("--delay", type=int, default=2, help="maxBatchDelay in milliseconds")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement")
    arguments = parser.parse_args()
    photos = [path.read_bytes() for path in sorted(arguments.photos.iterdir())[:PHOTOS]]
    captioner = Captioner.load(arguments.export, threads=arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        archive = build_archive(arguments.export, folder / "model_store/captioner.mar", "1.0")
        handler = {"threads": arguments.threads, "decoding": {}}
        change_settings(archive, maxBatchDelay=arguments.delay, handler=handler)
        try:
            server = serve.start(configure(folder), home=folder)
            figures = measure(server, folder, captioner, photos, arguments.seconds)
        finally:
            serve.stop(folder)
    print(f"{arguments.export}, {os.cpu_count()} cores, {arguments.threads} threads, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} at the end\n\n| what | figure |\n| --- | --- |")
    for name, figure in figures.items():
        print(f"| {name} | {figure:.3g} |")


if __name__ == "__main__":
    main()
