"""The captioner: a Vision Transformer encoder and a text decoder.

Encoder after Dosovitskiy et al. 2021 (ViT, arXiv:2010.11929), decoder after Radford et al. 2019
(GPT-2) with the cross-attention of Vaswani et al. 2017 between self-attention and MLP, or after
Devlin et al. 2019 (BERT), Wang et al. 2022 (GIT, arXiv:2205.14100) or Lewis et al. 2020 (BART,
arXiv:1910.13461): see `DecoderConfig`. Read from top to bottom: attention, block, encoder, decoder,
whole. Another encoder is `training.davit`.

Dimension key, used as suffixes:
    B photos        Q queries: the tokens of one photo that are run at once, whatever they belong
    P memory tokens    to (beams while decoding, all its captions while training)
    D width         S key slots of the self-attention
    H heads         d head width (D / H)
    V vocabulary    N tokens of all photos that are no padding
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler.beam_search import KeysValues
from handler.errors import UserError


def refuse_unless(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


class ImageEncoder(nn.Module):
    """What every encoder is: images (B, 3, S, S), normalised, to memory (B, P, D), which is
    `prefix_tokens` tokens and then the patches row by row; `blocks` are its layers."""

    config: "EncoderShape"
    blocks: nn.ModuleList


class EncoderShape(Protocol):
    """What the rest asks of an encoder's config, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def image_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def memory_tokens(self) -> int: ...
    @property
    def memory_width(self) -> int: ...
    def build(self) -> ImageEncoder:
        """The encoder with new weights."""


class PatchGrid:
    """Of an encoder's config: a square of patches behind `prefix_tokens` tokens."""

    image_size: int
    patch_size: int
    prefix_tokens: int

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def memory_tokens(self) -> int:
        return self.prefix_tokens + self.grid**2


