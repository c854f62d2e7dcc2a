"""A pool of Ray actors, one worker each. Ray distributes the shards and reports which actors died;
`handler.batch.shard` captions a shard and writes its file."""

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

OBJECT_STORE_BYTES = 100_000_000  # for names and summaries of shards; photos never pass through it
STARTS = 3  # the job fails when so many actors in a row died while they loaded the model
# A shard fails when so many actors died while they captioned it. From the third death on, a photo
# cannot be the cause, since each is captioned in a separate process; but nodes fail, and people
# kill actors.
DEATHS = 10
PATIENCE_S = 60.0  # without a result, before a message says that no worker could be placed


class Actor:
    """A worker as a Ray actor. When `load` returns, the actor is placed and its model loaded."""

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
    """Yields the module `ray`, connected to the cluster at `address`, or to a local Ray that is
    shut down at the end of the block."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not address:
        # Anyone who can reach a port of Ray could run code here; the token prevents it.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Imported here: Ray reads the environment once, when it is imported.
    ray = importlib.import_module("ray")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ValueError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--address {address}: no Ray cluster answers ({reason})") from error
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
    """Starts the process that kills a local Ray when this process ends (`handler.batch.reaper`)."""
    reading, _writing = os.pipe()  # the system closes the other end when this process ends
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "handler.batch.reaper", session]
    subprocess.Popen(command, stdin=reading, env=environment, start_new_session=True)
    os.close(reading)


class Pool:
    """Captions the shards of a job with actors that have `threads` cores and `gpus` GPUs each.
    `ray` is the module that `connected` yields."""

    def __init__(self, ray: Any, job: Job, workers: int, gpus: float) -> None:
        self.ray, self.job, self.workers = ray, job, workers
        self.actor: Any = ray.remote(num_cpus=job.threads, num_gpus=gpus, max_restarts=0)(Actor)
        # The shard that each actor captions; None while the actor is placed or loads its model.
        self.tasks: dict[Any, tuple[Any, Shard | None]] = {}
        self.deaths: Counter[str] = Counter()
        self.failed_starts = 0

    def caption(self, shards: list[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
        """Yields each shard with its summary when it is finished."""
        self.waiting = deque(shards)
        left = len(shards)
        for _ in range(min(self.workers, left)):
            self._start()
        # Until all shards are finished, not all actors: one whose node died may never be placed.
        while left:
            ready, _ = self.ray.wait(list(self.tasks), timeout=PATIENCE_S)
            if not ready:
                self._report_waiting()
                continue
            actor, shard = self.tasks.pop(ready[0])
            try:
                summary = self.ray.get(ready[0])
            except self.ray.exceptions.RayTaskError as error:
                # An exception of the worker itself, such as a full disk or a damaged export.
                raise error.cause from None
            except self.ray.exceptions.RayError as error:
                # The actor or its node died, the connection is lost, or it used too much memory.
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
        singly = self.deaths[shard.address] >= 2
        method = actor.caption_singly if singly else actor.caption
        self.tasks[method.remote(shard)] = (actor, shard)

    def _died(self, shard: Shard | None, error: Exception) -> dict[str, Any] | None:
        """Replaces an actor that died and queues its shard again. Returns the summary of a shard
        that has failed, else None."""
        summary = None
        if shard is None:
            self.failed_starts += 1
            if self.failed_starts >= STARTS:
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"{self.job.export}: workers died while they loaded it ({reason})")
        else:
            self.deaths[shard.address] += 1
            if self.deaths[shard.address] < DEATHS:
                self.waiting.append(shard)
            else:
                reason = f"its workers died {DEATHS} times"
                summary = give_up(Output(self.job.out), shard, reason) | {"seconds": 0.0}
        if self.waiting:
            self._start()
        return summary

    def _report_waiting(self) -> None:
        if all(shard is None for _, shard in self.tasks.values()):
            print(
                f"no worker could be placed yet: each needs {self.job.threads} free cores of the "
                "cluster (and a GPU with --gpus)",
                file=sys.stderr,
            )
