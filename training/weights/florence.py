"""`Florence2ForConditionalGeneration` (Xiao et al. 2023, arXiv:2311.06242), such as
`florence-community/Florence-2-base` and `microsoft/Florence-2-base-ft`: DaViT, a projector, and
BART, whose encoder reads the photo's tokens followed by the words of a task.

The model is published in two layouts: that of transformers, and the original one with its own code.
They differ in the names, in one weight that is transposed, and in a bias of the head.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from handler.errors import UserError
from training.davit import DaViTConfig
from training.model import DecoderConfig
from training.weights.family import Config, Family, Weights
from training.weights.fields import Section
from training.weights.generation import stored_or_legacy
from training.weights.rename import Names
from training.weights.text import tie_head

# The only order of image features that is supported: the mean of the tokens, then the tokens. The
# original layout has a field for it.
SOURCES = ("spatial_avg_pool", "temporal_avg_pool")
# The position embeddings of a text begin at this index in BART's table.
FIRST_POSITION = 2
# More blocks than any published DaViT has. A limit is needed because the table of names lists each.
MOST_BLOCKS = 1000
# The words of the tasks that describe the photo. The others (reading text, boxes, masks, given
# regions) are not captioning.
TASKS = {
    "<CAPTION>": "What does the image describe?",
    "<DETAILED_CAPTION>": "Describe in detail what is shown in the image.",
    "<MORE_DETAILED_CAPTION>": "Describe with a paragraph what is shown in the image.",
}
PROJECTOR = "model.multi_modal_projector"
PHOTO_NAMES: Names = (
    ("model.vision_tower.convs.{i}.conv.{p}", "encoder.entries.{i}.conv.{p}"),
    ("model.vision_tower.convs.{i}.norm.{p}", "encoder.entries.{i}.norm.{p}"),
    (f"{PROJECTOR}.image_position_embed.column_embeddings.weight", "encoder.columns"),
    (f"{PROJECTOR}.image_position_embed.row_embeddings.weight", "encoder.rows"),
    (f"{PROJECTOR}.visual_temporal_embed.pos_idx_to_embed", "encoder.moments"),
    (f"{PROJECTOR}.image_projection.weight", "encoder.projection.weight"),
    (f"{PROJECTOR}.image_proj_norm.{{p}}", "encoder.norm.{p}"),
)
ORIGINAL_PHOTO_NAMES: Names = (
    ("vision_tower.convs.{i}.proj.{p}", "encoder.entries.{i}.conv.{p}"),
    ("vision_tower.convs.{i}.norm.{p}", "encoder.entries.{i}.norm.{p}"),
    ("image_pos_embed.column_embeddings.weight", "encoder.columns"),
    ("image_pos_embed.row_embeddings.weight", "encoder.rows"),
    ("visual_temporal_embed.pos_idx_to_embed", "encoder.moments"),
    ("image_projection", "encoder.projection"),
    ("image_proj_norm.{p}", "encoder.norm.{p}"),
    ("language_model.final_logits_bias", "decoder.head.logits"),
)

# Names in half of a DaViT block: ours, transformers', the original's; `{a}` is the attention there.
HALF_NAMES = (
    ("conv1.conv", "conv1", "conv1.fn.dw"),
    ("norm1", "norm1", "{a}.norm"),
    ("attention.qkv", "{a}.qkv", "{a}.fn.qkv"),
    ("attention.out", "{a}.proj", "{a}.fn.proj"),
    ("conv2.conv", "conv2", "conv2.fn.dw"),
    ("norm2", "norm2", "ffn.norm"),
    ("mlp.up", "ffn.fc1", "ffn.fn.net.fc1"),
    ("mlp.down", "ffn.fc2", "ffn.fn.net.fc2"),
)


def _is_original(config: Config) -> bool:
    return "dim_embed" in Section(config, "vision_config").values


def _configs(config: Config) -> tuple[DaViTConfig, DecoderConfig]:
    return _encoder(config), _decoder(config)


def _encoder(config: Config) -> DaViTConfig:
    vision, original = Section(config, "vision_config"), _is_original(config)
    vision.demand("in_channels", 3)
    if original:
        sources = vision.numbers("image_feature_source", list(SOURCES))
        if sources != SOURCES:
            raise UserError(
                f"field 'vision_config.image_feature_source' is {list(sources)!r}; only "
                f"{list(SOURCES)!r} can be imported"
            )
        Section(vision.values, "image_pos_embed").demand("type", "learned_abs_2d")
        Section(vision.values, "visual_temporal_embedding").demand("type", "COSINE")
    depths = vision.numbers("depths", [1, 1, 9, 1])
    if sum(depths) > MOST_BLOCKS:
        raise UserError(f"field 'vision_config.depths' is {list(depths)!r}: too many blocks")
    strides = vision.numbers("patch_stride", [4, 2, 2, 2])
    return DaViTConfig(
        memory_width=vision.value("projection_dim", 1024),
        widths=vision.numbers("dim_embed" if original else "embed_dim", [128, 256, 512, 1024]),
        depths=depths,
        heads=vision.numbers("num_heads", [4, 8, 16, 32]),
        groups=vision.numbers("num_groups", [4, 8, 16, 32]),
        kernels=vision.numbers("patch_size", [7, 3, 3, 3]),
        strides=strides,
        paddings=vision.numbers("patch_padding", [3, 1, 1, 1]),
        pre_norms=vision.numbers("patch_prenorm", [False, True, True, True]),
        window=vision.value("window_size", 12),
        mlp_ratio=vision.value("mlp_ratio", 4.0),
        qkv_bias=vision.value("qkv_bias", True),
        activation=vision.activation("activation_function", "gelu"),
        patch_size=math.prod(strides),
    )


def _decoder(config: Config) -> DecoderConfig:
    text = Section(config, "text_config")
    for field in ("scale_embedding", "normalize_before", "add_final_layer_norm", "add_bias_logits"):
        text.demand(field, False)
    width = text.value("d_model", 1024)
    return DecoderConfig(
        vocab_size=text.value("vocab_size", 51289 if _is_original(config) else 50265),
        max_positions=text.value("max_position_embeddings", 1024),
        width=width,
        layers=text.value("decoder_layers", 12),
        heads=text.value("decoder_attention_heads", 16),
        mlp_width=text.value("decoder_ffn_dim", 4096),
        memory_width=width,
        activation=text.activation("activation_function", "gelu"),
        dropout=text.value("dropout", 0.1),
        norm="post",
        embedding_norm=True,
        tied_head=text.value("tie_word_embeddings", True),
        head_bias=_is_original(config),
        prompt_layers=text.value("encoder_layers", 12),
        prompt_heads=text.value("encoder_attention_heads", 16),
        prompt_mlp_width=text.value("encoder_ffn_dim", 4096),
    )


def _names(config: Config) -> Names:
    depths = Section(config, "vision_config").numbers("depths", [1, 1, 9, 1])
    original = _is_original(config)
    return (
        *_block_names(depths, original),
        *(ORIGINAL_PHOTO_NAMES if original else PHOTO_NAMES),
        *_bart_names("language_model.model" if original else "model.language_model"),
        ("language_model.lm_head.weight" if original else "lm_head.weight", "decoder.head.weight"),
    )


def _block_names(depths: Sequence[int], original: bool) -> Iterator[tuple[str, str]]:
    """The names of a DaViT's blocks. Theirs number them within each stage, ours consecutively."""
    tower = "vision_tower" if original else "model.vision_tower"
    blocks = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    for number, (stage, block) in enumerate(blocks):
        for half, attention in (("spatial", "window_attn"), ("channel", "channel_attn")):
            for ours, *theirs in HALF_NAMES:
                name = theirs[original].replace("{a}", attention)
                yield (
                    f"{tower}.blocks.{stage}.{block}.{half}_block.{name}.{{p}}",
                    f"encoder.blocks.{number}.{half}.{ours}.{{p}}",
                )


