"""Workers in separate local processes: if one crashes, the others and the job go on."""

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
from handler.batch.source import Shard
from handler.errors import UserError


class WorkerDied(Exception):
    """The process ended without an answer."""


class Child:
    """A `handler.batch.shard.Worker` in a separate process, which is restarted after it died."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the worker. Raises WorkerDied, or the exception of the method."""
        self._send((method, arguments))
        return self._receive()[1]

    def stream(self, method: str, *arguments: Any) -> Iterator[Any]:
        """Yields the items of a generator of the worker as they arrive. Raises as `call` does."""
        self._send((method, arguments))
        while (answer := self._receive())[0] == "item":
            yield answer[1]

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
                process_group=0,  # Ctrl-C must only reach the process that started it
            )
        self.connection = Connection(ours.detach())
        self._send(self.job)
        self._receive()

    def _send(self, message: Any) -> None:
        if self.connection is None:
            self._start()
        assert self.connection is not None
        try:
            self.connection.send(message)
        except OSError:
            raise self._died() from None

    def _receive(self) -> tuple[str, Any]:
        """("item", an item of a stream) or ("last", the result of a call)."""
        assert self.connection is not None
        try:
            kind, answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if kind == "error":
            self.close()
            raise pickle.loads(answer)
        return kind, answer

    def _died(self) -> WorkerDied:
        assert self.process is not None
        status = self.process.wait()
        self.close()
        return WorkerDied(f"its worker ended with status {status}")


def caption_singly(job: Job, shard: Shard) -> dict[str, Any]:
    """Captions a shard whose worker died twice, one photo at a time in a separate process. A photo
    that crashes the process becomes a row with the error WorkerDied. Returns what `finish` returns.
    """
    child = Child(job)
    try:
        return finish(Output(job.out), shard, _rows_singly(child, shard))
    finally:
        child.close()


def _rows_singly(child: Child, shard: Shard) -> Iterator[Row]:
    """Raises UserError if the process crashes twice in a row while it reads the shard."""
    done = deaths = 0
    while True:
        tried = None
        try:
            for item in child.stream("caption_singly", shard, done):
                if isinstance(item, str):
                    tried = item
                    continue
                yield item
                tried, done, deaths = None, done + 1, 0
            return
        except WorkerDied as error:
            if tried is not None:
                yield error_row(tried, "WorkerDied", f"the photo cannot be captioned: {error}")
                done, deaths = done + 1, 0
                continue
            deaths += 1
            if deaths == 2:
                raise UserError(f"the shard cannot be read after photo {done}: {error}") from None


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
