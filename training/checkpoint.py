"""A checkpoint is a folder that describes itself: `model.safetensors`, `config.json`,
`tokenizer.json`. It is loaded strictly, weights only, and written whole or not at all."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from handler.caption_tokenizer import CaptionTokenizer
from handler.captioner import Captioner, read_config
from handler.errors import UserError
from handler.files import FORMAT, FolderKind, write_atomic
from training.model import CaptioningModel, DecoderConfig, EncoderConfig

CHECKPOINTS = Path("build/checkpoints")
WEIGHTS_FILE = "model.safetensors"
# What training keeps there for `--resume`, and what it logs.
STATE_FILE, LOG_FILE = "train_state.pt", "metrics.jsonl"
# All that training and import ever write, or wrote in version 1.0, into a run's folder.
CHECKPOINT = FolderKind(
    "a checkpoint",
    "config.json",
    ("model", "preprocessing", "tokenizer", "training"),
    (WEIGHTS_FILE, "config.json", "tokenizer.json", STATE_FILE, LOG_FILE, "tensorboard"),
    sure=(STATE_FILE,),  # a run that was interrupted before its first validation
)
# What an import writes: a run that was trained from it is never replaced by another import.
IMPORTED = dataclasses.replace(
    CHECKPOINT,
    name="an imported checkpoint",
    files=(WEIGHTS_FILE, "config.json", "tokenizer.json"),
    sure=(),
)
# The output head is the token embedding (tied), so only one of the two is stored.
TIED = "decoder.head.weight"


def save_checkpoint(
    directory: Path,
    model: CaptioningModel,
    tokenizer: CaptionTokenizer,
    preprocessing: dict[str, Any],
    decoding: dict[str, Any],
    training: dict[str, Any],
) -> None:
    """Writes the folder. The weights come last: where they are new, the rest is too."""
    config = {
        "format": FORMAT,
        "model": {
            "encoder": dataclasses.asdict(model.encoder_config),
            "decoder": dataclasses.asdict(model.decoder_config),
        },
        "preprocessing": preprocessing,
        "tokenizer": {
            "begin_id": tokenizer.begin_id,
            "end_id": tokenizer.end_id,
            "pad_id": tokenizer.pad_id,
            "suppressed_ids": tokenizer.suppressed_ids,
        },
        "decoding": decoding,
        "training": training,
    }
    tokenizer.save(directory / "tokenizer.json")
    write_atomic(directory / "config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name != TIED
    }
    write_atomic(directory / WEIGHTS_FILE, save(state))


def update_training(directory: Path, fields: dict[str, Any]) -> None:
    """Replaces fields of the training section of a checkpoint's `config.json`."""
    config = read_config(directory)
    config["training"] |= fields
    write_atomic(directory / "config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def load_model(directory: Path) -> tuple[CaptioningModel, dict[str, Any], CaptionTokenizer]:
    """The eager model of a checkpoint in evaluation mode, its config and its tokenizer.

    Raises UserError naming the file and what is wrong: a missing or damaged file, a field of the
    config, a parameter too many, too few or of another shape.
    """
    directory = Path(directory)
    config = read_config(directory)
    path = directory / WEIGHTS_FILE
    try:
        encoder = EncoderConfig(**config["model"]["encoder"])
        decoder = DecoderConfig(**config["model"]["decoder"])
        model = CaptioningModel(encoder, decoder)
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{directory / 'config.json'}: field 'model': {error}") from error
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable ({error}); train or import again") from error
    state[TIED] = state.get("decoder.token_embedding.weight", torch.empty(0))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"{path}: does not fit config.json ({reason})") from error
    tokenizer = load_tokenizer(directory, config)
    if tokenizer.vocab_size > decoder.vocab_size:
        raise UserError(
            f"{directory / 'tokenizer.json'}: {tokenizer.vocab_size} entries, but config.json's "
            f"model.decoder.vocab_size is {decoder.vocab_size}"
        )
    return model.eval(), config, tokenizer


def load_tokenizer(directory: Path, config: dict[str, Any]) -> CaptionTokenizer:
    """The tokenizer of the checkpoint that has this config. Raises UserError naming the file."""
    try:
        return CaptionTokenizer.load(directory / "tokenizer.json", **config["tokenizer"])
    except TypeError as error:
        raise UserError(f"{directory / 'config.json'}: field 'tokenizer': {error}") from error


def load_captioner(
    directory: str | Path, device: str = "cpu", threads: int | None = None
) -> Captioner:
    """The eager captioner of a checkpoint: same object, same calls, same answers as an export's."""
    if threads is not None:
        torch.set_num_threads(threads)
    return captioner_of(*load_model(Path(directory)), device)


def captioner_of(
    model: CaptioningModel, config: dict[str, Any], tokenizer: CaptionTokenizer, device: str = "cpu"
) -> Captioner:
    """The captioner of what `load_model` returned."""
    model = model.to(device).requires_grad_(False)
    return Captioner(model.encoder, model.decoder, tokenizer, config, device)
