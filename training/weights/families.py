"""Hugging Face's captioners as ours, from a parsed `config.json` and a state dict; transformers
itself is not needed. What cannot be represented exactly is refused by the name of its field."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from handler.errors import UserError
from training.model import CaptioningModel, DecoderConfig, EncoderShape
from training.weights.blip import BLIP
from training.weights.family import Config, Family, Weights
from training.weights.florence import FLORENCE
from training.weights.git import GIT
from training.weights.rename import fill, rename
from training.weights.vision_encoder_decoder import VISION_ENCODER_DECODER

# By the config's `model_type`.
FAMILIES = {
    "vision-encoder-decoder": VISION_ENCODER_DECODER,
    "blip": BLIP,
    "git": GIT,
    "florence2": FLORENCE,
}


def family_of(config: Config) -> Family:
    """Raises UserError for a kind of model, or another class of it, that cannot be imported."""
    known = ", ".join(family.architecture for family in FAMILIES.values())
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"field 'model_type' is {kind!r}; only {known} can be imported")
    family = FAMILIES[kind]
    names = config.get("architectures")
    if isinstance(names, list) and names and family.architecture not in names:
        raise UserError(f"field 'architectures' is {names[0]!r}; only {known} can be imported")
    return family


def model_configs(
    config: Config, image_size: int | None = None
) -> tuple[EncoderShape, DecoderConfig]:
    """Our shapes from a parsed `config.json`, for photos of `image_size` pixels where the encoder
    takes any. Raises UserError naming the field that does not fit; a field that is absent has the
    value that transformers gives it."""
    family = family_of(config)
    encoder, decoder = family.configs(config)
    if image_size is not None and family.free_size(config):
        encoder = replace(encoder, image_size=image_size)
    return encoder, decoder


@torch.no_grad()
def import_model(
    config: Config,
    state: Mapping[str, Tensor],
    where: str,
    image_size: int | None = None,
    prompt_ids: Sequence[int] = (),
) -> CaptioningModel:
    """Our model, in evaluation mode and float32, from a parsed `config.json` and a state dict.
    `prompt_ids` is the prompt that its prompt encoder reads where none is given.

    Raises UserError: for a field of the config as `model_configs` does, and for a parameter too
    many, too few or of another shape, beginning with `where` (the file that they are from).
    """
    family = family_of(config)
    encoder, decoder = model_configs(config, image_size)
    decoder = replace(decoder, prompt_ids=tuple(prompt_ids))
    names = family.names(config)
    ours = {name: t.float() for name, t in rename(where, state, names).items()}
    weights = Weights(ours, names, where)
    try:
        weights.join_heads()
        family.arrange(config, weights, encoder, decoder)
    except (IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: parameters whose shapes do not fit ({reason})") from error
    _check_fit(encoder, decoder, weights)
    model = CaptioningModel(encoder, decoder)
    fill(where, model, ours, names)
    return model.eval()


def _check_fit(encoder: EncoderShape, decoder: DecoderConfig, weights: Weights) -> None:
    """Refuses weights of other sizes than the config's before anything of those is allocated."""
    where, tensors = weights.where, len(weights.ours)
    for part, layers in (("encoder", encoder.layers), ("decoder", decoder.layers)):
        if layers > tensors:
            raise UserError(
                f"{where}: config.json gives the {part} {layers} layers; there are parameters "
                f"missing, the file holds {tensors}"
            )
    try:
        with torch.device("meta"):
            outline = CaptioningModel(encoder, decoder)
    except (ArithmeticError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: config.json's sizes are impossible ({reason})") from error
    with warnings.catch_warnings():
        # Nothing is copied onto the meta device, which torch warns of; the shapes are compared.
        warnings.simplefilter("ignore", UserWarning)
        fill(where, outline, weights.ours, weights.names)
