"""Workers in processes of their own on this machine: what ends one ends nothing else."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from handler.batch.output import Output
from handler.batch.shard import Job, Row, error_row, finish
from handler.batch.source import Shard, read


class WorkerDied(Exception):
    """The process ended without an answer."""


class Child:
    """A `handler.batch.shard.Worker` in a process, started anew after it died."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None

    def call(self, method: str, argument: Any) -> Any:
        """Raises WorkerDied, and what the worker raised."""
        if self.process is None:
            self._start()
        return self._ask((method, argument))

    def close(self) -> None:
        if self.connection is not None and self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.wait()
        self.process = self.connection = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "handler.batch.child", str(theirs.fileno())]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the one who started it
            )
        self.connection = Connection(ours.detach())
        self._ask(self.job)

    def _ask(self, message: Any) -> Any:
        assert self.connection is not None and self.process is not None
        try:
            self.connection.send(message)
            is_answer, answer = self.connection.recv()
        except (EOFError, OSError):
            status = self.process.wait()
            self.close()
            raise WorkerDied(f"its worker ended with status {status}") from None
        if not is_answer:
            self.close()
            raise pickle.loads(answer)
        return answer


def caption_singly(job: Job, shard: Shard) -> dict[str, Any]:
    """A shard whose worker died twice, one photo at a time: a photo that ends the process is a row
    with the error WorkerDied. Returns what `finish` returns."""
    child = Child(job)

    def rows() -> Iterator[Row]:
        for photo in read(shard):
            try:
                yield child.call("caption_photo", photo)
            except WorkerDied as error:
                yield error_row(photo.id, "WorkerDied", f"the photo cannot be captioned: {error}")

    try:
        return finish(Output(job.out), shard, rows())
    finally:
        child.close()


def caption_shards(job: Job, shards: list[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """Captions shards one after another on this machine, without Ray."""
    child = Child(job)
    try:
        for shard in shards:
            yield shard, _caption(child, job, shard)
    finally:
        child.close()


def _caption(child: Child, job: Job, shard: Shard) -> dict[str, Any]:
    for _ in range(2):
        try:
            return child.call("caption", shard)
        except WorkerDied:
            continue
    return caption_singly(job, shard)
