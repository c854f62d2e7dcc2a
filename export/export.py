"""`python -m export.export`, behind `make export`: a checkpoint -> `encoder.pt` (traced),
`decoder.pt` (scripted), `config.json`, `tokenizer.json`.

The bundle is built beside its place, loaded again, and compared with the eager model; only then
does it take its place. A bundle that fails leaves nothing behind, and an older one stays.
"""

import hashlib
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from export.script_decoder import script_decoder
from export.trace_encoder import trace_encoder
from export.verify import verify_captions, verify_numbers
from handler.captioner import Captioner
from handler.errors import ArgumentParser, UserError, run_command
from training.checkpoint import WEIGHTS_FILE, load_captioner, load_model
from training.data.manifest import read_manifest
from training.dataset import read_photo
from training.train import data_folder

# Enough to see a difference, few enough to wait for; with fewer photos than that, all of them.
VERIFIED_PHOTOS = 200


def export_checkpoint(checkpoint: Path, out: Path, data: str | None = None) -> dict[str, Any]:
    """Exports in fp32 and returns the written config. `data` names the dataset whose validation
    photos are compared, by default the one it was trained on, where that is still there; random
    images stand in for it otherwise. Raises UserError, and then writes nothing."""
    model, config, tokenizer = load_model(checkpoint)
    weights = (checkpoint / WEIGHTS_FILE).read_bytes()
    eager = load_captioner(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        with warnings.catch_warnings():
            # torch announces a successor of TorchScript that TorchServe cannot load.
            warnings.simplefilter("ignore", DeprecationWarning)
            trace_encoder(model.encoder, eager.preprocessing.image_size).save(
                str(stage / "encoder.pt")
            )
            script_decoder(model.decoder).save(str(stage / "decoder.pt"))
        tokenizer.save(stage / "tokenizer.json")
        config["name"] = checkpoint.name
        config["precision"] = "fp32"
        config["checkpoint"] = "sha256:" + hashlib.sha256(weights).hexdigest()
        _write_config(stage, config)
        exported = Captioner.load(stage)
        difference = verify_numbers(eager, exported)
        images, source = _validation_images(config, eager, data)
        compared = verify_captions(eager, exported, images)
        config["verified"] = {
            "against": "eager",
            "photos": compared,
            "source": source,
            "identical_captions": 1.0,
            "largest_difference": difference,
        }
        _write_config(stage, config)
        stage.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        stage.rename(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return config


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _validation_images(
    config: dict[str, Any], captioner: Captioner, data: str | None
) -> tuple[list[torch.Tensor], str]:
    name = data or config.get("training", {}).get("config", {}).get("data")
    if name is not None and (data is not None or data_folder(name).exists()):
        manifest = read_manifest(data_folder(name))
        rows = manifest.split("val")[:VERIFIED_PHOTOS]
        return [captioner.preprocess(read_photo(manifest, row)) for row in rows], f"{name} val"
    generator = torch.Generator().manual_seed(0)
    size = captioner.preprocessing.image_size
    return list(torch.randn(8, 3, size, size, generator=generator)), "random images"


def main() -> None:
    parser = ArgumentParser(prog="export.export", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--out", type=Path, help="default build/export/NAME")
    parser.add_argument("--precision", default="fp32", choices=("fp32",))
    parser.add_argument("--data", help="dataset whose val photos are compared")
    arguments = parser.parse_args()
    if not arguments.checkpoint.is_dir():
        raise UserError(f"{arguments.checkpoint}: no such folder; train first, or give CHECKPOINT=")
    out = arguments.out or Path("build/export") / arguments.checkpoint.name
    config = export_checkpoint(arguments.checkpoint, out, arguments.data)
    verified = config["verified"]
    print(
        f"{out}: {config['precision']}; {verified['photos']} captions ({verified['source']}) "
        f"as the eager model's; numbers within {verified['largest_difference']:.1e}"
    )


if __name__ == "__main__":
    run_command(main)
