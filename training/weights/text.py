"""Converts Hugging Face's text decoders: GPT-2, BERT and RoBERTa, and the parts of BERT that BLIP
and GIT contain."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from handler.errors import UserError
from training.model import DecoderConfig
from training.weights.family import Weights
from training.weights.fields import Section
from training.weights.rename import Names


@dataclass(frozen=True)
class Text:
    """One kind of decoder of a VisionEncoderDecoderModel: a function from a section of the config
    and the memory's width to our config, the table of names, and a function that converts the
    renamed tensors."""

    config: Callable[[Section, int], DecoderConfig]
    names: Names
    arrange: Callable[[Section, Weights], None]


BLOCK = "decoder.transformer.h.{i}"
GPT2_NAMES: Names = (
    ("decoder.transformer.wte.weight", "decoder.token_embedding.weight"),
    ("decoder.transformer.wpe.weight", "decoder.position_embedding.weight"),
    (f"{BLOCK}.ln_1.{{p}}", "decoder.blocks.{i}.norm1.{p}"),
    (f"{BLOCK}.attn.c_attn.{{p}}", "decoder.blocks.{i}.self_attention.qkv.{p}"),
    (f"{BLOCK}.attn.c_proj.{{p}}", "decoder.blocks.{i}.self_attention.out.{p}"),
    (f"{BLOCK}.ln_cross_attn.{{p}}", "decoder.blocks.{i}.norm2.{p}"),
    (f"{BLOCK}.crossattention.q_attn.{{p}}", "decoder.blocks.{i}.cross_attention.q.{p}"),
    (f"{BLOCK}.crossattention.c_attn.{{p}}", "decoder.blocks.{i}.cross_attention.kv.{p}"),
    (f"{BLOCK}.crossattention.c_proj.{{p}}", "decoder.blocks.{i}.cross_attention.out.{p}"),
    (f"{BLOCK}.ln_2.{{p}}", "decoder.blocks.{i}.norm3.{p}"),
    (f"{BLOCK}.mlp.c_fc.{{p}}", "decoder.blocks.{i}.mlp.up.{p}"),
    (f"{BLOCK}.mlp.c_proj.{{p}}", "decoder.blocks.{i}.mlp.down.{p}"),
    # Causal masks, which are buffers in old checkpoints.
    (f"{BLOCK}.attn.bias", ""),
    (f"{BLOCK}.attn.masked_bias", ""),
    (f"{BLOCK}.crossattention.bias", ""),
    (f"{BLOCK}.crossattention.masked_bias", ""),
    ("decoder.transformer.ln_f.{p}", "decoder.norm.{p}"),
    ("decoder.lm_head.weight", "decoder.head.weight"),
)


def _gpt2_config(section: Section, memory_width: int) -> DecoderConfig:
    width = section.value("n_embd", 768)
    section.demand("scale_attn_weights", True)
    section.demand("scale_attn_by_inverse_layer_idx", False)
    # reorder_and_upcast_attn is ignored: it only changes results in 16 bits.
    _demand_cross_attention(section)
    return DecoderConfig(
        vocab_size=section.value("vocab_size", 50257),
        max_positions=section.value("n_positions", 1024),
        width=width,
        layers=section.value("n_layer", 12),
        heads=section.value("n_head", 12),
        mlp_width=section.value("n_inner", 4 * width),
        memory_width=memory_width,
        activation=section.activation("activation_function", "gelu_new"),
        layer_norm_eps=section.value("layer_norm_epsilon", 1e-5),
        dropout=section.value("resid_pdrop", 0.1),
        tied_head=section.value("tie_word_embeddings", True),
    )


def _demand_cross_attention(section: Section) -> None:
    if not section.value("add_cross_attention", False):
        raise UserError(
            f"field '{section.prefix}add_cross_attention' is not true: this decoder does not use "
            "the photo"
        )


def _arrange_gpt2(section: Section, weights: Weights) -> None:
    for name, tensor in weights.ours.items():
        if name.startswith("decoder.blocks.") and tensor.ndim == 2:
            weights.ours[name] = tensor.T  # GPT-2's Conv1D stores (in, out)
    tie_head(section, weights, True)


def bert_shape(section: Section, **settings: Any) -> DecoderConfig:
    """The config from the fields that all variants of BERT share; `settings` override them."""
    section.demand("position_embedding_type", "absolute")
    shape = {
        "vocab_size": section.value("vocab_size", 30522),
        "max_positions": section.value("max_position_embeddings", 512),
        "width": section.value("hidden_size", 768),
        "layers": section.value("num_hidden_layers", 12),
        "heads": section.value("num_attention_heads", 12),
        "mlp_width": section.value("intermediate_size", 3072),
        "activation": section.activation("hidden_act", "gelu"),
        "layer_norm_eps": section.value("layer_norm_eps", 1e-12),
        "dropout": section.value("hidden_dropout_prob", 0.1),
        "tied_head": section.value("tie_word_embeddings", True),
        "norm": "post",
        "embedding_norm": True,
        "head_bias": True,
    }
    return DecoderConfig(**{**shape, **settings})


def _bert_config(section: Section, memory_width: int) -> DecoderConfig:
    section.demand("is_decoder", True)
    _demand_cross_attention(section)
    return bert_shape(section, memory_width=memory_width, head_transform=True)


def _roberta_config(section: Section, memory_width: int) -> DecoderConfig:
    if section.activation("hidden_act", "gelu") != "gelu":
        section.demand("hidden_act", "gelu")  # its head always uses gelu
    section.demand("is_decoder", True)
    _demand_cross_attention(section)
    positions = section.value("max_position_embeddings", 512) - _first_position(section)
    return bert_shape(
        section,
        memory_width=memory_width,
        head_transform=True,
        vocab_size=section.value("vocab_size", 50265),
        max_positions=positions,
    )


def _first_position(section: Section) -> int:
    return section.value("pad_token_id", 1) + 1


def bert_names(model: str) -> Names:
    """The names of BERT's embeddings and layers; theirs begin with `model`."""
    layer, block = f"{model}.encoder.layer.{{i}}", "decoder.blocks.{i}"
    names = [
        (f"{model}.embeddings.word_embeddings.weight", "decoder.token_embedding.weight"),
        (f"{model}.embeddings.position_embeddings.weight", "decoder.position_embedding.weight"),
        (f"{model}.embeddings.token_type_embeddings.weight", "decoder.token_types"),
        (f"{model}.embeddings.LayerNorm.{{p}}", "decoder.embedding_norm.{p}"),
        (f"{model}.embeddings.position_ids", ""),  # a buffer in old checkpoints
        (f"{model}.embeddings.token_type_ids", ""),
        (f"{layer}.attention.output.dense.{{p}}", f"{block}.self_attention.out.{{p}}"),
        (f"{layer}.attention.output.LayerNorm.{{p}}", f"{block}.post_norm1.{{p}}"),
        (f"{layer}.crossattention.output.dense.{{p}}", f"{block}.cross_attention.out.{{p}}"),
        (f"{layer}.crossattention.output.LayerNorm.{{p}}", f"{block}.post_norm2.{{p}}"),
        (f"{layer}.intermediate.dense.{{p}}", f"{block}.mlp.up.{{p}}"),
        (f"{layer}.output.dense.{{p}}", f"{block}.mlp.down.{{p}}"),
        (f"{layer}.output.LayerNorm.{{p}}", f"{block}.post_norm3.{{p}}"),
    ]
    for theirs, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        names += [
            (f"{layer}.attention.self.{theirs}.{{p}}", f"{block}.self_attention.{letter}.{{p}}"),
            (
                f"{layer}.crossattention.self.{theirs}.{{p}}",
                f"{block}.cross_attention.{letter}.{{p}}",
            ),
        ]
    return tuple(names)


