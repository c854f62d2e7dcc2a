"""64 clients at a live server: every answer is right, none is lost, a killed worker comes back, the
metrics agree, memory stays flat. A short form runs with the other tests, the long one as `slow`."""

import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY
from live import change_settings, client_of, configure, metrics_of, worker_processes
from load import Outcome, bad_cases, good_cases, run_load

from export.archive import build_archive
from handler.serve import server as serve
from training.checkpoint import load_captioner
from training.data.manifest import read_manifest

pytestmark = pytest.mark.live

CLIENTS, BATCH = 64, 8
SCENES = [REPOSITORY / "build" / name / "scenes" for name in ("checkpoints", "export", "data")]


class Served:
    """A server of its own, with what its answers must be."""

    def __init__(self, folder: Path, checkpoint: Path, export: Path, photos: list[bytes]) -> None:
        self.folder = folder
        archive = build_archive(export, folder / "model_store/captioner.mar", "1.0")
        # One worker, so that nothing answers while it is killed.
        change_settings(archive, minWorkers=1, maxWorkers=1)
        self.good = good_cases(load_captioner(checkpoint), photos)
        self.bad = bad_cases(photos[0])
        self.server = serve.start(configure(folder), home=folder)
        self.client = client_of(self.server, folder)


@pytest.fixture(scope="module")
def tiny(tiny_run, tiny_export, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    photos = [(tiny_data / f"images/{n}.png").read_bytes() for n in range(16, 20)]
    try:
        yield Served(folder, tiny_run / "build/checkpoints/tiny", tiny_export, photos)
    finally:
        serve.stop(folder)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The model of `make demo`."""
    checkpoint, export, data = SCENES
    if not (export / "encoder.pt").is_file() or not (checkpoint / "config.json").is_file():
        pytest.skip("no scenes model; run make data train export")
    folder = tmp_path_factory.mktemp("load-scenes")
    manifest = read_manifest(data)
    photos = [manifest.path(row).read_bytes() for row in manifest.split("val")[:12]]
    try:
        yield Served(folder, checkpoint, export, photos)
    finally:
        serve.stop(folder)


def check_metrics(served: Served, outcome: Outcome) -> None:
    """Exactly what the clients counted, but for the batch that was lost with its worker: it may
    have been counted before."""
    expected = {
        "captioner_photos_total": outcome.good,
        "captioner_tokens_total": outcome.tokens,
        **{f"captioner_errors_total {kind}": n for kind, n in outcome.bad.items()},
    }
    unsure = len(outcome.failed)
    deadline = time.monotonic() + 30
    while True:  # TorchServe reads the worker's lines after it has passed its answers on
        now = metrics_of(served.server)
        if all(now.get(name, 0) >= n for name, n in expected.items()):
            break
        assert time.monotonic() < deadline, (now, expected)
        time.sleep(0.2)
    for name, n in expected.items():
        assert now[name] <= n + unsure * (200 if "tokens" in name else 1), name
    assert now["captioner_batch_size_sum"] >= outcome.answered
    assert now["captioner_batch_size_count"] <= now["captioner_batch_size_sum"]
    assert "captioner_errors_total InternalError" not in now


def under_fire(served: Served, seconds: float) -> Outcome:
    """The load, with the worker killed in its middle."""
    [first], killed = worker_processes(served.server), []

    def kill() -> None:
        first.kill()
        killed.append(time.monotonic())

    timer = threading.Timer(seconds / 2, kill)
    end = time.monotonic() + seconds
    timer.start()

    def more(requests: int) -> bool:
        # On a slow machine too, some requests come after the worker is back.
        return time.monotonic() < end or not killed or requests < 2 * CLIENTS

    outcome = run_load(served.client, served.good, served.bad, CLIENTS, more)
    timer.join()
    for start, end_of_request, came, due in outcome.failed:
        # In flight at the kill, and told so with a 5xx: nothing wrong, nothing without an answer.
        assert start <= killed[0] <= end_of_request, (came, due)
        assert came.startswith("5"), (came, due)
    assert len(outcome.failed) <= BATCH
    [second] = worker_processes(served.server)
    assert second.pid != first.pid
    assert outcome.good > 0
    assert outcome.bad.total() > 0
    check_metrics(served, outcome)
    return outcome


def memory_growth(served: Served, requests: int) -> float:
    """MiB that the worker grew by between a tenth and all of the requests."""
    [worker] = worker_processes(served.server)

    def load(count: int) -> None:
        outcome = run_load(served.client, served.good, served.bad, 8, lambda n: n < count)
        assert outcome.failed == []

    def resident() -> float:
        return worker.memory_info().rss / 2**20

    load(requests // 10)
    before = resident()
    load(requests - requests // 10)
    assert psutil.pid_exists(worker.pid)
    return resident() - before


def test_under_fire(tiny):
    under_fire(tiny, 4)


def test_memory_is_flat(tiny):
    """Sees leaks of 75 KB a request and more; the long form, of 4 KB."""
    assert memory_growth(tiny, 600) < 40


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_minute_under_fire(scenes):
    outcome = under_fire(scenes, 60)
    print(f"{outcome.good} captions, {outcome.bad.total()} errors, {len(outcome.failed)} lost")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_20000_requests(tiny):
    assert memory_growth(tiny, 20_000) < 60
