"""handler/batch, 10,000 photos in three layouts: whatever is killed, every id is one row."""

import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from batch_jobs import (
    BROKEN,
    Driver,
    deadly,
    needs_namespace,
    rows_of,
    start_batch,
    write_folder,
    write_parquet,
    write_tars,
)
from photos import encoded, smooth

from handler.captioner import Captioner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), needs_namespace]

PHOTOS, DRAWN = 10_000, 200
LAYOUTS = {
    "folder": write_folder,
    "tars": lambda folder, photos: write_tars(folder, photos, tars=40),
    "parquet": lambda folder, photos: write_parquet(folder, photos, rows=250),
}


@pytest.fixture(scope="module")
def photos() -> dict[str, bytes]:
    """A hundred of them broken."""
    drawn = [encoded(smooth(40, 30, n), "JPEG") for n in range(DRAWN)]
    broken = [content for content, _ in BROKEN.values()]
    return {
        f"{n:05}.jpg": broken[n // 100 % 2] if n % 100 == 7 else drawn[n % DRAWN]
        for n in range(PHOTOS)
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory, photos) -> dict[str, str]:
    root = tmp_path_factory.mktemp("photos")
    return {name: write(root / name, photos) for name, write in LAYOUTS.items()}


@pytest.fixture(scope="module")
def expected(tiny_export, photos) -> dict[str, str | None]:
    captioner = Captioner.load(tiny_export)
    drawn = [encoded(smooth(40, 30, n), "JPEG") for n in range(DRAWN)]
    captions = [found[0].text for found in captioner.caption(drawn)]
    return {
        name: None if n % 100 == 7 else captions[n % DRAWN] for n, name in enumerate(sorted(photos))
    }


def check(out: Path, expected: dict[str, str | None]) -> None:
    rows = rows_of(out)
    counts = Counter(Path(row["id"]).name for row in rows)
    assert set(counts.values()) == {1} and counts.keys() == expected.keys()
    assert {Path(row["id"]).name: row["caption"] for row in rows} == expected
    assert all((row["caption"] is None) == (row["error"] is not None) for row in rows)
    assert not list(out.glob("*.failed.json"))


def parts(out: Path) -> int:
    return len(list(out.glob("part-*.parquet")))


def wait_for(condition: Callable[[], object], driver: Driver, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and driver.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_driver_killed_at_five_random_moments(layout, tmp_path, tiny_export, sources, expected):
    chance, out = random.Random(layout), tmp_path / "out"
    # The first kill falls into the start, the others anywhere before the last tenth.
    for goal in [0, *sorted(chance.sample(range(36), 4))]:
        driver = start_batch(sources[layout], out, tiny_export)
        wait_for(lambda at=goal: parts(out) >= at, driver)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 8 if goal == 0 else 0.5))
        assert driver.process.poll() is None
        driver.kill()
        driver.check_all_ended()
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 0 < len(before) < 40
    status, output = start_batch(sources[layout], out, tiny_export).wait(900)
    assert status == 1, output
    # What was there is kept, and nothing of the killed is left.
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path.name.split("-")[0].split(".")[0] for path in out.iterdir()} == {
        "part",
        "run",
        "shards",
    }
    check(out, expected)


def test_actors_killed_five_times(tmp_path, tiny_export, sources, expected):
    chance, out, killed = random.Random(5), tmp_path / "out", set()
    driver = start_batch(sources["folder"], out, tiny_export, "--workers", "2")
    while len(killed) < 5:
        time.sleep(chance.uniform(0, 3))
        alive = [actor for actor in driver.actors() if actor.pid not in killed]
        assert driver.process.poll() is None
        if alive:
            victim = chance.choice(alive)
            victim.kill()
            killed.add(victim.pid)
    assert driver.wait(900)[0] == 1
    check(out, expected)
    driver.check_all_ended()


def test_a_photo_that_kills_its_worker(tmp_path, tiny_export, photos, expected):
    where = write_folder(tmp_path / "in", photos)
    (tmp_path / "in/sub/00500.jpg").unlink()
    with deadly(tmp_path / "in/sub/00500.jpg") as dead:
        status, output = start_batch(where, tmp_path / "out", tiny_export).wait(900)
    assert status == 1 and "WorkerDied 1" in output
    # Two actors, then the process that tried the photo alone.
    assert len(dead) == 3
    [row] = [row for row in rows_of(tmp_path / "out") if row["id"] == "sub/00500.jpg"]
    assert row["error"]["type"] == "WorkerDied"
    check(tmp_path / "out", expected | {"00500.jpg": None})


# A head without cores and two nodes with one, and a driver, in a network namespace of their own;
# after five parts a node is killed. Prints how many parts there were then.
CLUSTER = """
import subprocess, sys, time
from pathlib import Path
from handler.batch.namespace import enter
enter()
from ray.cluster_utils import Cluster
cluster = Cluster(True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
command, out = [sys.executable, "-m", "handler.batch", *sys.argv[1:]], Path(sys.argv[-1])
driver = subprocess.Popen([*command, "--address", cluster.address])
parts = 0
while parts < 5 and driver.poll() is None:
    time.sleep(0.01)
    parts = len(list(out.glob("part-*.parquet")))
cluster.remove_node(nodes[1], allow_graceful=False)
print("parts:", parts, flush=True)
status = driver.wait()
cluster.shutdown()
sys.exit(status)
"""