@dataclass(frozen=True)
class EncoderConfig(PatchGrid):
    """Shape of the Vision Transformer.

    `prefix_tokens` counts the learned tokens before the patches (class, distillation, registers);
    `prefix_positions` says whether they have position embeddings of their own; `pre_norm` is the
    layer norm that CLIP puts before the first block; `layer_scale` the per-channel gain after each
    branch (Touvron et al. 2021); `projection_width` the width of the memory where a linear layer
    and a norm follow (GIT). `stem` is what makes tokens of patches: one linear layer, or
    convolutions (see `ConvolutionalStem`). `memory_positions` adds the positions to the memory as
    well, as DETR does to the keys of its decoder (Carion et al. 2020, arXiv:2005.12872): from
    scratch, a decoder hardly learns without them where the object is of which it speaks.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    image_size: int = 224
    patch_size: int = 16
    prefix_tokens: int = 1
    prefix_positions: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    layer_scale: bool = False
    qkv_bias: bool = True
    activation: str = "gelu"
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    projection_width: int | None = None
    stem: Literal["linear", "convolutional"] = "linear"
    memory_positions: bool = False

    def __post_init__(self) -> None:
        refuse_unless(
            self.stem in ("linear", "convolutional"), "encoder.stem must be linear or convolutional"
        )
        refuse_unless(
            self.stem == "linear" or (self.patch_size % 8 == 0 and self.width % 4 == 0),
            "encoder.stem convolutional needs a patch_size that is a multiple of 8, and a width "
            "that is a multiple of 4",
        )
        refuse_unless(
            self.image_size % self.patch_size == 0,
            f"encoder.image_size {self.image_size} is no multiple of "
            f"encoder.patch_size {self.patch_size}",
        )
        _check_transformer("encoder", self.width, self.heads, self.layers, self.activation)
        refuse_unless(self.prefix_tokens >= 0, "encoder.prefix_tokens must be 0 or more")
        refuse_unless(
            not self.memory_positions or self.prefix_positions or not self.prefix_tokens,
            "encoder.memory_positions needs encoder.prefix_positions",
        )

    @property
    def memory_width(self) -> int:
        return self.projection_width or self.width

    def build(self) -> "Encoder":
        return Encoder(self)


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and family of the text decoder.

    The defaults are GPT-2's family; its own sizes are width 768, 12 layers, 12 heads, mlp_width
    3072, vocab_size 50257, max_positions 1024, activation gelu_tanh (its `gelu_new`), eps 1e-5.
    The settings that tell families apart:

                       norm   memory   embedding_norm   tied_head   head_bias   head_transform
        GPT-2          pre    cross    no               yes         no          no
        BERT, RoBERTa  post   cross    yes              yes         yes         yes
        GIT            post   prefix   yes              no          yes         no
        BART           post   cross    yes              yes         no          no

    `norm` stands before each branch, or after its sum with the residual stream. The photo's
    `memory` is read by cross-attention, or stands before the text as a prefix of tokens, which see
    each other and no text. `head_transform` is a dense layer, the activation and a norm.

    With `prompt_layers` the photo's tokens and those of a prompt first read each other in a
    `PromptEncoder` (BART's encoder), whose output is the memory; `prompt_ids` is the prompt where
    none is given, special tokens included.
    """

    vocab_size: int
    max_positions: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    memory_width: int
    activation: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.1
    norm: Literal["pre", "post"] = "pre"
    memory: Literal["cross", "prefix"] = "cross"
    embedding_norm: bool = False
    tied_head: bool = True
    head_bias: bool = False
    head_transform: bool = False
    prompt_layers: int = 0
    prompt_heads: int = 1
    prompt_mlp_width: int = 1
    prompt_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))  # in JSON a list
        _check_transformer("decoder", self.width, self.heads, self.layers, self.activation)
        refuse_unless(self.max_positions >= 2, "decoder.max_positions must be 2 or more")
        refuse_unless(self.vocab_size >= 2, "decoder.vocab_size must be 2 or more")
        refuse_unless(self.norm in ("pre", "post"), "decoder.norm must be pre or post")
        refuse_unless(self.memory in ("cross", "prefix"), "decoder.memory must be cross or prefix")
        refuse_unless(
            self.memory == "cross" or self.memory_width == self.width,
            f"decoder.memory_width {self.memory_width} is not decoder.width {self.width}, as "
            "decoder.memory prefix needs it",
        )
        refuse_unless(
            all(type(i) is int and 0 <= i < self.vocab_size for i in self.prompt_ids),
            "decoder.prompt_ids must be ids below decoder.vocab_size",
        )
        if self.prompt_layers:
            refuse_unless(
                self.memory == "cross" and self.memory_width == self.width,
                "decoder.prompt_layers need decoder.memory cross, of decoder.width",
            )

    def prompt_block(self) -> "DecoderConfig":
        """The blocks of the prompt encoder: the decoder's, without cross-attention."""
        return replace(
            self,
            memory="prefix",
            heads=self.prompt_heads,
            mlp_width=self.prompt_mlp_width,
            prompt_layers=0,
        )


def _check_transformer(part: str, width: int, heads: int, layers: int, activation: str) -> None:
    refuse_unless(
        heads > 0 and width % heads == 0, f"{part}.width {width} is no multiple of {heads} heads"
    )
    refuse_unless(layers > 0, f"{part}.layers must be 1 or more")
    refuse_unless(
        activation in ACTIVATIONS,
        f"{part}.activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}",
    )


class KeyValue(NamedTuple):
    """Keys and values of one layer's attention, each (B, H, S, d)."""

    k_BHSd: Tensor
    v_BHSd: Tensor


def split_heads(x_BQD: Tensor, heads: int) -> Tensor:
    """(B, Q, D) -> (B, H, Q, d)."""
    return x_BQD.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_BHQd: Tensor) -> Tensor:
    """(B, H, Q, d) -> (B, Q, D)."""
    return x_BHQd.transpose(1, 2).flatten(2)


