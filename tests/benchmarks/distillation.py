"""What a student costs and says, beside its teachers: size, milliseconds a photo, scores.

    python -m tests.benchmarks.distillation --teachers DIR [DIR ...] --students DIR [DIR ...]

Folders of checkpoints or of exports. Several teachers that are checkpoints also stand as the
ensemble that they teach as. Timed are real photos, one at a time, from their bytes to the caption,
and the encoder's part of that, all models taking turns; scored is the validation split of the
first student's dataset (--data: another; --photos: fewer), each with its own decoding defaults.
"""

import argparse
from pathlib import Path

import torch

from handler.captioner import Captioner
from tests.benchmarks.timing import machine, medians, report, table
from training.checkpoint import load_captioner
from training.data.photos import read_bytes
from training.evaluate import model_size
from training.loop.teachers import ensemble_captioner
from training.scores.captions import caption_rows, dataset_of
from training.scores.metrics import score

TIMED_PHOTOS = 4


def is_checkpoint(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def load(folders: list[Path]) -> tuple[dict[str, Captioner], dict[str, dict[str, float]]]:
    """Captioners and their sizes, by name."""
    captioners, sizes = {}, {}
    for folder in folders:
        captioner = (load_captioner if is_checkpoint(folder) else Captioner.load)(folder)
        captioners[folder.as_posix()] = captioner
        sizes[folder.as_posix()] = model_size(captioner, folder)
    return captioners, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teachers", type=Path, nargs="+", required=True)
    parser.add_argument("--students", type=Path, nargs="+", required=True)
    parser.add_argument("--data", help="default: the first student's")
    parser.add_argument("--photos", type=int, help="of the validation split, default: all")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    teachers: list[Path] = arguments.teachers
    captioners, sizes = load([*teachers, *arguments.students])
    if len(teachers) > 1 and all(map(is_checkpoint, teachers)):
        captioners["the teachers as one"] = ensemble_captioner(teachers)
    student = arguments.students[0]
    manifest = dataset_of(captioners[student.as_posix()], student, arguments.data)
    rows = manifest.split("val")[: arguments.photos]
    references = {row.id: row.captions for row in rows}
    photos = [read_bytes(manifest, row) for row in rows[:TIMED_PHOTOS]]
    images = {
        name: torch.stack([captioner.preprocess(photo) for photo in photos])
        for name, captioner in captioners.items()
    }

    whole = medians(
        {n: lambda c=c: [c.caption([photo]) for photo in photos] for n, c in captioners.items()},
        arguments.rounds,
    )
    encoding = medians(
        {
            n: lambda n=n, c=c: [c.encode(image) for image in images[n].split(1)]
            for n, c in captioners.items()
        },
        arguments.rounds,
    )
    figures, lines = {}, []
    first = whole[teachers[0].as_posix()]
    for name, captioner in captioners.items():
        said = caption_rows(captioner, manifest, rows, num_return_sequences=1)
        scores = score({key: best[0] for key, best in said.items()}, references, ("bleu", "cider"))
        figures[name] = {
            **sizes.get(name, {}),
            "ms": 1000 * whole[name] / len(photos),
            "ms_encoder": 1000 * encoding[name] / len(photos),
            **{metric: float(scores[metric]) for metric in ("BLEU-4", "CIDEr")},
        }
        found = figures[name]
        lines.append([
            name,
            f"{found['parameters'] / 1e6:.2f}" if "parameters" in found else "",
            f"{found['megabytes']:.1f}" if "megabytes" in found else "",
            f"{found['ms']:.1f}", f"{found['ms_encoder']:.1f}", f"{first / whole[name]:.2f}",
            f"{found['BLEU-4']:.3f}", f"{found['CIDEr']:.3f}",
        ])  # fmt: skip
    title = f"{manifest.name}, {len(rows)} photos, {arguments.rounds} rounds. {machine()}"
    header = (
        *("model", "million parameters", "MB", "ms a photo", "of which encoder"),
        *("times the first", "BLEU-4", "CIDEr"),
    )
    report(f"distillation-{student.name}", f"{title}\n\n{table(header, lines)}\n", figures)


if __name__ == "__main__":
    main()
