"""`python -m training.grounding`: how well a word's map finds what the word names, for each way of
making maps (see `training.scores.grounding`), on drawn scenes."""

from pathlib import Path

from handler.errors import ArgumentParser, run_command
from training.checkpoint import load_captioner
from training.data.manifest import data_folder, read_manifest
from training.model import Encoder
from training.scores.grounding import measure


def main() -> None:
    parser = ArgumentParser(prog="training.grounding", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--data", default="scenes", help="drawn scenes: a name or a folder")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    arguments = parser.parse_args()
    captioner = load_captioner(arguments.checkpoint)
    if not isinstance(captioner.encoder, Encoder):
        parser.error(
            f"--checkpoint {arguments.checkpoint}: its encoder is not a Vision Transformer"
        )
    manifest = read_manifest(data_folder(arguments.data))
    rows = manifest.split(arguments.split)
    if any(row.scene is None for row in rows):
        parser.error(f"--data {arguments.data}: its photos carry no drawn truth; use scenes")
    table, counted, absent = measure(captioner, manifest, rows)
    print(f"{counted} words that name a shape ({absent} more name one that is not there)")
    print(f"{'way':44} pointing  overlap")
    for way, (pointing, mean) in sorted(table.items(), key=lambda entry: entry[1], reverse=True):
        print(f"{way:44} {pointing:8.1%} {mean:8.3f}")


if __name__ == "__main__":
    run_command(main)