class Packing(NamedTuple):
    """The N real tokens among the B * Q of a batch, which has padding. Layers run on (N, D);
    attention alone needs every token at its place. Two photos of Q = 4, `x` padding:

        tokens (B, Q)      index (N,)         rows (N, D) of a layer
        a b c x            0 1 2 4 5 6 7      a b c d e f g
        d e f g
    """

    index_N: Tensor
    photos: int
    queries: int


def packing_of(real_BQ: Tensor) -> Packing:
    """Of the tokens that `real_BQ` marks."""
    photos, queries = real_BQ.shape
    return Packing(real_BQ.flatten().nonzero().squeeze(1), photos, queries)


def unpack(x: Tensor, packing: Packing | None) -> Tensor:
    """(N, D) -> (B, Q, D), zeros where there is padding. Without packing `x` stays as it is."""
    if packing is None:
        return x
    rows = x.new_zeros([packing.photos * packing.queries, x.size(-1)])
    return rows.index_copy_(0, packing.index_N, x).unflatten(0, (packing.photos, packing.queries))


def pack(x_BQD: Tensor, packing: Packing | None) -> Tensor:
    """(B, Q, D) -> (N, D), the real tokens alone. Without packing as it is."""
    return x_BQD if packing is None else x_BQD.flatten(0, 1).index_select(0, packing.index_N)


