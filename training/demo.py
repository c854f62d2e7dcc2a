"""`python -m training.demo`, the first and last steps of `make demo`. First it refuses if the demo
would replace a checkpoint or an export that is also called `demo`, but was trained with another
config; at the end it checks the caption against the truth of the drawn picture."""

import dataclasses
from pathlib import Path
from typing import Any

from handler.errors import ArgumentParser, UserError, run_command
from handler.files import read_object
from training.config import load_config
from training.data.manifest import Row, data_folder, read_manifest
from training.data.scenes import check
from training.folders import CHECKPOINTS, STATE_FILE
from training.loop.run import changed_field, read_state

# The config and the run of `make demo`.
CONFIG, RUN = "scenes", "demo"
# A new demo replaces the last one, and removes the one before it.
PLACES = (CHECKPOINTS / RUN, CHECKPOINTS / f"{RUN}.previous", Path("build/export") / RUN)


def is_of_demo(folder: Path) -> bool:
    """Whether what is in a folder was trained as the demo is, be it only to its first saved state.
    The same config, dataset and seed give the same weights, so nothing is lost with it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    config = load_config(CONFIG, data=CONFIG)
    try:
        if (folder / STATE_FILE).exists():
            # A run of the same config on photos of a user's own is no demo.
            return bool(read_state(folder, config)["config"].get("data") == config.data)
        training: Any = read_object(folder / "config.json").get("training")
        return changed_field(dataclasses.asdict(config), training["config"]) is None
    except (KeyError, TypeError, UserError):
        return False


def checked(caption: str, row: Row) -> list[str]:
    """A line for each statement of a caption: whether it is true for the picture, and in what."""
    lines = []
    claims = check(caption, row.scene or {})
    for text in dict.fromkeys(claim.text for claim in claims):
        kinds = [claim for claim in claims if claim.text == text]
        wrong = ", ".join(claim.kind for claim in kinds if not claim.true)
        right = ", ".join(claim.kind for claim in kinds if claim.true)
        verdict = f"false ({wrong})" if wrong else f"true ({right})"
        lines.append(f"  {text}: {verdict}")
    return lines or ["  nothing that can be checked"]


def main() -> None:
    parser = ArgumentParser(prog="training.demo", description=__doc__)
    parser.add_argument("--picture", action="store_true", help="print the path of its picture")
    parser.add_argument("--check", metavar="CAPTION", help="print which statements are true")
    arguments = parser.parse_args()
    if arguments.picture or arguments.check is not None:
        manifest = read_manifest(data_folder(CONFIG))
        row = manifest.split("val")[0]
        lines = checked(arguments.check, row) if arguments.check else [manifest.path(row)]
        print(*lines, sep="\n")
        return
    for folder in PLACES:
        if not is_of_demo(folder):
            raise UserError(f"{folder}: was not made by this demo; rename or remove it")


if __name__ == "__main__":
    run_command(main)
