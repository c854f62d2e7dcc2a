"""DaViT, the Dual Attention Vision Transformer (Ding et al. 2022, arXiv:2204.03645), as Florence-2
has it (Xiao et al. 2023, arXiv:2311.06242): an encoder for any decoder.

Stages of fewer and wider tokens, each entered through a strided convolution. A block mixes the
tokens twice: in windows of space, and across all of it, where channels attend to channels. Each
half has a depth-wise convolution before its attention and before its MLP, which stands for
positions. The memory is the last stage's tokens with learned positions, and their mean in front,
through a projection and a norm.

Dimension key, beside training.model's: N tokens of a stage (side * side), W windows of a photo,
T tokens of a window, G groups of channels, g channels of a group.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model import (
    ACTIVATIONS,
    Dropout,
    ImageEncoder,
    Mlp,
    PatchGrid,
    attend,
    initialise,
    layer_norm,
    merge_heads,
    refuse_unless,
    split_heads,
)

# The most numbers that a layer makes of one photo at once: 8 MB of float32.
STRIP = 2**21
PER_STAGE = ("depths", "heads", "groups", "kernels", "strides", "paddings", "pre_norms")


@dataclass(frozen=True)
class DaViTConfig(PatchGrid):
    """Shape of a DaViT; the defaults are those of Florence-2 base. A tuple has a number for each
    stage. `pre_norms` says whether a stage's norm stands before its convolution or behind it.
    `patch_size` is the product of `strides`: the pixels of a side that a token of the memory
    stands for."""

    memory_width: int = 768
    image_size: int = 768
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    depths: tuple[int, ...] = (1, 1, 9, 1)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    groups: tuple[int, ...] = (4, 8, 16, 32)
    kernels: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    paddings: tuple[int, ...] = (3, 1, 1, 1)
    pre_norms: tuple[bool, ...] = (False, True, True, True)
    window: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    activation: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    patch_size: int = 32
    prefix_tokens: Literal[1] = 1
    kind: Literal["davit"] = "davit"

    def __post_init__(self) -> None:
        for name in ("widths", *PER_STAGE):
            values = getattr(self, name)
            kind = bool if name == "pre_norms" else int
            refuse_unless(
                isinstance(values, list | tuple) and all(type(v) is kind for v in values),
                f"encoder.{name} must be a list of {kind.__name__}",
            )
            object.__setattr__(self, name, tuple(values))  # in JSON lists
            least = {"paddings": 0, "pre_norms": False}.get(name, 1)
            refuse_unless(
                len(values) == len(self.widths) > 0 and min(values) >= least,
                f"encoder.{name} must be {least} or more, one for each of encoder.widths",
            )
        for width, heads, groups in zip(self.widths, self.heads, self.groups, strict=True):
            refuse_unless(
                width % heads == 0 and width % groups == 0,
                f"encoder.widths: {width} is no multiple of {heads} heads or {groups} groups",
            )
        refuse_unless(self.window > 0, "encoder.window must be 1 or more")
        refuse_unless(self.mlp_ratio > 0, "encoder.mlp_ratio must be above 0")
        refuse_unless(self.prefix_tokens == 1, "encoder.prefix_tokens is 1, the tokens' mean")
        refuse_unless(
            self.activation in ACTIVATIONS,
            f"encoder.activation {self.activation!r} is unknown; choose one of "
            f"{', '.join(ACTIVATIONS)}",
        )
        refuse_unless(
            self.patch_size == math.prod(self.strides)
            and self.image_size >= self.patch_size
            and self.sides[-1] == self.image_size // self.patch_size,
            "encoder.patch_size must be the product of encoder.strides, and encoder.image_size a "
            "multiple that kernels and paddings leave whole",
        )

    @property
    def sides(self) -> list[int]:
        """Tokens along one side, for each stage."""
        sides = [self.image_size]
        for kernel, stride, padding in zip(self.kernels, self.strides, self.paddings, strict=True):
            sides.append((sides[-1] + 2 * padding - kernel) // stride + 1)
        return sides[1:]

    @property
    def layers(self) -> int:
        return sum(self.depths)

    def build(self) -> "DaViT":
        return DaViT(self)


def strips(x_BND: Tensor, tokens: int, width: int) -> tuple[Tensor, ...]:
    """The tokens in strips, each of a multiple of so many `tokens`, that layers of `width` take one
    after the other: what they make of a strip stays in the processor's cache, where what they make
    of a whole stage would be new memory from the system each time."""
    return x_BND.split(tokens * max(1, STRIP // (tokens * width)), dim=1)


class Entry(nn.Module):
    """A strided convolution of pixels (B, 3, side, side) into the first stage: (B, N, D)."""

    def __init__(self, config: DaViTConfig) -> None:
        super().__init__()
        kernel, stride, padding = config.kernels[0], config.strides[0], config.paddings[0]
        self.norm_pre = layer_norm(3, config.layer_norm_eps, config.pre_norms[0])
        self.conv = nn.Conv2d(3, config.widths[0], kernel, stride, padding)
        self.norm = layer_norm(config.widths[0], config.layer_norm_eps, not config.pre_norms[0])

    def forward(self, images_B3HW: Tensor) -> Tensor:
        images_B3HW = self.norm_pre(images_B3HW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.norm(self.conv(images_B3HW).flatten(2).transpose(1, 2))


class Passage(nn.Module):
    """A strided convolution of tokens (B, N, D) into the next stage, as a linear layer over the
    tokens below each place of the kernel, which every precision of linear layers is for."""

    def __init__(self, config: DaViTConfig, stage: int) -> None:
        super().__init__()
        before, width = config.widths[stage - 1], config.widths[stage]
        self.kernel, self.stride = config.kernels[stage], config.strides[stage]
        self.padding, self.side = config.paddings[stage], config.sides[stage - 1]
        self.seen = self.kernel**2 * before
        # Of as many rows of places as a strip has.
        self.rows = max(1, STRIP // (config.sides[stage] * self.seen))
        self.norm_pre = layer_norm(before, config.layer_norm_eps, config.pre_norms[stage])
        self.linear = nn.Linear(self.seen, width)
        self.norm = layer_norm(width, config.layer_norm_eps, not config.pre_norms[stage])

    def forward(self, x_BND: Tensor) -> Tensor:
        around = [0, 0] + 4 * [self.padding]
        x_BHWD = F.pad(self.norm_pre(x_BND).unflatten(1, (self.side, self.side)), around)
        # (B, rows, columns, D, kernel, kernel)
        places = x_BHWD.unfold(1, self.kernel, self.stride).unfold(2, self.kernel, self.stride)
        parts = places.permute(0, 1, 2, 4, 5, 3).split(self.rows, dim=1)
        x_BND = torch.cat([self.linear(part.flatten(3).flatten(1, 2)) for part in parts], dim=1)
        return self.norm(x_BND)


class DepthwiseConv(nn.Module):
    """3 x 3, each channel by itself, over the tokens of a square; added to them."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.width, self.side = width, side
        conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        # As the tokens are. oneDNN is four times as slow on tokens with weights of another layout.
        self.conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        identity_1133 = F.pad(torch.ones(1, 1, 1, 1), (1, 1, 1, 1))
        self.register_buffer("identity_1133", identity_1133, persistent=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        square_BDHW = x_BND.transpose(1, 2).unflatten(2, (self.side, self.side))
        weight, bias = self.conv.weight + self.identity_1133, self.conv.bias
        square_BDHW = F.conv2d(square_BDHW, weight, bias, padding=1, groups=self.width)
        return square_BDHW.flatten(2).transpose(1, 2)


class WindowAttention(nn.Module):
    """Self-attention within each window of window x window tokens. Where the side is no multiple
    of it, zeros fill up the last windows, and are attended to as in the original."""

    def __init__(self, width: int, heads: int, bias: bool, side: int, window: int) -> None:
        super().__init__()
        self.width, self.heads, self.side, self.window = width, heads, side, window
        self.count = math.ceil(side / window)  # windows along one side
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        full = self.count * self.window
        missing = full - self.side
        x_BHWD = F.pad(x_BND.unflatten(1, (self.side, self.side)), (0, 0, 0, missing, 0, missing))
        parts = strips(x_BHWD.flatten(1, 2), self.window * full, 3 * self.width)
        x_BND = torch.cat([self._attend(part) for part in parts], dim=1)
        return x_BND.unflatten(1, (full, full))[:, : self.side, : self.side].flatten(1, 2)

    def _attend(self, x_BND: Tensor) -> Tensor:
        """A strip of whole windows."""
        # (B, rows of windows, rows of one, windows, columns of one, D)
        places = (-1, self.window, self.count, self.window)
        x_BWTD = x_BND.unflatten(1, places).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        q, k, v = self.qkv(x_BWTD.flatten(0, 1)).chunk(3, dim=-1)
        q, k, v = (split_heads(x, self.heads) for x in (q, k, v))
        seen_BWTD = self.out(attend(q, k, v)).unflatten(0, (x_BND.size(0), -1))
        places = (-1, self.count, self.window, self.window)
        return seen_BWTD.flatten(1, 2).unflatten(1, places).transpose(2, 3).flatten(1, 4)


class ChannelAttention(nn.Module):
    """Attention of the channels of a group to each other: each is a vector over all tokens."""

    def __init__(self, width: int, groups: int, bias: bool, tokens: int) -> None:
        super().__init__()
        self.width, self.groups, self.tokens = width, groups, tokens
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        logits, values = [], []
        for part in strips(x_BND, 1, 3 * self.width):
            q, k, v = self.qkv(part).chunk(3, dim=-1)
            q_BGNg, k_BGNg, v_BGNg = (split_heads(x, self.groups) for x in (q, k, v))
            logits.append(q_BGNg.transpose(-1, -2) @ k_BGNg)
            values.append(v_BGNg)
        logits_BGgg = torch.stack(logits).sum(0) * self.tokens**-0.5
        weights_BGgg = logits_BGgg.softmax(-1).transpose(-1, -2)
        return torch.cat([self.out(merge_heads(v @ weights_BGgg)) for v in values], dim=1)


class HalfBlock(nn.Module):
    """Convolution, attention, convolution, MLP."""

    def __init__(self, config: DaViTConfig, stage: int, attention: nn.Module) -> None:
        super().__init__()
        width, side = config.widths[stage], config.sides[stage]
        self.hidden = int(width * config.mlp_ratio)
        self.conv1 = DepthwiseConv(width, side)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = attention
        self.conv2 = DepthwiseConv(width, side)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = Mlp(width, self.hidden, config.activation)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = self.conv1(x_BND)
        x_BND = x_BND + self.dropout(self.attention(self.norm1(x_BND)))
        parts = strips(self.conv2(x_BND), 1, self.hidden)
        return torch.cat([part + self.dropout(self.mlp(self.norm2(part))) for part in parts], 1)


class Block(nn.Module):
    """Attention in windows, then across channels."""

    def __init__(self, config: DaViTConfig, stage: int) -> None:
        super().__init__()
        width, bias = config.widths[stage], config.qkv_bias
        windows = WindowAttention(
            width, config.heads[stage], bias, config.sides[stage], config.window
        )
        self.spatial = HalfBlock(config, stage, windows)
        tokens = config.sides[stage] ** 2
        channels = ChannelAttention(width, config.groups[stage], bias, tokens)
        self.channel = HalfBlock(config, stage, channels)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.channel(self.spatial(x_BND))


class DaViT(ImageEncoder):
    """Images (B, 3, image_size, image_size), normalised, to memory (B, P, D), P = 1 + grid * grid:
    the mean, then the tokens row by row."""

    config: DaViTConfig

    def __init__(self, config: DaViTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.widths[-1]
        stages = [stage for stage, depth in enumerate(config.depths) for _ in range(depth)]
        passages = (Passage(config, stage) for stage in range(1, len(config.widths)))
        self.entries = nn.ModuleList([Entry(config), *passages])
        self.blocks = nn.ModuleList(Block(config, stage) for stage in stages)
        self.grid_positions = nn.Parameter(torch.zeros(1, config.grid**2, width))
        self.projection = nn.Linear(width, config.memory_width, bias=False)
        self.norm = nn.LayerNorm(config.memory_width, eps=config.layer_norm_eps)
        self.apply(initialise)
        nn.init.trunc_normal_(self.grid_positions, std=0.02)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        x_BND, blocks = images_B3HW, iter(self.blocks)
        for entry, depth in zip(self.entries, self.config.depths, strict=True):
            x_BND = entry(x_BND)
            for _ in range(depth):
                x_BND = next(blocks)(x_BND)
        x_BPD = x_BND + self.grid_positions
        memory_BPD = torch.cat([x_BPD.mean(1, keepdim=True), x_BPD], dim=1)
        return self.norm(self.projection(memory_BPD))