def attend(
    q_BHQd: Tensor,
    k_BHSd: Tensor,
    v_BHSd: Tensor,
    mask_B1QS: Tensor | None = None,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Scaled dot-product attention of all heads, (B, Q, D); the mask is added to the logits.

    The weights (B, H, Q, S) are appended to `weights` where a list is given. Torch's fused kernel
    is the faster one on GPUs and in float32; on a CPU its backward pass takes up to six times as
    long as the plain products, and so does all of it in bfloat16.
    """
    plain = q_BHQd.is_cpu and (q_BHQd.requires_grad or q_BHQd.dtype == torch.bfloat16)
    if weights is None and not plain:
        return merge_heads(
            F.scaled_dot_product_attention(q_BHQd, k_BHSd, v_BHSd, attn_mask=mask_B1QS)
        )
    logits_BHQS = (q_BHQd * (1 / math.sqrt(q_BHQd.size(-1)))) @ k_BHSd.transpose(-1, -2)
    if mask_B1QS is not None:
        logits_BHQS = logits_BHQS + mask_B1QS.to(logits_BHQS.dtype)
    weights_BHQS = logits_BHQS.softmax(-1)
    if weights is not None:
        weights.append(weights_BHQS)
    return merge_heads(weights_BHQS.to(v_BHSd.dtype) @ v_BHSd)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014). On a CPU the mask is made of 16 random bits a number, which
    is several times faster than torch's Bernoulli draws: `rate` is exact to 2 ** -17."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.dropped = min(round(rate * 2**16), 2**16 - 1)  # of 2 ** 16 values

    def forward(self, x: Tensor) -> Tensor:
        return self._drop(x) if self.training and self.dropped else x

    @torch.jit.unused
    def _drop(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            return F.dropout(x, self.rate)
        # Four numbers of 16 bits in each of 64.
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        kept = (bits >= self.dropped - 2**15).to(x.dtype)
        return x * kept.mul_(2**16 / (2**16 - self.dropped))


class QuickGELU(nn.Module):
    """The approximation of GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
}


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class SelfAttention(nn.Module):
    """Attention of the queries to themselves, with a cache to what came before them, and with a
    prefix to the photo."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x_BQD: Tensor,
        mask_B1QS: Tensor | None = None,
        prefix: KeyValue | None = None,
        cache: KeyValue | None = None,
        used: int = 0,
        weights: list[Tensor] | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        q, k, v = unpack(self.qkv(x_BQD), packing).chunk(3, dim=-1)
        q = split_heads(q, self.heads)
        k = split_heads(k, self.heads)
        v = split_heads(v, self.heads)
        if cache is not None:
            end = used + k.size(2)
            cache.k_BHSd[:, :, used:end] = k
            cache.v_BHSd[:, :, used:end] = v
            k = cache.k_BHSd[:, :, :end]
            v = cache.v_BHSd[:, :, :end]
        if prefix is not None:
            k = torch.cat([prefix.k_BHSd, k], dim=2)
            v = torch.cat([prefix.v_BHSd, v], dim=2)
        return self.out(pack(attend(q, k, v, mask_B1QS, weights), packing))


class CrossAttention(nn.Module):
    """Attention of the queries to the photo. Its keys and values are computed once a photo."""

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.out = nn.Linear(width, width)

    def begin(self, memory_BPD: Tensor) -> KeyValue:
        k_BPD, v_BPD = self.kv(memory_BPD).chunk(2, dim=-1)
        return KeyValue(split_heads(k_BPD, self.heads), split_heads(v_BPD, self.heads))

    def forward(
        self,
        x_BQD: Tensor,
        memory: KeyValue,
        weights: list[Tensor] | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        q_BHQd = split_heads(unpack(self.q(x_BQD), packing), self.heads)
        looked = attend(q_BHQd, memory.k_BHSd, memory.v_BHSd, None, weights)
        return self.out(pack(looked, packing))


def layer_norm(width: int, eps: float, wanted: bool = True) -> nn.Module:
    """A layer norm, or nothing in its place."""
    return nn.LayerNorm(width, eps=eps) if wanted else nn.Identity()


class EncoderBlock(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, eps = config.width, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, config.heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, config.mlp_width, config.activation)
        self.dropout = Dropout(config.dropout)
        self.scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def forward(self, x_BPD: Tensor) -> Tensor:
        x_BPD = x_BPD + self._branch(self.attention(self.norm1(x_BPD)), self.scale1)
        return x_BPD + self._branch(self.mlp(self.norm2(x_BPD)), self.scale2)

    def _branch(self, x_BPD: Tensor, scale_D: Tensor | None) -> Tensor:
        return self.dropout(x_BPD if scale_D is None else x_BPD * scale_D)


class ConvolutionalStem(nn.Sequential):
    """Patches to tokens by three convolutions of 3 x 3 that halve the image, and a last one that
    makes one token of each patch (after Xiao et al. 2021, arXiv:2106.14881). From scratch it learns
    in far fewer steps than a linear layer what is in a patch, wherever in it that is."""

    def __init__(self, width: int, patch_size: int) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for wider in (width // 4, width // 2, width):
            layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.GELU()]
            channels = wider
        side = patch_size // 8
        super().__init__(*layers, nn.Conv2d(width, width, side, stride=side))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        # In this order of memory a CPU makes a training step of it in three quarters of the time.
        x = images_B3HW.contiguous(memory_format=torch.channels_last)
        for layer in self:
            x = layer(x)
        return x

    def initialise(self) -> None:
        """As He et al. 2015 (arXiv:1502.01852), so that no layer shrinks what it passes on."""
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


class Encoder(ImageEncoder):
    """Vision Transformer: images (B, 3, image_size, image_size), normalised, to memory (B, P, D),
    P = prefix_tokens + grid * grid, patches row by row, D = memory_width."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, prefix = config.width, config.prefix_tokens
        patches = config.grid * config.grid
        self.patch_embed: nn.Module
        if config.stem == "convolutional":
            self.patch_embed = ConvolutionalStem(width, config.patch_size)
        else:
            # CLIP's patch embedding has no bias: its pre-norm would take it out again.
            self.patch_embed = nn.Conv2d(
                3, width, config.patch_size, stride=config.patch_size, bias=not config.pre_norm
            )
        self.prefix = nn.Parameter(torch.zeros(1, prefix, width)) if prefix else None
        self.positions = nn.Parameter(
            torch.zeros(1, patches + (prefix if config.prefix_positions else 0), width)
        )
        self.norm_pre = layer_norm(width, config.layer_norm_eps, config.pre_norm)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.layers))
        self.norm = layer_norm(width, config.layer_norm_eps, config.final_norm)
        self.projection: nn.Module = nn.Identity()
        if config.projection_width is not None:
            self.projection = nn.Sequential(
                nn.Linear(width, config.projection_width),
                nn.LayerNorm(config.projection_width, eps=config.layer_norm_eps),
            )
        self.dropout = Dropout(config.dropout)
        # GPT-2's constant 0.02 is too small for a narrow encoder, which learns little for long.
        self.apply(initialise)
        if isinstance(self.patch_embed, ConvolutionalStem):
            self.patch_embed.initialise()
        nn.init.trunc_normal_(self.positions, std=0.02)
        with torch.no_grad():
            waves_PD = waves(config.grid, width)
            self.positions[0, -patches:, : waves_PD.size(1)] = waves_PD
        if self.prefix is not None:
            nn.init.trunc_normal_(self.prefix, std=0.02)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        x_BPD = self.patch_embed(images_B3HW).flatten(2).transpose(1, 2)
        if self.prefix is None:
            x_BPD = x_BPD + self.positions
        else:
            prefix_BnD = self.prefix.expand(x_BPD.size(0), -1, -1)
            if self.config.prefix_positions:
                x_BPD = torch.cat([prefix_BnD, x_BPD], dim=1) + self.positions
            else:
                x_BPD = torch.cat([prefix_BnD, x_BPD + self.positions], dim=1)
        x_BPD = self.norm_pre(self.dropout(x_BPD))
        for block in self.blocks:
            x_BPD = block(x_BPD)
        x_BPD = self.norm(x_BPD)
        return self.projection(x_BPD + self.positions if self.config.memory_positions else x_BPD)


