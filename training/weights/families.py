"""Converts Hugging Face's captioners to our model, from a parsed `config.json` and a state dict;
transformers is not needed. A setting that our model does not support is an error that names the
field."""

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

# Keys are the config's `model_type`.
FAMILIES = {
    "vision-encoder-decoder": VISION_ENCODER_DECODER,
    "blip": BLIP,
    "git": GIT,
    "florence2": FLORENCE,
}


def family_of(config: Config) -> Family:
    """The family of a model. Raises UserError if its `model_type` or its class is not supported."""
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
    """Our encoder and decoder configs from a parsed `config.json`. `image_size` sets the size of
    photos if the encoder supports any size. An absent field has the default of transformers. Raises
    UserError naming a field that is not supported."""
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
    `prompt_ids` is the default prompt of its prompt encoder.

    Raises UserError for a field of the config, as `model_configs` does, and for an unknown or
    missing parameter or one of another shape. The latter messages begin with `where`, the name of
    the file.
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
        raise UserError(f"{where}: the shapes of parameters do not match ({reason})") from error
    _check_fit(encoder, decoder, weights)
    model = CaptioningModel(encoder, decoder)
    fill(where, model, ours, names)
    return model.eval()


def _check_fit(encoder: EncoderShape, decoder: DecoderConfig, weights: Weights) -> None:
    """Raises UserError if the shapes of the weights are not those of the config, before any tensor
    of the config's shapes is allocated."""
    where, tensors = weights.where, len(weights.ours)
    for part, layers in (("encoder", encoder.layers), ("decoder", decoder.layers)):
        if layers > tensors:
            raise UserError(
                f"{where}: parameters are missing: config.json gives the {part} {layers} layers, "
                f"but the file contains only {tensors} tensors"
            )
    try:
        with torch.device("meta"):
            outline = CaptioningModel(encoder, decoder)
    except (ArithmeticError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: config.json has invalid sizes ({reason})") from error
    with warnings.catch_warnings():
        # torch warns that nothing is copied to the meta device; only the shapes are compared.
        warnings.simplefilter("ignore", UserWarning)
        fill(where, outline, weights.ours, weights.names)
