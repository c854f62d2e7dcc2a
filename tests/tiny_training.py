"""Training runs of the tiny captioner within the test's own process."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY

import training.loop.stage
import training.loop.train
from training.config import TrainConfig, load_config
from training.data.manifest import Manifest
from training.loop.run import Run


def config_of(path: Path, **fields: Any) -> TrainConfig:
    """The tiny config with other fields, by way of a file."""
    path.write_text(yaml.safe_dump({**TINY, **fields}))
    return load_config(str(path))


def train_killed(
    config: TrainConfig,
    manifest: Manifest,
    folder: Path,
    every: int,
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    """Trains into `folder` to the end, killed after each `every`th saved state and resumed. A state
    is saved after every step. Returns the number of kills."""
    monkeypatch.setattr(training.loop.stage, "SAVE_EVERY_SECONDS", -1.0)
    saves, save = itertools.count(1), Run.save_state

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        if next(saves) % every == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save_state", save_and_die)
    for kills in itertools.count():
        try:
            training.loop.train.train(config, manifest, folder, None, resume=kills > 0)
        except KeyboardInterrupt:
            continue
        return kills
    raise AssertionError("never reached")
