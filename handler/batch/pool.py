"""A pool of Ray actors, each a worker. Ray hands shards out and tells which actor died; what a
shard is, and that it is written once, is `handler.batch.shard`'s."""

import importlib
import logging
import os
import secrets
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from handler.batch.output import Output
from handler.batch.process import caption_singly
from handler.batch.shard import Job, Worker, give_up
from handler.batch.source import Shard
from handler.errors import UserError

OBJECT_STORE_BYTES = 100_000_000  # shards' names and summaries: photos never pass through it
STARTS = 3  # actors in a row that may die while loading before the job is given up
# Actors that may die at one shard before it is given up: from the third on a photo cannot be the
# reason (it has a process of its own), but nodes and people end actors, too.
DEATHS = 10
PATIENCE_S = 60.0  # without any answer before it is told that no worker has a place


class Actor:
    """A worker within Ray. Its model is loaded by `load`, whose end says that it is placed."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def load(self) -> None:
        self.worker = Worker(self.job)

    def caption(self, shard: Shard) -> dict[str, Any]:
        return self.worker.caption(shard)

    def caption_singly(self, shard: Shard) -> dict[str, Any]:
        return caption_singly(self.job, shard)


@contextmanager
def connected(address: str | None, cpus: int, gpus: int) -> Iterator[Any]:
    """The module `ray`, connected to a Ray on this machine that ends with the block, or to the
    cluster at `address`."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not address:
        # Whoever can reach a port of Ray runs code here: nobody without this token.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Imported here: Ray reads the environment once, when it is imported.
    ray = importlib.import_module("ray")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        context = ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
        start_reaper(context.address_info["session_dir"])
    try:
        yield ray
    finally:
        ray.shutdown()


def start_reaper(session: str) -> None:
    """Ends all of a Ray once this process is gone: see `handler.batch.reaper`."""
    reading, _writing = os.pipe()  # the other end closes with this process
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "handler.batch.reaper", session]
    subprocess.Popen(command, stdin=reading, env=environment, start_new_session=True)
    os.close(reading)


class Pool:
    """Actors of `threads` cores and `gpus` GPUs each over the shards of a job, by the module that
    `connected` yields."""

    def __init__(self, ray: Any, job: Job, workers: int, gpus: float) -> None:
        self.ray, self.job, self.workers = ray, job, workers
        self.actor: Any = ray.remote(num_cpus=job.threads, num_gpus=gpus, max_restarts=0)(Actor)
        # What each actor is at: a shard, or None while it waits for a place or loads.
        self.tasks: dict[Any, tuple[Any, Shard | None]] = {}
        self.deaths: Counter[str] = Counter()
        self.failed_starts = 0

    def caption(self, shards: list[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
        """Yields each shard with its summary as it ends."""
        self.waiting = deque(shards)
        left = len(shards)
        for _ in range(min(self.workers, left)):
            self._start()
        # Not until every actor is done: one whose node died may never find another place.
        while left:
            ready, _ = self.ray.wait(list(self.tasks), timeout=PATIENCE_S)
            if not ready:
                self._tell_of_waiting()
                continue
            actor, shard = self.tasks.pop(ready[0])
            try:
                summary = self.ray.get(ready[0])
            except self.ray.exceptions.RayTaskError as error:
                # What the worker itself raised: a full disk, a damaged export.
                raise error.cause from None
            except self.ray.exceptions.RayError as error:
                # The actor, its node or the way to it is gone, or it took too much memory.
                summary = self._died(shard, error)
            else:
                self.failed_starts = 0
                self._next(actor)
            if shard is not None and summary is not None:
                left -= 1
                yield shard, summary

    def _start(self) -> None:
        actor = self.actor.remote(self.job)
        self.tasks[actor.load.remote()] = (actor, None)

    def _next(self, actor: Any) -> None:
        if not self.waiting:
            return
        shard = self.waiting.popleft()
        careful = self.deaths[shard.address] >= 2
        method = actor.caption_singly if careful else actor.caption
        self.tasks[method.remote(shard)] = (actor, shard)

    def _died(self, shard: Shard | None, error: Exception) -> dict[str, Any] | None:
        """The summary of a shard that is given up."""
        summary = None
        if shard is None:
            self.failed_starts += 1
            if self.failed_starts >= STARTS:
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"workers die while they load {self.job.export} ({reason})")
        else:
            self.deaths[shard.address] += 1
            if self.deaths[shard.address] < DEATHS:
                self.waiting.append(shard)
            else:
                reason = f"its workers ended {DEATHS} times"
                summary = give_up(Output(self.job.out), shard, reason) | {"seconds": 0.0}
        if self.waiting:
            self._start()
        return summary

    def _tell_of_waiting(self) -> None:
        if all(shard is None for _, shard in self.tasks.values()):
            print(
                f"no worker has found a place yet: each needs {self.job.threads} free cores (and a "
                "GPU with --gpus) of the cluster",
                file=sys.stderr,
            )