def waves(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column, (grid * grid, about width): where learned positions
    begin, so that they count beside the patches from the first step (as in Beyer et al. 2022,
    Better plain ViT baselines). The frequencies are spread evenly up to one turn in two patches:
    on the small grids that are trained from scratch, most of the usual ones hardly change."""
    count = width // 4
    frequencies = math.pi * torch.arange(1, count + 1) / max(1, count)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    phases_PD = torch.cat([(n.reshape(-1, 1) + 0.5) * frequencies for n in (rows, columns)], dim=1)
    return torch.cat([phases_PD.sin(), phases_PD.cos()], dim=1)


def interpolate_positions(
    positions_1PD: Tensor, prefix: int, grid: int, antialias: bool = True
) -> Tensor:
    """Resamples learned patch positions to a `grid` x `grid` photo (bicubic, as ViT's section 3.2
    does for fine-tuning at another resolution); the first `prefix` rows stay as they are."""
    head, patches = positions_1PD[:, :prefix], positions_1PD[:, prefix:]
    old = math.isqrt(patches.size(1))
    if old == grid:
        return positions_1PD
    square = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    square = F.interpolate(
        square.float(), size=(grid, grid), mode="bicubic", antialias=antialias, align_corners=False
    )
    patches = square.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(positions_1PD.dtype)
    return torch.cat([head, patches], dim=1)


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention unless the memory is a prefix, MLP. Each branch has its norm
    before it (`norm1`, ...) or behind the sum (`post_norm1`, ...)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, eps = config.width, config.layer_norm_eps
        pre, post, cross = config.norm == "pre", config.norm == "post", config.memory == "cross"
        self.norm1 = layer_norm(width, eps, pre)
        self.self_attention = SelfAttention(width, config.heads)
        self.post_norm1 = layer_norm(width, eps, post)
        self.norm2 = layer_norm(width, eps, pre and cross)
        self.cross_attention: CrossAttention | None = None
        if cross:
            self.cross_attention = CrossAttention(width, config.heads, config.memory_width)
        self.post_norm2 = layer_norm(width, eps, post and cross)
        self.norm3 = layer_norm(width, eps, pre)
        self.mlp = Mlp(width, config.mlp_width, config.activation)
        self.post_norm3 = layer_norm(width, eps, post)
        self.dropout = Dropout(config.dropout)
        self.heads = config.heads

    @torch.jit.export
    def begin(self, memory_BPD: Tensor) -> tuple[Tensor, KeyValue]:
        """Keys and values of the photo in this layer, and the memory that the next one reads: a
        prefix is tokens of this layer too, which see each other and no text."""
        if self.cross_attention is not None:
            return memory_BPD, self.cross_attention.begin(memory_BPD)
        else:  # TorchScript compiles the one of both that this block has
            empty = split_heads(memory_BPD, self.heads)
            prefix = KeyValue(torch.empty_like(empty), torch.empty_like(empty))
            return self.forward(memory_BPD, None, None, prefix, 0, None, None), prefix

    def forward(
        self,
        x_BQD: Tensor,
        mask_B1QS: Tensor | None,
        memory: KeyValue | None,
        cache: KeyValue | None,
        used: int,
        weights: list[Tensor] | None,
        packing: Packing | None,
    ) -> Tensor:
        if self.cross_attention is None:
            prefix, prefix_weights = memory, weights
        else:
            prefix, prefix_weights = None, None
        seen = self.self_attention(
            self.norm1(x_BQD), mask_B1QS, prefix, cache, used, prefix_weights, packing
        )
        x_BQD = self.post_norm1(x_BQD + self.dropout(seen))
        if self.cross_attention is not None:
            assert memory is not None
            looked = self.cross_attention(self.norm2(x_BQD), memory, weights, packing)
            x_BQD = self.post_norm2(x_BQD + self.dropout(looked))
        return self.post_norm3(x_BQD + self.dropout(self.mlp(self.norm3(x_BQD))))


class PromptEncoder(nn.Module):
    """BART's encoder over the tokens of a photo and the words of its prompt."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, block = config.width, config.prompt_block()
        self.positions = nn.Embedding(config.max_positions, width)
        self.embedding_norm = layer_norm(width, config.layer_norm_eps, config.embedding_norm)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(DecoderBlock(block) for _ in range(config.prompt_layers))
        self.norm = layer_norm(width, config.layer_norm_eps, config.norm == "pre")
        default_1T = torch.tensor([config.prompt_ids], dtype=torch.long)
        self.register_buffer("default_1T", default_1T, persistent=False)

    def forward(self, photo_BPD: Tensor, words_BTD: Tensor) -> Tensor:
        """Tokens of photos (B, P, D) and embedded prompts (B, T, D) -> memory (B, P + T, D)."""
        x_BPD = torch.cat([photo_BPD, words_BTD], dim=1)
        x_BPD = x_BPD + self.positions.weight[: x_BPD.size(1)]
        x_BPD = self.dropout(self.embedding_norm(x_BPD))
        for block in self.blocks:
            x_BPD = block(x_BPD, None, None, None, 0, None, None)
        return self.norm(x_BPD)


class HeadTransform(nn.Module):
    """What BERT puts before its output head."""

    def __init__(self, width: int, activation: str, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = ACTIVATIONS[activation]()
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))


