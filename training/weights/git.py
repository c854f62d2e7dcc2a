"""`GitForCausalLM` (Wang et al. 2022, arXiv:2205.14100), such as `microsoft/git-base-coco`: CLIP's
ViT, a projection, and BERT's layers over image tokens and text."""

from handler.errors import UserError
from training.model import DecoderConfig, EncoderConfig
from training.weights.family import Config, Family, Weights
from training.weights.fields import Section
from training.weights.generation import stored_or_legacy
from training.weights.rename import Names
from training.weights.text import bert_names, bert_shape, tie_head
from training.weights.vision import arrange_clip, clip_config, clip_names

PROJECTION = "git.visual_projection.visual_projection"
NAMES: Names = (
    *clip_names("git.image_encoder.vision_model.", final_norm="encoder.norm.{p}"),
    (f"{PROJECTION}.0.{{p}}", "encoder.projection.0.{p}"),
    (f"{PROJECTION}.1.{{p}}", "encoder.projection.1.{p}"),
    *bert_names("git"),
    ("output.{p}", "decoder.head.{p}"),
)
# Defaults for fields that config.json does not have.
IDS = {"bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0}


def _configs(config: Config) -> tuple[EncoderConfig, DecoderConfig]:
    text, vision = Section(config), Section(config, "vision_config")
    if config.get("num_image_with_embedding") is not None:
        raise UserError(
            f"field 'num_image_with_embedding' is {config['num_image_with_embedding']!r}: a GIT "
            "for videos cannot be imported"
        )
    width = text.value("hidden_size", 768)
    # Unlike in CLIP, `post_layernorm` is applied to all tokens.
    encoder = clip_config(vision, patch_size=16, final_norm=True, projection_width=width)
    decoder = bert_shape(
        text,
        layers=text.value("num_hidden_layers", 6),
        max_positions=text.value("max_position_embeddings", 1024),
        memory="prefix",
        memory_width=width,
        tied_head=text.value("tie_word_embeddings", False),
    )
    return encoder, decoder


def _arrange(
    config: Config, weights: Weights, encoder: EncoderConfig, decoder: DecoderConfig
) -> None:
    arrange_clip(weights, encoder)
    tie_head(Section(config), weights, False)


def _generation(config: Config, stored: Config | None) -> Config:
    generation = dict(stored_or_legacy(stored, IDS, config))
    generation.pop("decoder_start_token_id", None)  # only used by models with a text encoder
    return generation


GIT = Family(
    architecture="GitForCausalLM",
    configs=_configs,
    names=lambda _: NAMES,
    arrange=_arrange,
    generation=_generation,
)
