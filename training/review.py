"""`python -m training.review`, behind `make review`: writes a blind rating sheet (see
`training.pages.review`) and its key."""

import json
from pathlib import Path

from handler.errors import ArgumentParser, run_command
from handler.files import write_atomic
from training.data.manifest import data_folder, read_manifest
from training.pages.review import key_of, make_items, read_systems, render


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
    out = arguments.out or Path("build/review") / manifest.name
    key = json.dumps(key_of(items, manifest, arguments.split), ensure_ascii=False, indent=1)
    write_atomic(out / "key.json", key + "\n")
    write_atomic(out / "sheet.html", render(items, manifest))
    print(f"{out / 'sheet.html'}: {len(items)} photos, {len(systems)} systems and a person")
    print(f"{out / 'key.json'}: whose captions they are; raters must not see it")


if __name__ == "__main__":
    run_command(main)
