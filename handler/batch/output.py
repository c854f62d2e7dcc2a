"""The folder of a job, on this machine or on an object store: files that are whole or not there."""

from pathlib import Path
from typing import Any

import fsspec

from handler.batch.source import URL
from handler.files import write_atomic


class Output:
    """A folder by its path or URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.folder = None if URL.match(url) else Path(url)
        self.system, self.path = fsspec.url_to_fs(self.url)

    def write(self, name: str, content: bytes) -> None:
        """Locally beside and renamed; one put on an object store, which is whole or not at all."""
        if self.folder:
            write_atomic(self.folder / name, content)
        else:
            self.system.pipe_file(f"{self.path}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file that must not be there yet. False where it is: of several processes that
        create it at once, one succeeds."""
        if self.folder:
            # Under the lock that whoever creates files holds.
            if (self.folder / name).exists():
                return False
            write_atomic(self.folder / name, content)
            return True
        try:
            self.system.pipe_file(f"{self.path}/{name}", content, mode="create")
        except FileExistsError:
            return False
        return True

    def read(self, name: str) -> bytes | None:
        """None where there is no such file."""
        try:
            return self.system.cat_file(f"{self.path}/{name}")
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        return self.system.open(f"{self.path}/{name}", "rb")

    def remove(self, name: str) -> None:
        if self.system.exists(f"{self.path}/{name}"):
            self.system.rm_file(f"{self.path}/{name}")

    def names(self) -> set[str]:
        self.system.invalidate_cache()
        if not self.system.exists(self.path):
            return set()
        return {path.rpartition("/")[2] for path in self.system.ls(self.path, detail=False)}
