"""`python -m training.distil_captions`, behind `make distil`: sequence-level distillation (Kim and
Rush 2016, arXiv:1606.07947, section 3.2). Teachers caption the training photos, and what they wrote
becomes the dataset on which a student then trains as on any other.

Each training photo gets the best captions of the teachers' beam search, as many as there are beams
unless `--num-return-sequences` overrides it, after those that people wrote (`--replace`: instead
of them, as the paper does it for translation; a photo of captions by several people would lose what
they do not agree in). Several teachers are searched as one ensemble. Validation and test stay as
they are.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from handler.errors import ArgumentParser, run_command
from handler.files import FolderKind, replace_folder
from handler.request import add_decoding_options, decoding_options
from training.data.manifest import (
    CAPTIONS_FILE,
    DATASET_FILE,
    DATASETS,
    Row,
    inputs_of,
    summary,
    write_manifest,
)
from training.loop.teachers import ensemble_captioner
from training.scores.captions import caption_rows, dataset_of

DISTILLED = FolderKind(
    *("a distilled dataset", DATASET_FILE, ("teachers",)), (DATASET_FILE, CAPTIONS_FILE)
)


def with_captions(
    rows: Sequence[Row], captions: Mapping[str, Sequence[str]], replace: bool
) -> list[Row]:
    """The rows, those that `captions` has the id of with these captions after, or instead of, their
    own. What a teacher says twice counts once, and where it says nothing the row stays as it is."""
    joined = []
    for row in rows:
        said = tuple(dict.fromkeys(text for text in captions.get(row.id, ()) if text))
        kept = () if replace and said else row.captions
        joined.append(dataclasses.replace(row, captions=kept + said))
    return joined


def distil_captions(arguments: argparse.Namespace) -> None:
    folders: list[Path] = arguments.checkpoint
    captioner = ensemble_captioner(folders)
    manifest = dataset_of(captioner, folders[0], arguments.data)
    out = arguments.out or DATASETS / f"{manifest.name}-distilled"
    options = decoding_options(arguments)
    with replace_folder(out, DISTILLED, [*folders, *inputs_of(manifest, out)]) as new:
        captions = caption_rows(captioner, manifest, manifest.split("train"), **options)
        rows = with_captions(manifest.rows, captions, arguments.replace)
        notes = {
            "teachers": [folder.as_posix() for folder in folders],
            "teacher_captions": "instead of people's" if arguments.replace else "after people's",
            "decoding": dataclasses.asdict(captioner.options(**options)),
        }
        write_manifest(new, out.resolve().name, rows, manifest.image_root, [], notes)
    print(summary(out))


def main() -> None:
    parser = ArgumentParser(prog="training.distil_captions", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", required=True, help="folders of the teachers"
    )
    parser.add_argument("--data", help="a dataset's name or folder (default: the first teacher's)")
    parser.add_argument("--out", type=Path, help=f"default {DATASETS}/NAME-distilled")
    parser.add_argument(
        "--replace", action="store_true", help="leave out what people wrote of the training photos"
    )
    add_decoding_options(parser)
    distil_captions(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