def _bart_names(model: str) -> Iterator[tuple[str, str]]:
    """The names of BART's embeddings and layers; theirs begin with `model`."""
    for embedding in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        yield f"{model}.{embedding}.weight", "decoder.token_embedding.weight"
    for part, ours, positions in (
        ("encoder", "decoder.prompt_encoder", "positions"),
        ("decoder", "decoder", "position_embedding"),
    ):
        layer, block = f"{model}.{part}.layers.{{i}}", f"{ours}.blocks.{{i}}"
        yield f"{model}.{part}.embed_positions.weight", f"{ours}.{positions}.weight"
        yield f"{model}.{part}.layernorm_embedding.{{p}}", f"{ours}.embedding_norm.{{p}}"
        yield f"{layer}.self_attn_layer_norm.{{p}}", f"{block}.post_norm1.{{p}}"
        yield f"{layer}.encoder_attn_layer_norm.{{p}}", f"{block}.post_norm2.{{p}}"
        yield f"{layer}.fc1.{{p}}", f"{block}.mlp.up.{{p}}"
        yield f"{layer}.fc2.{{p}}", f"{block}.mlp.down.{{p}}"
        yield f"{layer}.final_layer_norm.{{p}}", f"{block}.post_norm3.{{p}}"
        for theirs, attention in (("self", "self"), ("encoder", "cross")):
            for letter in "qkv":
                name = f"{block}.{attention}_attention.{letter}.{{p}}"
                yield f"{layer}.{theirs}_attn.{letter}_proj.{{p}}", name
            name = f"{block}.{attention}_attention.out.{{p}}"
            yield f"{layer}.{theirs}_attn.out_proj.{{p}}", name