class Decoder(nn.Module):
    """Text decoder over a photo's memory; its family is a matter of `DecoderConfig`.

    One piece of code runs every use. A photo has Q query tokens and S key slots, and a boolean
    mask (B, Q, S) says which slots a query may see. Teacher forcing: the queries are the tokens of
    all the photo's captions, the mask is causal within each caption. Decoding: the queries are the
    newest tokens of its beams, the slots hold the tokens of all beams so far, and the mask is
    their ancestry, so that reordering beams moves no keys and no values.

    The methods are plain enough for `torch.jit.script`; eager and exported steps are the same code.
    """

    vocab_size: int
    max_positions: int

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_positions
        self.heads = config.heads
        self.prefix = config.memory == "prefix"
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_positions, config.width)
        width, eps = config.width, config.layer_norm_eps
        self.embedding_norm = layer_norm(width, eps, config.embedding_norm)
        self.dropout = Dropout(config.dropout)
        self.prompt_encoder: PromptEncoder | None = None
        if config.prompt_layers:
            self.prompt_encoder = PromptEncoder(config)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = layer_norm(width, eps, config.norm == "pre")
        self.head_transform: nn.Module = nn.Identity()
        if config.head_transform:
            self.head_transform = HeadTransform(width, config.activation, eps)
        self.head = nn.Linear(width, config.vocab_size, bias=config.head_bias)
        # Larger ones drown the words' embeddings (GPT-2's size too): 0.03 CIDEr worse on flickr8k.
        self.apply(partial(initialise, std=0.02))
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        if config.tied_head:  # Press and Wolf 2017
            self.head.weight = self.token_embedding.weight
        for name, weight in self.named_parameters():
            # GPT-2 scales what is added to the residual stream by its depth.
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                weight.data.div_(math.sqrt(3 * config.layers))

    @torch.jit.export
    def begin(self, memory_BPD: Tensor, prompt_BT: Tensor | None = None) -> KeysValues:
        """The keys and values of a photo, (B, H, P, d) in every layer: computed once and shared by
        all its beams or captions. They depend on no text, a prefix's neither; but for the ids
        `prompt_BT` where there is a prompt encoder."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        if self.prompt_encoder is not None:
            if prompt_BT is None:
                prompt_BT = self.prompt_encoder.default_1T.expand(memory_BPD.size(0), -1)
            memory_BPD = self.prompt_encoder(memory_BPD, self.token_embedding(prompt_BT))
        for block in self.blocks:
            memory_BPD, memory = block.begin(memory_BPD)
            keys.append(memory.k_BHSd)
            values.append(memory.v_BHSd)
        return KeysValues(keys, values)

    @torch.jit.export
    def new_cache(self, photos: int, slots: int) -> KeysValues:
        """Empty keys and values of the text, (photos, H, slots, d) in every layer."""
        weight = self.token_embedding.weight
        shape = [photos, self.heads, slots, weight.size(1) // self.heads]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for _ in range(len(self.blocks)):
            keys.append(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            values.append(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        return KeysValues(keys, values)

    @torch.jit.export
    def prefill(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQQ: Tensor,
        real_BQ: Tensor,
        cache: KeysValues,
        memory: KeysValues,
    ) -> Tensor:
        """Runs the Q tokens that the text of each photo begins with, in one parallel pass, and
        writes their keys and values into the first Q slots of `cache`, in place. No layer's product
        is spent on padding, where `real_BQ` is false; the last column has none.

        tokens and positions (B, Q) int64; mask (B, Q, Q) bool, true where a query sees a token.
        Returns the logits of what follows the last column, (B, 1, V) float32.
        """
        packing = packing_of(real_BQ)
        x_ND = self._run(tokens_BQ, positions_BQ, mask_BQQ, cache, 0, memory, None, packing)
        last_B = real_BQ.sum(1).cumsum(0) - 1
        return self.head(x_ND[last_B].unsqueeze(1)).float()

    @torch.jit.export
    def step(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        cache: KeysValues,
        used: int,
        memory: KeysValues,
    ) -> Tensor:
        """Runs Q new tokens a photo and writes their keys and values into the slots
        used .. used + Q - 1 of `cache`, in place.

        tokens and positions (B, Q) int64; mask (B, Q, S) bool with S = used + Q, true where the
        query sees the slot. Returns the logits of the next tokens, (B, Q, V) float32.
        """
        x_BQD = self._run(tokens_BQ, positions_BQ, mask_BQS, cache, used, memory, None, None)
        return self.head(x_BQD).float()

    @torch.jit.export
    def attention(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        memory_BPD: Tensor,
        prompt_BT: Tensor | None = None,
    ) -> Tensor:
        """Attention to the photo of every layer and head, from one parallel pass over finished
        captions: (layers, B, H, Q, P), summing to 1 over P. Of a prefix, its share of the
        self-attention; of a memory that holds a prompt, the share of the photo's tokens."""
        weights: list[Tensor] = []
        memory = self.begin(memory_BPD, prompt_BT)
        self._run(tokens_BQ, positions_BQ, mask_BQS, None, 0, memory, weights, None)
        weights_LBHQP = torch.stack(weights).float()[..., : memory_BPD.size(1)]
        return weights_LBHQP / weights_LBHQP.sum(-1, keepdim=True)

    def forward(
        self, tokens_BQ: Tensor, positions_BQ: Tensor, mask_BQS: Tensor, memory_BPD: Tensor
    ) -> Tensor:
        """Teacher forcing: logits (B, Q, V) float32 of the token after each of the Q tokens."""
        memory = self.begin(memory_BPD, None)
        x_BQD = self._run(tokens_BQ, positions_BQ, mask_BQS, None, 0, memory, None, None)
        return self.head(x_BQD).float()

    def hidden(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        memory_BPD: Tensor,
        real_BQ: Tensor,
    ) -> Tensor:
        """Teacher forcing up to the head, (N, D), of the N tokens that `real_BQ` marks: padding
        (a quarter of a batch of Flickr8k) has its slots in attention, but no layer's product is
        spent on it. `head` makes logits of it."""
        memory, packing = self.begin(memory_BPD, None), packing_of(real_BQ)
        return self._run(tokens_BQ, positions_BQ, mask_BQS, None, 0, memory, None, packing)

    def _run(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        cache: KeysValues | None,
        used: int,
        memory: KeysValues,
        weights: list[Tensor] | None,
        packing: Packing | None,
    ) -> Tensor:
        if packing is not None:
            tokens_BQ = tokens_BQ.flatten()[packing.index_N]
            positions_BQ = positions_BQ.flatten()[packing.index_N]
        x_BQD = self.token_embedding(tokens_BQ) + self.position_embedding(positions_BQ)
        x_BQD = self.dropout(self.embedding_norm(x_BQD))
        # One additive mask for all layers: a boolean one would be converted in each.
        dtype = memory.keys[0].dtype
        mask_B1QS = torch.zeros(mask_BQS.shape, dtype=dtype, device=mask_BQS.device)
        mask_B1QS = mask_B1QS.masked_fill(mask_BQS.logical_not(), float("-inf")).unsqueeze(1)
        if self.prefix:  # which every token of the text sees
            mask_B1QS = F.pad(mask_B1QS, [memory.keys[0].size(2), 0])
        own: KeyValue | None = None
        for i, block in enumerate(self.blocks):
            if cache is not None:
                own = KeyValue(cache.keys[i], cache.values[i])
            photo = KeyValue(memory.keys[i], memory.values[i])
            x_BQD = block(x_BQD, mask_B1QS, photo, own, used, weights, packing)
        return self.head_transform(self.norm(x_BQD))


class CaptioningModel(nn.Module):
    """Encoder and decoder together; what a checkpoint holds."""

    def __init__(self, encoder: EncoderShape, decoder: DecoderConfig) -> None:
        super().__init__()
        refuse_unless(
            decoder.memory_width == encoder.memory_width,
            f"decoder.memory_width {decoder.memory_width} is not the encoder's, "
            f"{encoder.memory_width}",
        )
        self.encoder_config, self.decoder_config = encoder, decoder
        self.encoder = encoder.build()
        self.decoder = Decoder(decoder)

    def forward(
        self, images_B3HW: Tensor, tokens_BQ: Tensor, positions_BQ: Tensor, mask_BQS: Tensor
    ) -> Tensor:
        """Teacher-forced logits (B, Q, V); all Q tokens of a photo share one encoder pass."""
        return self.decoder(tokens_BQ, positions_BQ, mask_BQS, self.encoder(images_B3HW))


def initialise(module: nn.Module, std: float | None = None) -> None:
    """Linear weights with standard deviation `std`, or else in proportion to the layer's size
    (Glorot and Bengio 2010)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        if std is None:
            nn.init.xavier_uniform_(module.weight.flatten(1))
        else:
            nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
