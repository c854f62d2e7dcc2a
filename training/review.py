"""`python -m training.review`, behind `make review`: writes a blind rating sheet (see
`training.pages.review`) and its key."""

import json
import os
import re
from pathlib import Path

from handler.errors import ArgumentParser, UserError, run_command
from handler.files import FolderKind, check_replaceable, locked, read_object, write_atomic
from training.data.manifest import data_folder, inputs_of, read_manifest
from training.pages.review import key_of, make_items, read_systems, render
from training.scores.ratings import REVIEWS

# Nothing else in the folder is touched, so that anything may lie there.
REVIEW = FolderKind("a review", "key.json", ("sheet", "items"), ("*",))


def main() -> None:
    parser = ArgumentParser(prog="training.review", description=__doc__)
    parser.add_argument(
        "--predictions", type=Path, nargs="+", required=True, help="captions in COCO's format"
    )
    parser.add_argument("--data", required=True, help="a dataset's name or folder")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--photos", type=int, default=50, help="default 50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default build/review/DATA")
    arguments = parser.parse_args()
    if arguments.photos < 1:
        parser.error(f"--photos {arguments.photos}: give 1 or more")
    manifest = read_manifest(data_folder(arguments.data))
    systems = read_systems(arguments.predictions)
    items = make_items(systems, manifest.split(arguments.split), arguments.photos, arguments.seed)
    out = arguments.out or REVIEWS / manifest.name
    check_replaceable(out, REVIEW, [*arguments.predictions, *inputs_of(manifest, out)])
    key = key_of(items, manifest, arguments.split)
    with locked(out):
        set_aside(out, key["sheet"])
        text = json.dumps(key, ensure_ascii=False, indent=1)
        write_atomic(out / "key.json", text + "\n")
        write_atomic(out / "sheet.html", render(items, manifest))
    print(f"{out / 'sheet.html'}: {len(items)} photos, {len(systems)} systems and a person")
    print(f"{out / 'key.json'}: whose captions they are; raters must not see it")


def set_aside(out: Path, sheet: str) -> None:
    """Keeps an earlier sheet of other captions, which people may be rating, with its key and scores
    as `sheet-ID.html` and so on, where `review_score` finds the key by the ID."""
    if not (out / "key.json").exists():
        return
    earlier = read_object(out / "key.json")["sheet"]
    if earlier == sheet:
        return
    if not re.fullmatch(r"\w{1,64}", str(earlier)):
        raise UserError(f"{out / 'key.json'}: field 'sheet' is no sheet's id; move the file away")
    # The key last: cut off before, the next run goes on.
    for name in ("scores.json", "sheet.html", "key.json"):
        if (out / name).exists():
            kept = Path(name)
            os.replace(out / name, out / f"{kept.stem}-{earlier}{kept.suffix}")
    print(f"{out / f'sheet-{earlier}.html'}: the earlier sheet, kept with its key")


if __name__ == "__main__":
    run_command(main)