def _arrange(
    config: Config, weights: Weights, encoder: DaViTConfig, decoder: DecoderConfig
) -> None:
    _join_positions(weights, encoder.grid)
    _name_entries(weights, encoder)
    for name in ("decoder.prompt_encoder.positions.weight", "decoder.position_embedding.weight"):
        (positions,) = weights.take(name)
        weights.ours[name] = positions[FIRST_POSITION:]
    if _is_original(config):
        (projection,) = weights.take("encoder.projection")
        weights.ours["encoder.projection.weight"] = projection.T
        # Always zero in published models; the layout of transformers does not have it.
        bias = weights.ours.pop("decoder.head.logits", torch.zeros(decoder.vocab_size))
        weights.ours["decoder.head.bias"] = bias.flatten()
    tie_head(Section(config, "text_config"), weights, True)


def _name_entries(weights: Weights, encoder: DaViTConfig) -> None:
    """Names the norm before or after each stage's convolution, and converts the convolutions after
    the first to linear layers over patches of all channels."""
    for stage, pre_norm in enumerate(encoder.pre_norms):
        entry = f"encoder.entries.{stage}"
        if pre_norm:
            for kind in ("weight", "bias"):
                (weights.ours[f"{entry}.norm_pre.{kind}"],) = weights.take(f"{entry}.norm.{kind}")
        if stage:
            conv, bias = weights.take(f"{entry}.conv.weight", f"{entry}.conv.bias")
            weights.ours[f"{entry}.linear.weight"] = conv.permute(0, 2, 3, 1).flatten(1)
            weights.ours[f"{entry}.linear.bias"] = bias


def _join_positions(weights: Weights, grid: int) -> None:
    """Combines the embeddings of columns, rows and time to one table of positions; a photo is the
    first moment."""
    columns, rows, moments = weights.take("encoder.columns", "encoder.rows", "encoder.moments")
    if min(columns.size(0), rows.size(0)) < grid:
        raise UserError(
            f"{weights.where}: has position embeddings of {min(columns.size(0), rows.size(0))} "
            f"rows and columns, but the config and the image processor need {grid}"
        )
    across = columns[:grid].unsqueeze(0).expand(grid, -1, -1)
    down = rows[:grid].unsqueeze(1).expand(-1, grid, -1)
    positions = torch.cat([across, down], dim=2) + moments[0]
    weights.ours["encoder.grid_positions"] = positions.flatten(0, 1).unsqueeze(0)


def _generation(config: Config, stored: Config | None) -> Config:
    return stored_or_legacy(stored, config["text_config"])


FLORENCE = Family(
    architecture="Florence2ForConditionalGeneration",
    configs=_configs,
    names=_names,
    arrange=_arrange,
    generation=_generation,
    free_size=lambda _: True,
    tasks=TASKS,
    forced=True,
)
