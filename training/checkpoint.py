"""A checkpoint is a folder that describes itself: `model.safetensors`, `config.json`,
`tokenizer.json`. It is loaded strictly, weights only, and written whole or not at all."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from handler.caption_tokenizer import CaptionTokenizer
from handler.captioner import Captioner, check_config, check_device, load_tokenizer, read_config
from handler.errors import UserError
from handler.files import FORMAT, atomic_path, write_atomic
from training.davit import DaViTConfig
from training.folders import WEIGHTS_FILE
from training.model import CaptioningModel, DecoderConfig, EncoderConfig, EncoderShape

# The encoders by the `kind` in their config; a Vision Transformer has none.
ENCODERS: dict[str | None, type[EncoderConfig] | type[DaViTConfig]] = {
    None: EncoderConfig,
    "davit": DaViTConfig,
}
# Where the output head is the token embedding (tied), only one of the two is stored.
TIED = "decoder.head.weight"
FLOATS = ("F32", "F16", "BF16", "F64")
LARGEST = 2**31 - 1  # of any number in the model's config


def save_checkpoint(
    directory: Path,
    model: CaptioningModel,
    tokenizer: CaptionTokenizer,
    preprocessing: dict[str, Any],
    decoding: dict[str, Any],
    training: dict[str, Any],
    word_maps: dict[str, Any] | None = None,
    total_lengths: Sequence[str] = (),
) -> None:
    """Writes the folder. The weights are written first and take their place last: a full disk is
    met before anything is replaced, and where the weights are new, the rest is too."""
    config = {
        "format": FORMAT,
        "model": {
            "encoder": dataclasses.asdict(model.encoder_config),
            "decoder": dataclasses.asdict(model.decoder_config),
        },
        "preprocessing": preprocessing,
        "tokenizer": tokenizer.settings,
        "decoding": decoding,
        **({"total_lengths": list(total_lengths)} if total_lengths else {}),
        **({} if word_maps is None else {"word_maps": word_maps}),
        "training": training,
    }
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == TIED and model.decoder_config.tied_head)
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    with atomic_path(directory / WEIGHTS_FILE) as weights:
        weights.write_bytes(save(state))
        tokenizer.save(directory / "tokenizer.json")
        write_atomic(directory / "config.json", text)


def update_training(directory: Path, fields: dict[str, Any]) -> None:
    """Replaces fields of the training section of a checkpoint's `config.json`."""
    config = read_config(directory)
    config["training"] |= fields
    write_atomic(directory / "config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def refuse_export(directory: Path, config: dict[str, Any]) -> None:
    if "precision" in config:
        raise UserError(
            f"{directory}: this is an export; give the checkpoint that it was made from"
        )


def load_model(directory: Path) -> tuple[CaptioningModel, dict[str, Any], CaptionTokenizer]:
    """The eager model of a checkpoint in evaluation mode, its config and its tokenizer.

    Raises UserError naming the file and what is wrong: a missing or damaged file, a field of the
    config, a parameter too many, too few or of another shape.
    """
    directory = Path(directory)
    config = read_config(directory)
    check_config(directory, config)
    refuse_export(directory, config)
    path = directory / WEIGHTS_FILE
    shapes = read_shapes(path)
    encoder, decoder = _model_configs(directory, config, tensors=len(shapes))
    # On the meta device nothing is allocated, whatever sizes the config gives.
    with torch.device("meta"):
        expected = _build(directory, encoder, decoder).state_dict()
    if decoder.tied_head:
        del expected[TIED]
    _check_shapes(path, shapes, {name: list(t.shape) for name, t in expected.items()})
    tokenizer = load_tokenizer(directory, config)
    model = _build(directory, encoder, decoder)
    try:
        state = load_file(path)
        if broken := next((name for name, tensor in state.items() if tensor.isnan().any()), None):
            raise UserError(
                f"{path}: {broken} has values that are no numbers; train or import again"
            )
        if decoder.tied_head:
            state[TIED] = state["decoder.token_embedding.weight"]
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: not readable ({error}); train or import again") from error
    return model.eval(), config, tokenizer


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of every tensor of a safetensors file, from its header alone. Raises UserError for
    a damaged file, and for tensors that are no floating-point numbers."""
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: part.get_shape() for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable ({error}); train or import again") from error
    if wrong := [name for name, kind in kinds.items() if kind not in FLOATS]:
        raise UserError(f"{path}: {wrong[0]} is of type {kinds[wrong[0]]}, not {FLOATS[0]}")
    return shapes


def encoder_config(section: dict[str, Any]) -> EncoderShape:
    """The encoder's config from its section of a `config.json`. Raises UserError, or TypeError for
    a field that it does not have."""
    kind = section.get("kind")
    if not isinstance(kind, str | None) or kind not in ENCODERS:
        raise UserError(f"encoder.kind is {kind!r}; only 'davit' is known, or none for a ViT")
    return ENCODERS[kind](**section)


def _model_configs(
    directory: Path, config: dict[str, Any], tensors: int
) -> tuple[EncoderShape, DecoderConfig]:
    """The shapes in the config, none of more layers than the weights have tensors: even empty
    layers take time and memory."""
    path = directory / "config.json"
    for part in ("encoder", "decoder"):
        section = config["model"][part]
        for name, value in section.items():
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(n, int | float) and not 0 <= n <= LARGEST for n in numbers):
                raise UserError(f"{path}: field 'model.{part}.{name}' is out of range")
    try:
        encoder = encoder_config(config["model"]["encoder"])
        decoder = DecoderConfig(**config["model"]["decoder"])
        layers = encoder.layers + decoder.layers + decoder.prompt_layers
    except (ArithmeticError, TypeError, UserError) as error:
        raise UserError(f"{path}: field 'model': {error}") from error
    if layers > tensors:
        raise UserError(
            f"{path}: field 'model' gives {layers} layers, but {WEIGHTS_FILE} holds {tensors} "
            "tensors"
        )
    return encoder, decoder


def _build(directory: Path, encoder: EncoderShape, decoder: DecoderConfig) -> CaptioningModel:
    try:
        return CaptioningModel(encoder, decoder)
    # Sizes of other types, or whose product is beyond what torch can count.
    except (ArithmeticError, RuntimeError, TypeError, UserError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{directory / 'config.json'}: field 'model': {reason}") from error


def _check_shapes(path: Path, shapes: dict[str, list[int]], expected: dict[str, list[int]]) -> None:
    """Refuses weights with a tensor too many, too few or of another shape than the model's."""
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            stored, wanted = (
                f"has shape {given[name]}" if name in given else "is missing"
                for given in (shapes, expected)
            )
            raise UserError(
                f"{path}: does not fit config.json ({name} {stored} in the file and {wanted} in "
                "the model)"
            )


def load_captioner(
    directory: str | Path, device: str = "cpu", threads: int | None = None
) -> Captioner:
    """The eager captioner of a checkpoint: same object, same calls, same answers as an export's."""
    check_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    return captioner_of(*load_model(Path(directory)), device)


def captioner_of(
    model: CaptioningModel, config: dict[str, Any], tokenizer: CaptionTokenizer, device: str = "cpu"
) -> Captioner:
    """The captioner of what `load_model` returned."""
    model = model.to(device).requires_grad_(False)
    return Captioner(model.encoder, model.decoder, tokenizer, config, device)
