"""The output folder of a job, local or on an object store. Each file is written completely or not
at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from handler.batch.source import URL
from handler.errors import UserError
from handler.files import write_atomic


class Output:
    """A folder by its path or URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.folder = None if URL.match(url) else Path(url)
        try:
            self.system, self.path = fsspec.url_to_fs(self.url)
        except Exception as error:  # an unknown protocol, a package that is not installed
            raise UserError(f"{url}: cannot be written ({error}); choose another --out") from error

    def write(self, name: str, content: bytes) -> None:
        """Writes a file: locally by renaming a temporary file, on an object store by one put."""
        if self.folder:
            write_atomic(self.folder / name, content)
            return
        with self._naming(name, "written"):
            self.system.pipe_file(f"{self.path}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file unless it exists; returns False if it does. If several processes create it
        at the same time, one of them succeeds."""
        if self.folder:
            # Every caller holds the job's lock, so no other process creates the file in between.
            if (self.folder / name).exists():
                return False
            write_atomic(self.folder / name, content)
            return True
        try:
            with self._naming(name, "written"):
                self.system.pipe_file(f"{self.path}/{name}", content, mode="create")
        except FileExistsError:
            return False
        return True

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None if it does not exist."""
        try:
            with self._naming(name, "read"):
                return self.system.cat_file(f"{self.path}/{name}")
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        with self._naming(name, "read"):
            return self.system.open(f"{self.path}/{name}", "rb")

    def remove(self, name: str) -> None:
        with self._naming(name, "removed"):
            if self.system.exists(f"{self.path}/{name}"):
                self.system.rm_file(f"{self.path}/{name}")

    def names(self) -> set[str]:
        """The names of all files; empty ones, which a power cut can leave, do not count."""
        self.system.invalidate_cache()
        with self._naming("", "read"):
            if not self.system.exists(self.path):
                return set()
            entries = self.system.ls(self.path, detail=True)
        kept = (one for one in entries if one["type"] != "file" or one.get("size") != 0)
        return {one["name"].rpartition("/")[2] for one in kept}

    @contextmanager
    def _naming(self, name: str, what: str) -> Iterator[None]:
        """Names the file in the errors of an object store: each kind has exception types of its
        own. Those of a file that exists, or does not, are answers."""
        try:
            yield
        except (FileExistsError, FileNotFoundError):
            raise
        except Exception as error:
            if self.folder:
                raise
            raise UserError(f"{self.url}/{name}: cannot be {what} ({error})") from error
