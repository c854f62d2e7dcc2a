"""`BlipForConditionalGeneration` (Li et al. 2022, arXiv:2201.12086), such as
`Salesforce/blip-image-captioning-base`: a ViT, and BERT with cross-attention.

Its `generate` ignores the generation config: it uses one beam and 20 new tokens, starts with the
`bos_token_id` of the text config, which is not an entry of the tokenizer, and ends with
`sep_token_id`, not with `eos_token_id`.
"""

from training.model import DecoderConfig, EncoderConfig
from training.weights.family import Config, Family, Weights
from training.weights.fields import Section
from training.weights.rename import Names
from training.weights.text import bert_head_names, bert_names, bert_shape, tie_head

LAYER, BLOCK = "vision_model.encoder.layers.{i}", "encoder.blocks.{i}"
NAMES: Names = (
    ("vision_model.embeddings.class_embedding", "encoder.prefix"),
    ("vision_model.embeddings.position_embedding", "encoder.positions"),
    ("vision_model.embeddings.patch_embedding.{p}", "encoder.patch_embed.{p}"),
    (f"{LAYER}.layer_norm1.{{p}}", f"{BLOCK}.norm1.{{p}}"),
    (f"{LAYER}.self_attn.qkv.{{p}}", f"{BLOCK}.attention.qkv.{{p}}"),
    (f"{LAYER}.self_attn.projection.{{p}}", f"{BLOCK}.attention.out.{{p}}"),
    (f"{LAYER}.layer_norm2.{{p}}", f"{BLOCK}.norm2.{{p}}"),
    (f"{LAYER}.mlp.fc1.{{p}}", f"{BLOCK}.mlp.up.{{p}}"),
    (f"{LAYER}.mlp.fc2.{{p}}", f"{BLOCK}.mlp.down.{{p}}"),
    ("vision_model.post_layernorm.{p}", "encoder.norm.{p}"),
    *bert_names("text_decoder.bert"),
    *bert_head_names("text_decoder.cls.predictions"),
)


def _configs(config: Config) -> tuple[EncoderConfig, DecoderConfig]:
    vision, text = Section(config, "vision_config"), Section(config, "text_config")
    encoder = EncoderConfig(
        width=vision.value("hidden_size", 768),
        layers=vision.value("num_hidden_layers", 12),
        heads=vision.value("num_attention_heads", 12),
        mlp_width=vision.value("intermediate_size", 3072),
        image_size=vision.side("image_size", 384),
        patch_size=vision.side("patch_size", 16),
        activation=vision.activation("hidden_act", "gelu"),
        layer_norm_eps=vision.value("layer_norm_eps", 1e-5),
    )
    text.demand("is_decoder", True)
    text.demand("tie_word_embeddings", True)
    decoder = bert_shape(
        text,
        vocab_size=text.value("vocab_size", 30524),
        heads=text.value("num_attention_heads", 8),
        memory_width=encoder.width,  # transformers overrides `encoder_hidden_size` with it
        dropout=text.value("hidden_dropout_prob", 0.0),
        head_transform=True,
    )
    return encoder, decoder


def _arrange(config: Config, weights: Weights, *_: EncoderConfig | DecoderConfig) -> None:
    tie_head(Section(config, "text_config"), weights, True)


def _generation(config: Config, stored: Config | None) -> Config:
    text = Section(config, "text_config")
    return {
        "bos_token_id": text.value("bos_token_id", 30522),
        "eos_token_id": text.value("sep_token_id", 102),
        "pad_token_id": text.value("pad_token_id", 0),
    }


BLIP = Family(
    architecture="BlipForConditionalGeneration",
    configs=_configs,
    names=lambda _: NAMES,
    arrange=_arrange,
    generation=_generation,
)