def test_a_node_of_a_cluster_killed(tmp_path, tiny_export, sources, expected):
    """The actor in its place never finds one of its own: the job must end all the same."""
    out = tmp_path / "out"
    given = ["--source", sources["tars"], "--export", str(tiny_export), "--out", str(out)]
    driver = Driver([sys.executable, "-W", "ignore", "-c", CLUSTER, *given], tmp_path)
    status, output = driver.wait(900)
    assert status == 1, output
    # Two may be written at once. The node is killed in the middle of the job.
    assert 5 <= int(re.findall(r"^parts: (\d+)$", output, re.MULTILINE)[0]) < 20
    check(out, expected)
    driver.check_all_ended()


@pytest.mark.parametrize("first", [0, 1], ids=["counted from 0", "counted from 1"])
def test_two_jobs_of_an_array_at_once(first, tmp_path, tiny_export, sources, expected):
    out = tmp_path / "out"
    jobs = [
        start_batch(sources["folder"], out, tiny_export, "--shards", f"{first + n}/2")
        for n in range(2)
    ]
    ends = [job.wait(900) for job in jobs]
    assert [status for status, _ in ends] == [1, 1], ends
    assert all(f"{PHOTOS} photos" not in output for _, output in ends)
    check(out, expected)


def test_a_job_of_an_array_goes_on_where_it_was_killed(tmp_path, tiny_export, sources, expected):
    out = tmp_path / "out"
    for goal in (0, 3, 11):
        job = start_batch(sources["parquet"], out, tiny_export, "--shards", "0/1")
        wait_for(lambda at=goal: parts(out) >= at, job)  # type: ignore[misc]
        job.kill()
        job.check_all_ended()
    assert start_batch(sources["parquet"], out, tiny_export, "--shards", "0/1").wait(900)[0] == 1
    check(out, expected)


def test_a_second_driver_is_refused(tmp_path, tiny_export, sources, expected):
    out = tmp_path / "out"
    first = start_batch(sources["folder"], out, tiny_export)
    wait_for(lambda: parts(out), first)
    status, output = start_batch(sources["folder"], out, tiny_export).wait()
    assert (status, output.count("\n")) == (2, 1) and f"{out}: another process" in output
    assert first.wait(900)[0] == 1
    check(out, expected)


# A system that allows no network namespace: within one (so that nothing is exposed) with a second
# interface up, `unshare` is refused by a filter of system calls that every child inherits.
NO_NAMESPACE = """
import ctypes, errno, fcntl, os, socket, struct, sys
from handler.batch.namespace import IFF_UP, SIOCSIFFLAGS, enter
enter()
TUNSETIFF, IFF_TUN = 0x400454CA, 0x1
tun = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN))
os.set_inheritable(tun, True)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"tun0", IFF_UP))
machine = os.uname().machine
arch, unshare = {"x86_64": (0xC000003E, 272), "aarch64": (0xC00000B7, 97)}[machine]
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
steps = [
    (LOAD, 0, 0, 4), (EQUAL, 0, 3, arch),  # seccomp_data.arch
    (LOAD, 0, 0, 0), (EQUAL, 0, 1, unshare),  # seccomp_data.nr
    (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW),
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
assert not libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
assert not libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0), ctypes.get_errno()
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
# Knocks at the job's Ray without its token, while it runs.
INTRUDER = """
import os, subprocess, sys, time
from pathlib import Path
driver = subprocess.Popen([sys.executable, "-m", "handler.batch", *sys.argv[1:]])
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "0" * 64
import psutil, ray
out = Path(sys.argv[-1])
while not list(out.glob("part-*.parquet")):
    assert driver.poll() is None
    time.sleep(0.05)
ports = [
    connection.laddr.port
    for child in psutil.Process(driver.pid).children() if child.name() == "gcs_server"
    for connection in child.net_connections("tcp") if connection.status == "LISTEN"
]
assert ports
for port in ports:
    try:
        ray.init(address=f"127.0.0.1:{port}", log_to_driver=False)
        print("let in", flush=True)
    except Exception as error:
        print("refused:", type(error).__name__, error, flush=True)
sys.exit(driver.wait())
"""


def test_where_no_namespace_can_be_had_it_is_told_and_a_token_is_asked(
    tmp_path, tiny_export, sources, expected
):
    out = tmp_path / "out"
    given = ["--source", sources["folder"], "--export", str(tiny_export), "--out", str(out)]
    python = [sys.executable, "-W", "ignore", "-c"]
    driver = Driver([*python, NO_NAMESPACE, "-c", INTRUDER, *given], tmp_path)
    status, output = driver.wait(900)
    assert status == 1, output
    assert "warning: Ray's ports are open on every interface (this system allows no" in output
    assert "let in" not in output and "InvalidAuthToken" in output
    check(out, expected)
