"""What the server costs and gives: end to end against in process, on the same photographs.

    python -m tests.benchmarks.serving --export build/export/NAME --photos DIR [--sweep]

One client: some photos in process, then the same ones with a pause before each, which a processor
comes out of slower, as a server's does between two requests, then through the server, turn about,
so that what else the machine does falls on all of them. Eight clients against batches of eight in
process: rounds take turns. In process torch has as many threads as the server's workers have
together. Every photo goes with the default options, as a raw body; the server's captions are
compared with the library's. The server is one of its own, on free ports, with
`handler/model-config.yaml` as it is but for what the options say.

`--sweep` then starts a server for each of several settings and shows what each gives: the table to
set `handler/model-config.yaml` by. Give it a machine with nothing else running.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import yaml

from export.archive import build_archive
from handler.captioner import Captioner
from handler.serve import server as serve
from tests.benchmarks.timing import machine, report, table
from tests.live import REPOSITORY, change_settings, client_of, configure, key, metrics_of

CLIENTS, BATCH, PHOTOS, ROUNDS, TURN = 8, 8, 64, 3, 8
# After its last parallel loop, OpenMP keeps a core busy for some milliseconds: not the server's.
SPIN_SECONDS = 0.1
# As long as a server's worker has nothing to do between two requests of one client.
PAUSE_SECONDS = 0.004


@dataclass(frozen=True)
class Setting:
    """Workers, torch's threads in each, photos a batch, and milliseconds that a lone request waits
    for company."""

    workers: int
    threads: int
    batch: int
    delay: int

    def changes(self) -> dict[str, Any]:
        """As `model-config.yaml` says it."""
        return {
            "minWorkers": self.workers,
            "maxWorkers": self.workers,
            "batchSize": self.batch,
            "maxBatchDelay": self.delay,
            "handler": {"threads": self.threads, "decoding": {}},
        }


def shipped() -> Setting:
    """What the archive says."""
    path = REPOSITORY / "handler/model-config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Setting(
        workers=config["minWorkers"],
        threads=config["handler"]["threads"],
        batch=config["batchSize"],
        delay=config["maxBatchDelay"],
    )


def sweep(base: Setting) -> list[Setting]:
    """`base` and what differs from it in one respect: the cores' division into workers and threads,
    the delay, the batch; and the one worker with the delay that gathers all clients."""
    cores = base.workers * base.threads
    settings = [base, *(replace(base, delay=delay) for delay in (2, 5, 10))]
    settings += [replace(base, batch=batch) for batch in (1, 4)]
    for delay in (base.delay, 5):
        settings += [replace(base, workers=1, threads=n, delay=delay) for n in (1, cores)]
    return list(dict.fromkeys(settings))


@contextlib.contextmanager
def archived(export: Path, setting: Setting) -> Iterator[Path]:
    """The folder of a server of this setting, which is ended with it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        archive = build_archive(export, folder / "model_store/captioner.mar", "1.0")
        change_settings(archive, **setting.changes())
        configure(folder)
        try:
            yield folder
        finally:
            serve.stop(folder)


def start(folder: Path) -> serve.Server:
    return serve.start(folder / "config.properties", home=folder)


@contextlib.contextmanager
def serving(export: Path, setting: Setting) -> Iterator[tuple[serve.Server, Path]]:
    """A server of this setting and its folder."""
    with archived(export, setting) as folder:
        yield start(folder), folder


class Connection:
    """One client's connection, kept open. It does as little as it can, since the clients work on
    the server's cores: an eighth of what Python's http.client does for a request."""

    def __init__(self, server: serve.Server, folder: Path) -> None:
        address = urlsplit(server.inference)
        self.socket = socket.create_connection((address.hostname, address.port), timeout=120)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        token = key(client_of(server, folder))
        self.head = (
            f"POST /predictions/captioner HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Authorization: Bearer {token}\r\nContent-Type: image/jpeg\r\nContent-Length: "
        ).encode()

    def ask(self, photo: bytes) -> bytes:
        """The body of the answer."""
        self.socket.sendall(self.head + b"%d\r\n\r\n" % len(photo) + photo)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self.receive()
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += self.receive()
        return body

    def receive(self) -> bytes:
        part = self.socket.recv(65536)
        assert part, "the server has closed the connection"
        return part


def one_client(
    captioner: Captioner, connection: Connection, photos: Sequence[bytes], seconds: float
) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of each photo: in process, one right after the other and each after a pause, and
    through the server."""
    inside: list[float] = []
    paused: list[float] = []
    outside: list[float] = []
    end = time.monotonic() + seconds
    first = 0
    while time.monotonic() < end:
        turn = [photos[(first + i) % len(photos)] for i in range(TURN)]
        texts, bodies = [], []
        for taken, pause in ((inside, 0.0), (paused, PAUSE_SECONDS)):
            for photo in turn:
                time.sleep(pause)
                start = time.perf_counter()
                texts.append(captioner.caption([photo])[0][0].text)
                taken.append(1000 * (time.perf_counter() - start))
            time.sleep(SPIN_SECONDS)
        for photo in turn:
            start = time.perf_counter()
            bodies.append(connection.ask(photo))
            outside.append(1000 * (time.perf_counter() - start))
        assert [json.loads(body)["caption"] for body in bodies] * 2 == texts
        first += TURN
    return inside, paused, outside


def batches(captioner: Captioner, photos: Sequence[bytes], seconds: float) -> float:
    """Photos a second of batches in process."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        captioner.caption([photos[(done + i) % len(photos)] for i in range(BATCH)])
        done += BATCH
    rate = done / (time.perf_counter() - start)
    time.sleep(SPIN_SECONDS)
    return rate


