"""A live server with two workers: twenty clients send ordinary photos while four send the worst
photos of every kind. No good answer is lost, wrong or late, and no worker dies."""

import random
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from hostile import HOSTILE, MEGAPIXELS
from live import client_of, configure, metrics_of, worker_processes
from load import Case, Sender
from photos import encoded, heic, natural

from export.archive import build_archive
from handler.errors import InvalidImage
from handler.request import describe_error
from handler.serve import server as serve
from training.checkpoint import load_captioner

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(1200)]

GOOD_CLIENTS, HOSTILE_CLIENTS, SECONDS = 20, 4, 60
TOO_COMPLEX = (413, "ImageTooComplex")


@dataclass
class Outcome:
    """Seconds that each good client waited, and what came instead of a right answer."""

    waits: list[float] = field(default_factory=list)
    hostile: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def ordinary_photos() -> dict[str, bytes]:
    """Of 1 to 12 megapixels, as phones, cameras and web pages have them."""
    small, medium, large = natural(1152, 864), natural(2000, 1500), natural(4000, 3000)
    return {
        "JPEG": encoded(small, "JPEG", quality=88),
        "JPEG of 3 megapixels": encoded(medium, "JPEG", quality=88),
        "JPEG of 12 megapixels": encoded(large, "JPEG", quality=88),
        "progressive JPEG": encoded(medium, "JPEG", quality=88, progressive=True),
        "PNG": encoded(small, "PNG"),
        "WebP": encoded(medium, "WEBP", quality=80, method=0),
        "AVIF": encoded(small, "AVIF", quality=70, speed=9),
        "HEIC": heic(small, quality=70),
    }


@pytest.fixture(scope="module")
def captioner(tiny_run):
    return load_captioner(tiny_run / "build/checkpoints/tiny")


@pytest.fixture(scope="module")
def good_cases(captioner) -> dict[str, Case]:
    return {
        name: Case({"image": photo}, captioner.caption([photo])[0][0].text)
        for name, photo in ordinary_photos().items()
    }


@pytest.fixture(scope="module")
def hostile_cases(captioner) -> dict[str, Case]:
    """Each with its caption, or the code and type of its error."""
    cases = {}
    for name, make in HOSTILE.items():
        photo, expected = make(), None
        try:
            expected = captioner.caption([photo])[0][0].text
        except InvalidImage as error:
            said = describe_error(error)
            expected = (said["code"], said["type"])
        cases[name] = Case({"image": photo}, expected)
    return cases


@pytest.fixture(scope="module")
def folder(tiny_export, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    build_archive(tiny_export, folder / "model_store/captioner.mar", "1.0")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    try:
        yield serve.start(configure(folder), home=folder)
    finally:
        serve.stop(folder)


def run_load(client: Any, good: dict[str, Case], hostile: dict[str, Case]) -> Outcome:
    outcome, lock, end = Outcome(), threading.Lock(), time.monotonic() + SECONDS

    def run_client(number: int, channel: grpc.Channel) -> None:
        chance, sender = random.Random(number), Sender(client, channel)
        cases = good if number < GOOD_CLIENTS else hostile
        while time.monotonic() < end:
            name = chance.choice(list(cases))
            case, start = cases[name], time.monotonic()
            try:
                code, body = sender.send(case, chance.choice(("form", "raw", "grpc")))
            except requests.RequestException as error:
                code, body = 0, type(error).__name__
            wait = time.monotonic() - start
            came = (
                body["caption"]
                if code == 200
                else (code, isinstance(body, dict) and body.get("type"))
            )
            with lock:
                if cases is good:
                    outcome.waits.append(wait)
                else:
                    outcome.hostile[str(came)] += 1
                # What takes about as long as it may is read or not.
                either = cases is hostile and TOO_COMPLEX in (came, case.expected)
                if came != case.expected and not either:
                    outcome.wrong.append(f"{name}: {came} {str(body)[:200]}, due: {case.expected}")

    with grpc.insecure_channel(client.grpc_target) as channel:
        clients = GOOD_CLIENTS + HOSTILE_CLIENTS
        with ThreadPoolExecutor(clients) as pool:
            for future in [pool.submit(run_client, n, channel) for n in range(clients)]:
                future.result()
    return outcome


@pytest.mark.parametrize(("largest", "longest"), [(15.99, 8), (64, 15)])
def test_good_clients_beside_hostile_ones(
    server, folder, good_cases, hostile_cases, largest, longest
):
    """`longest` is the wait in seconds where headers name at most so many megapixels."""
    hostile = {
        name: case for name, case in hostile_cases.items() if MEGAPIXELS.get(name, 0) <= largest
    }
    workers = {process.pid for process in worker_processes(server)}
    assert len(workers) == 2
    outcome = run_load(client_of(server, folder), good_cases, hostile)
    waits = sorted(outcome.waits)
    print(
        f"{len(waits)} good answers, waits: median {statistics.median(waits):.2f} s, 99 % "
        f"{waits[len(waits) * 99 // 100]:.2f} s, longest {waits[-1]:.2f} s; "
        f"{outcome.hostile.total()} hostile answers: {dict(outcome.hostile)}"
    )
    assert outcome.wrong == []
    assert waits[-1] < longest
    assert {process.pid for process in worker_processes(server)} == workers
    assert "captioner_errors_total InternalError" not in metrics_of(server)
    for log in (folder / "logs").glob("*.log"):
        assert "died" not in log.read_text(errors="replace"), log
