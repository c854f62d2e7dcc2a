"""`python -m training.report`, behind `make report`: one HTML file that shows what a checkpoint or
an export makes of a split, alone or beside another. It opens from disk and needs no network."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from handler.errors import ArgumentParser, run_command
from handler.files import FORMAT, FolderKind, replace_folder, write_atomic
from handler.request import add_decoding_options, decoding_options
from handler.web.page import photo
from training.data.manifest import Manifest, Row, inputs_of
from training.data.photos import read_photo
from training.pages.report import Shown, render
from training.pages.system import System, caption_split, load_system, maps_of, score_system
from training.scores.captions import dataset_of, write_predictions
from training.scores.metrics import choose_tokenizer

REPORT = FolderKind(
    *("a report", "report.json", ("report",)), ("report.json", "report.html", "predictions.json")
)
# Photos shown in each group; no side of one is longer than PHOTO_SIDE pixels.
GROUP, GROUP_OF_MISTAKES, PHOTO_SIDE = 12, 6, 340


def choose(systems: Sequence[System], rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The photos to show, by the heading they stand under."""
    first, by_id = systems[0], {row.id: row for row in rows}
    ranked = sorted(rows, key=lambda row: -first.each[row.id]["CIDEr"])
    groups = {}
    if len(systems) == 2:
        gain = {r.id: systems[1].each[r.id]["CIDEr"] - first.each[r.id]["CIDEr"] for r in rows}
        apart = sorted(rows, key=lambda row: gain[row.id])
        worse = [row for row in apart if gain[row.id] < 0]
        better = [row for row in reversed(apart) if gain[row.id] > 0]
        groups[f"Better with {first.name}"] = worse[:GROUP]
        groups[f"Better with {systems[1].name}"] = better[:GROUP]
    groups["Best"] = ranked[:GROUP]
    groups["Worst"] = ranked[::-1][:GROUP]
    groups["Random"] = random.Random(0).sample(list(rows), min(GROUP, len(rows)))
    for kind, mistakes in first.mistakes.items():
        photos = [by_id[key] for key in mistakes.photos]
        if photos:
            some = random.Random(0).sample(photos, min(GROUP_OF_MISTAKES, len(photos)))
            groups[f"Wrong {kind}"] = some
    return groups


def name_apart(systems: Sequence[System]) -> None:
    """Adds as much of the path to the names as tells systems apart: an export and its checkpoint
    have the same name. A folder beside itself has a number."""
    paths = [system.folder.resolve().parts for system in systems]
    for length in range(2, max(map(len, paths))):
        if len({system.name for system in systems}) == len(systems):
            return
        for system, path in zip(systems, paths, strict=True):
            system.name = "/".join(path[-length:])
    if len({system.name for system in systems}) < len(systems):
        for number, system in enumerate(systems, 1):
            system.name += f" ({number})"


def show(
    systems: Sequence[System], manifest: Manifest, groups: Mapping[str, Sequence[Row]]
) -> dict[str, Shown]:
    """The photos of the groups, with the words' maps of each system, by id."""
    shown = list({row.id: row for group in groups.values() for row in group}.values())
    maps = [maps_of(system, manifest, shown) for system in systems]
    found = {}
    for row in shown:
        image = read_photo(manifest, row)
        words = [by_id[row.id] for by_id in maps]
        found[row.id] = Shown(photo(image, PHOTO_SIDE, row.captions[0]), image.size, words)
    return found


def main() -> None:
    parser = ArgumentParser(prog="training.report", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="folder of a checkpoint")
    what.add_argument("--export", type=Path, help="folder of an export")
    parser.add_argument("--compare", type=Path, help="another checkpoint or export, side by side")
    parser.add_argument("--data", help="a dataset's name or folder (default: the training one)")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--out", type=Path, help="default build/report/NAME")
    add_decoding_options(parser)
    arguments = parser.parse_args()
    options = decoding_options(arguments)
    choose_tokenizer()  # a Java that does not work ends it before anything is captioned

    folders = [arguments.checkpoint or arguments.export]
    folders += [arguments.compare] if arguments.compare else []
    systems = [load_system(folder) for folder in folders]
    name_apart(systems)
    manifest = dataset_of(systems[0].captioner, folders[0], arguments.data)
    rows = manifest.split(arguments.split)
    out = arguments.out or Path("build/report") / folders[0].resolve().name
    with replace_folder(out, REPORT, [*folders, *inputs_of(manifest, out)]) as new:
        for system in systems:
            caption_split(system, manifest, rows, options)
            score_system(system, rows)
        groups = choose(systems, rows)
        photos = show(systems, manifest, groups)
        write_predictions(new / "predictions.json", systems[0].best)
        html = render(systems, manifest, arguments.split, rows, groups, photos)
        write_atomic(new / "report.html", html)
        content = {
            "format": FORMAT,
            "report": [folder.as_posix() for folder in folders],
            "data": manifest.name,
            "split": arguments.split,
        }
        write_atomic(new / "report.json", json.dumps(content, ensure_ascii=False) + "\n")
    print(f"{out / 'report.html'}: {len(rows)} photos, {len(html.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
