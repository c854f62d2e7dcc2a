"""The folder of a run. It is created beside its final location and moved there when the first state
or checkpoint is saved. A run that fails before leaves no files, and an earlier run is unchanged."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handler.errors import UserError
from handler.files import check_replaceable, locked, remove_leftovers
from training.folders import CHECKPOINT, LOG_FILE, STATE_FILE, WEIGHTS_FILE


class RunFolder:
    """`final` is the final location of the run; `path` is where its files are at present."""

    def __init__(self, final: Path) -> None:
        # A link to a folder elsewhere stays: what it names is replaced.
        self.final = self.path = Path(os.path.realpath(final)) if final.is_symlink() else final

    @property
    def previous(self) -> Path:
        """Where `--overwrite` keeps the replaced run."""
        return self.final.with_name(f"{self.final.name}.previous")

    @property
    def _staging(self) -> Path:
        return self.final.with_name(f".{self.final.name}.new")

    @contextmanager
    def opened(self, resume: bool, overwrite: bool) -> Iterator[None]:
        """Locks the run's name for this process. Raises UserError if another process trains a run
        of this name, and if a run exists and neither `resume` nor `overwrite` is set."""
        with locked(self.final):
            if not self.final.exists() and (self._staging / STATE_FILE).is_file():
                self._staging.rename(self.final)  # killed while it was moved
            shutil.rmtree(self._staging, ignore_errors=True)
            for folder in (self.final, self.previous):
                remove_leftovers(folder, CHECKPOINT.files)
            if not resume:
                self._check_new(overwrite)
                self.path = self._staging
                self.path.mkdir(parents=True)
                (self.path / LOG_FILE).touch()
            try:
                yield
            finally:
                shutil.rmtree(self._staging, ignore_errors=True)

    def _check_new(self, overwrite: bool) -> None:
        taken = self.final.is_dir() and any(self.final.iterdir())
        if taken and not overwrite and (self.final / LOG_FILE).exists():
            raise UserError(
                f"{self.final}: a run of this name exists; continue it with --resume (make: "
                "ARGS=--resume), replace it with --overwrite (make: ARGS=--overwrite), or give the "
                "new run another name with --run (make: RUN=NAME)"
            )
        if taken and not overwrite:
            raise UserError(
                f"{self.final}: the folder is not empty; replace its content with --overwrite "
                "(make: ARGS=--overwrite), or give the run another name with --run (make: RUN=NAME)"
            )
        check_replaceable(self.final, CHECKPOINT)
        if taken:
            check_replaceable(self.previous, CHECKPOINT)  # will be removed

    def publish(self) -> None:
        """Moves the folder to its final location; an older run is kept as `previous`."""
        if self.path == self.final:
            return
        if self.final.exists() and any(self.final.iterdir()):
            check_replaceable(self.previous, CHECKPOINT)
            has_previous = (self.previous / WEIGHTS_FILE).exists()
            if has_previous and not (self.final / WEIGHTS_FILE).exists():
                shutil.rmtree(self.final)  # it has no weights, but the previous run has
            else:
                shutil.rmtree(self.previous, ignore_errors=True)
                self.final.rename(self.previous)
        elif self.final.exists():
            self.final.rmdir()
        self.path.rename(self.final)
        self.path = self.final