def many_clients(
    server: serve.Server, folder: Path, photos: Sequence[bytes], seconds: float, clients: int
) -> tuple[float, list[float]]:
    """Photos a second of clients that each wait for their answer, and all their milliseconds."""
    taken: list[float] = []

    def ask(number: int) -> None:
        connection = Connection(server, folder)
        while time.perf_counter() < start + seconds:
            asked = time.perf_counter()
            connection.ask(photos[number % len(photos)])
            taken.append(1000 * (time.perf_counter() - asked))
            number += clients

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(taken) / (time.perf_counter() - start), taken


def against_in_process(
    export: Path, setting: Setting, photos: Sequence[bytes], seconds: float
) -> dict[str, float]:
    captioner = Captioner.load(export, threads=setting.workers * setting.threads)
    with serving(export, setting) as (server, folder):
        many_clients(server, folder, photos, seconds, CLIENTS)  # the first ones are slower
        batches(captioner, photos, seconds / 3)
        connection = Connection(server, folder)
        alone, paused, served = one_client(captioner, connection, photos, seconds)
        inside, outside, taken = [], [], []
        for _ in range(ROUNDS):
            inside.append(batches(captioner, photos, seconds / ROUNDS))
            rate, part = many_clients(server, folder, photos, seconds / ROUNDS, CLIENTS)
            outside.append(rate)
            taken += part
    return {
        "1 client, in process, p50 ms": statistics.median(alone),
        "1 client, in process after a pause, p50 ms": statistics.median(paused),
        "1 client, server, p50 ms": statistics.median(served),
        "overhead, p50 ms": statistics.median(served) - statistics.median(alone),
        "overhead over the pause's, p50 ms": statistics.median(served) - statistics.median(paused),
        "batches of 8, in process, photos/s": statistics.median(inside),
        "8 clients, server, photos/s": statistics.median(outside),
        "server / in process": statistics.median(outside) / statistics.median(inside),
        "8 clients, server, p50 ms": statistics.median(taken),
        "8 clients, server, p95 ms": statistics.quantiles(taken, n=20)[-1],
    }


def of_setting(
    export: Path, setting: Setting, photos: Sequence[bytes], seconds: float
) -> dict[str, float]:
    """What one setting gives to 1 client and to 8."""
    with serving(export, setting) as (server, folder):
        many_clients(server, folder, photos, seconds, CLIENTS)
        _, lone = many_clients(server, folder, photos, seconds, 1)
        before = metrics_of(server)
        rate, taken = many_clients(server, folder, photos, seconds, CLIENTS)
        after = metrics_of(server)
    sizes, count = (
        after[f"captioner_batch_size_{of}"] - before[f"captioner_batch_size_{of}"]
        for of in ("sum", "count")
    )
    return {
        "1 client, p50 ms": statistics.median(lone),
        "8 clients, photos/s": rate,
        "p50 ms": statistics.median(taken),
        "p95 ms": statistics.quantiles(taken, n=20)[-1],
        "photos a batch": sizes / count,
    }


def main() -> None:
    given = shipped()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", type=Path, default=Path("build/export/scenes"))
    parser.add_argument("--photos", type=Path, default=Path("build/data/scenes/images"))
    parser.add_argument("--workers", type=int, default=given.workers)
    parser.add_argument("--threads", type=int, default=given.threads, help="of torch, in a worker")
    parser.add_argument("--batch", type=int, default=given.batch, help="batchSize")
    parser.add_argument("--delay", type=int, default=given.delay, help="maxBatchDelay, ms")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement")
    parser.add_argument("--sweep", action="store_true", help="compare settings of the server")
    arguments = parser.parse_args()
    photos = [path.read_bytes() for path in sorted(arguments.photos.iterdir())[:PHOTOS]]
    setting = Setting(arguments.workers, arguments.threads, arguments.batch, arguments.delay)
    figures: Any = against_in_process(arguments.export, setting, photos, arguments.seconds)
    torch.set_num_threads(setting.workers * setting.threads)
    text = table(["what", "figure"], [[name, f"{value:.3g}"] for name, value in figures.items()])
    if arguments.sweep:
        figures, rows = {"shipped": figures, "sweep": []}, []
        for tried in sweep(setting):
            given_by = of_setting(arguments.export, tried, photos, arguments.seconds)
            figures["sweep"].append({**vars(tried), **given_by})
            rows.append([*vars(tried).values(), *(f"{value:.3g}" for value in given_by.values())])
        text += "\n\n" + table(["workers", "threads", "batch", "delay ms", *given_by], rows)
    title = f"{arguments.export}, {setting}; {machine()}; load {os.getloadavg()[0]:.1f} at the end"
    report("serving", f"{title}\n\n{text}", figures)


if __name__ == "__main__":
    main()
