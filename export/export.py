"""`python -m export.export`, behind `make export`: converts a checkpoint to `encoder.pt` (traced),
`decoder.pt` (scripted), `config.json` and `tokenizer.json`.

The export is written beside its final location, loaded again, and compared with the eager model;
only then is it moved there. If it fails, an older export is unchanged.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.precision import WAYS, in_precision, ways
from export.torchscript import script_decoder, trace_encoder
from export.verify import FLOORS, ValidationPhotos, captions_of, verify
from handler.captioner import EXPORT_FILES, Captioner
from handler.errors import ArgumentParser, UserError, run_command
from handler.files import FORMAT, FolderKind, as_utf8, check_replaceable, replace_folder
from training.checkpoint import captioner_of, load_model
from training.data.manifest import Manifest, Row, data_folder, read_manifest
from training.data.photos import read_bytes, read_photo, stamp
from training.folders import WEIGHTS_FILE
from training.model import CaptioningModel

# Most photos that are compared: all of Flickr8k's, and a minute or two of COCO's.
VERIFIED_PHOTOS = 1000


# The files of an export; nothing else is replaced.
EXPORT = FolderKind("an export", "config.json", ("checkpoint", "precision", "parts"), EXPORT_FILES)


def export_checkpoint(
    checkpoint: Path, out: Path, precision: str = "fp32", data: str | None = None
) -> dict[str, Any]:
    """Exports in `precision` (`auto`: the fastest for this processor) and in the fastest way that
    keeps the captions (`export.verify.FLOORS`); returns the written config. The validation photos
    of the dataset `data` are compared. The default is the dataset of the training or, if it or
    its photos no longer exist, random images. Raises UserError; nothing is written then."""
    check_replaceable(out, EXPORT, [checkpoint])
    model, config, tokenizer = load_model(checkpoint)
    digest = hashlib.sha256((checkpoint / WEIGHTS_FILE).read_bytes()).hexdigest()
    config |= {"format": FORMAT, "name": as_utf8(checkpoint.name), "checkpoint": f"sha256:{digest}"}
    eager = captioner_of(model, config, tokenizer)
    photos = _validation_photos(config, eager, data)
    expected = captions_of(eager, photos.images, "captions of the checkpoint")
    with replace_folder(out, EXPORT, [checkpoint]) as new:
        tokenizer.save(new / "tokenizer.json")
        *rough, finest = ways(precision)
        for way in [*rough, finest]:
            written = {**config, "precision": way[0]}
            written["parts"] = {"encoder": way[1], "decoder": way[2]}
            _write_scripts(in_precision(model, *way[1:]), eager.preprocessing.image_size, new)
            _write_config(new, written)
            try:
                verified = verify(eager, Captioner.load(new), photos, expected, way[0])
            except UserError as error:  # large differences; a finer way may have smaller ones
                if way is finest:
                    raise
                print(f"{described(written)}: {error}; trying the next way", flush=True)
                continue
            if verified["kept"] or way is finest:
                break
            print(f"{described(written)}: {told(verified)}; trying the next way", flush=True)
        written["verified"] = verified
        _write_config(new, written)
    return written


def _write_scripts(model: CaptioningModel, image_size: int, folder: Path) -> None:
    with warnings.catch_warnings():
        # torch recommends a successor of TorchScript, which TorchServe cannot load.
        warnings.simplefilter("ignore", DeprecationWarning)
        scripts = {
            "encoder.pt": trace_encoder(model.encoder, image_size),
            "decoder.pt": script_decoder(model.decoder),
        }
        for name, script in scripts.items():
            # Not saved to a path: on a full disk, torch would abort the process.
            (folder / name).write_bytes(script.save_to_buffer())


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


class _Photos(Sequence[Tensor]):
    """Preprocessed photos, read when they are asked for: a thousand of 768 pixels take 7 GB."""

    def __init__(self, captioner: Captioner, manifest: Manifest, rows: Sequence[Row]) -> None:
        self.captioner, self.manifest, self.rows = captioner, manifest, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        return self.captioner.preprocess(read_photo(self.manifest, self.rows[number]))


def _validation_photos(
    config: dict[str, Any], captioner: Captioner, data: str | None
) -> ValidationPhotos:
    name = data or config.get("training", {}).get("config", {}).get("data")
    manifest = None
    if name is not None and (data is not None or data_folder(name).exists()):
        try:
            manifest = read_manifest(data_folder(name))
            rows = manifest.split("val")[:VERIFIED_PHOTOS]
            if data is None:
                _check_present(manifest, rows)
        except UserError as error:  # the photos of the training may have gone since
            if data is not None:
                raise
            manifest = None
            print(f"{error}; random images are compared instead", file=sys.stderr)
    if manifest is not None:
        images = _Photos(captioner, manifest, rows)
        return ValidationPhotos(f"{manifest.name} val", images, [row.captions for row in rows])
    generator = torch.Generator().manual_seed(0)
    size = captioner.preprocessing.image_size
    random = list(torch.randn(8, 3, size, size, generator=generator))
    return ValidationPhotos("random images", random, None)


def _check_present(manifest: Manifest, rows: Sequence[Row]) -> None:
    """Raises UserError if the file of a photo is missing or the server of the first one is away."""
    for row in rows:
        stamp(manifest, row)
    for row in rows[:1]:
        read_bytes(manifest, row)


def described(config: dict[str, Any]) -> str:
    """The precision and the data types of the parts."""
    parts = config["parts"]
    return f"{config['precision']} (encoder {parts['encoder']}, decoder {parts['decoder']})"


def told(verified: dict[str, Any]) -> str:
    """The result of the comparison in one line."""
    line = f"{verified['identical_captions']:.1%} of {verified['photos']} captions "
    line += f"({verified['source']}) identical to the eager model's"
    if "cider" in verified:
        line += f", CIDEr {verified['cider']:.4f} instead of {verified['cider_eager']:.4f}"
    return f"{line}; largest difference of numbers {verified['largest_difference']:.1e}"


def main() -> None:
    parser = ArgumentParser(prog="export.export", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--out", type=Path, help="default build/export/NAME[-PRECISION]")
    parser.add_argument("--precision", default="fp32", choices=(*WAYS, "auto"))
    parser.add_argument("--data", help="dataset whose validation photos are compared")
    arguments = parser.parse_args()
    if not arguments.checkpoint.is_dir():
        raise UserError(f"{arguments.checkpoint}: no such folder; train first, or set CHECKPOINT=")
    name = arguments.checkpoint.resolve().name
    if arguments.precision != "fp32":
        name += f"-{arguments.precision}"
    out = arguments.out or Path("build/export") / name
    config = export_checkpoint(arguments.checkpoint, out, arguments.precision, arguments.data)
    verified = config["verified"]
    print(f"{as_utf8(str(out))}: {described(config)}; {told(verified)}")
    if not verified["kept"]:
        least, loss = FLOORS[config["precision"]]
        print(
            f"warning: {config['precision']} should keep {least:.0%} of the captions and lose at "
            f"most {loss:.0%} of CIDEr; use a finer precision, or train the model further"
        )


if __name__ == "__main__":
    run_command(main)
