"""`VisionEncoderDecoderModel`: any encoder of `training.weights.vision` with any decoder of
`training.weights.text`, such as `nlpconnect/vit-gpt2-image-captioning`.

If the width of the memory differs from the decoder's, the model projects it. The projection is
folded into the key and value layers of cross-attention.
"""

from training.model import DecoderConfig, EncoderConfig
from training.weights.family import Config, Family, Weights, kind_of
from training.weights.fields import Section
from training.weights.generation import stored_or_legacy
from training.weights.rename import Names
from training.weights.text import DECODERS, Text
from training.weights.vision import CLIP, ENCODERS, Vision


def _kinds(config: Config) -> tuple[Vision, Text]:
    encoder, decoder = Section(config, "encoder"), Section(config, "decoder")
    return kind_of(encoder, ENCODERS), kind_of(decoder, DECODERS)


def _configs(config: Config) -> tuple[EncoderConfig, DecoderConfig]:
    vision, text = _kinds(config)
    encoder = vision.config(Section(config, "encoder"))
    return encoder, text.config(Section(config, "decoder"), encoder.width)


def _names(config: Config) -> Names:
    vision, text = _kinds(config)
    # In older files, CLIP's names have one more prefix.
    older = vision.names("encoder.vision_model.") if vision is CLIP else ()
    projection = (("enc_to_dec_proj.{p}", "projection.{p}"),)
    return (*vision.names("encoder."), *older, *projection, *text.names)


def _arrange(
    config: Config, weights: Weights, encoder: EncoderConfig, decoder: DecoderConfig
) -> None:
    vision, text = _kinds(config)
    vision.arrange(weights, encoder)
    text.arrange(Section(config, "decoder"), weights)
    if encoder.width != decoder.width:
        _fold_projection(weights, decoder.layers)


def _fold_projection(weights: Weights, layers: int) -> None:
    """Folds the projection into the key and value layers, which alone read the memory. This is
    exact: K (W x + b) + c = (K W) x + (K b + c)."""
    weight_DM, bias_D = weights.take("projection.weight", "projection.bias")
    for i in range(layers):
        name = f"decoder.blocks.{i}.cross_attention.kv"
        kv_weight, kv_bias = weights.take(f"{name}.weight", f"{name}.bias")
        kv = kv_weight.double()
        weights.ours[f"{name}.weight"] = (kv @ weight_DM.double()).float()
        weights.ours[f"{name}.bias"] = (kv @ bias_D.double() + kv_bias.double()).float()


def _generation(config: Config, stored: Config | None) -> Config:
    return stored_or_legacy(stored, config["decoder"], config)


VISION_ENCODER_DECODER = Family(
    architecture="VisionEncoderDecoderModel",
    configs=_configs,
    names=_names,
    arrange=_arrange,
    generation=_generation,
    free_size=lambda config: _kinds(config)[0].free_size,
)
