"""The log of a run: a progress bar, and one line of JSON per step and validation. Every process
calls the same methods, but only the log of the first one has an effect."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.folders import LOG_FILE


class Log:
    """Appends to `metrics.jsonl` in a run's folder and shows the progress bar of a stage."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        """`folder()` returns the present folder of the run's files."""
        self.folder = folder
        self.bar: tqdm[Any] = tqdm(disable=True)

    def begin(self, stage: str, photos: int, done: int) -> None:
        """Starts a bar: `photos` in all epochs of the stage, of which `done` are done."""
        self.bar = tqdm(total=photos, initial=done, desc=stage, unit="photo", smoothing=0.05)

    def step(self, shown: dict[str, float], photos: int) -> None:
        self.bar.update(photos)
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, False)

    def write(self, entry: dict[str, Any]) -> None:
        with (self.folder() / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def say(self, line: str) -> None:
        tqdm.write(line)

    def end(self) -> None:
        self.bar.close()


class NullLog(Log):
    """A log that does nothing, for all processes but the first."""

    def begin(self, stage: str, photos: int, done: int) -> None:
        pass

    def step(self, shown: dict[str, float], photos: int) -> None:
        pass

    def write(self, entry: dict[str, Any]) -> None:
        pass

    def say(self, line: str) -> None:
        pass