def bert_head_names(head: str) -> Names:
    """The names of BERT's output head; theirs begin with `head`. Its bias occurs twice."""
    return (
        (f"{head}.transform.dense.{{p}}", "decoder.head_transform.dense.{p}"),
        (f"{head}.transform.LayerNorm.{{p}}", "decoder.head_transform.norm.{p}"),
        (f"{head}.bias", "decoder.head.bias"),
        (f"{head}.decoder.{{p}}", "decoder.head.{p}"),
    )


ROBERTA_HEAD_NAMES: Names = (
    ("decoder.lm_head.dense.{p}", "decoder.head_transform.dense.{p}"),
    ("decoder.lm_head.layer_norm.{p}", "decoder.head_transform.norm.{p}"),
    ("decoder.lm_head.bias", "decoder.head.bias"),
    ("decoder.lm_head.decoder.{p}", "decoder.head.{p}"),
)


def _arrange_bert(section: Section, weights: Weights) -> None:
    """Adds the embedding of token type 0, which every token has, to the position embeddings."""
    types, positions = weights.take("decoder.token_types", "decoder.position_embedding.weight")
    weights.ours["decoder.position_embedding.weight"] = positions + types[0]
    tie_head(section, weights, True)


def _arrange_roberta(section: Section, weights: Weights) -> None:
    """Removes the position embeddings up to that of padding, after which a text begins."""
    _arrange_bert(section, weights)
    (positions,) = weights.take("decoder.position_embedding.weight")
    weights.ours["decoder.position_embedding.weight"] = positions[_first_position(section) :]


def tie_head(section: Section, weights: Weights, default: bool) -> None:
    """Sets the output head to the token embedding if the config ties them, or the embedding to the
    head where that alone is stored. If both are, they must be equal; a head that is not tied must
    be stored. Raises UserError otherwise."""
    names = "decoder.token_embedding.weight", "decoder.head.weight"
    embedding, stored = (weights.ours.get(name) for name in names)
    tied = section.value("tie_word_embeddings", default)
    field = f"config.json's field '{section.prefix}tie_word_embeddings' is"
    if tied and stored is None and embedding is not None:
        weights.ours["decoder.head.weight"] = embedding
    elif tied and embedding is None and stored is not None:
        # safetensors stores a shared weight once, under the first of its names.
        weights.ours["decoder.token_embedding.weight"] = stored
    elif stored is None and not tied:
        raise UserError(
            f"{weights.where}: {weights.their('decoder.head.weight')} is missing, and {field} false"
        )
    elif (
        tied and embedding is not None and stored is not None and not torch.equal(stored, embedding)
    ):
        raise UserError(
            f"{weights.where}: {weights.their('decoder.head.weight')} is not "
            f"{weights.their('decoder.token_embedding.weight')}, but {field} true"
        )


# Keys are the config's `model_type`.
DECODERS = {
    "gpt2": Text(_gpt2_config, GPT2_NAMES, _arrange_gpt2),
    "bert": Text(
        _bert_config,
        (*bert_names("decoder.bert"), *bert_head_names("decoder.cls.predictions")),
        _arrange_bert,
    ),
    "roberta": Text(
        _roberta_config, (*bert_names("decoder.roberta"), *ROBERTA_HEAD_NAMES), _arrange_roberta
    ),
}
