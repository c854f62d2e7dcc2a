"""`python -m training.demo`, the first step of `make demo`: refuses where the demo would replace a
checkpoint or an export that is called `demo`, too, but was trained with another config."""

import dataclasses
from pathlib import Path
from typing import Any

from handler.errors import ArgumentParser, UserError, run_command
from handler.files import read_object
from training.config import load_config
from training.folders import CHECKPOINTS, STATE_FILE
from training.loop.run import changed_field, read_state

# The config and the run of `make demo`.
CONFIG, RUN = "scenes", "demo"
PLACES = (CHECKPOINTS / RUN, Path("build/export") / RUN)


def is_of_demo(folder: Path) -> bool:
    """Whether what is in a folder was trained as the demo is, be it only to its first saved state.
    The same config, dataset and seed give the same weights, so nothing is lost with it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    config = load_config(CONFIG, data=CONFIG)
    try:
        if (folder / STATE_FILE).exists():
            read_state(folder, config)
            return True
        training: Any = read_object(folder / "config.json").get("training")
        return changed_field(dataclasses.asdict(config), training["config"]) is None
    except (KeyError, TypeError, UserError):
        return False


def main() -> None:
    ArgumentParser(prog="training.demo", description=__doc__).parse_args()
    for folder in PLACES:
        if not is_of_demo(folder):
            raise UserError(f"{folder}: was not made by this demo; rename or remove it")


if __name__ == "__main__":
    run_command(main)
