"""Linear layers for decoding on a CPU: kernels of oneDNN, and one of FBGEMM, over weights that are
packed once, after loading.

`torch.nn.Linear` reads its weight anew in a layout that suits storage. oneDNN can reorder it into
the blocks its kernel works on, which at the few rows of a decoding step makes the difference of
three to five times. A packed weight cannot be saved, so an export holds the plain one, and
`Captioner.load` calls `prepack()` on every layer here. Until then, on a GPU, or where oneDNN is
missing, the plain product gives the same result, in int8 but for the rounding of what comes in.

Every layer treats each row alone: what a photo gets never depends on its neighbours in a batch.

Dimension key: B photos, Q queries, N = B * Q, D width, V vocabulary, C candidates.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler.beam_search import greatest

# How many rows the packed layout is made for: beams of a few photos. Layouts made for one row are
# slow for more, and this one serves an encoder's hundreds as well.
ROWS = 8
# With 8 beams a search keeps at most 16 continuations of one beam. Beyond these, a rough logit
# decides only the sum that probabilities are shares of.
RESCORED = 16


class PackedLinear(nn.Module):
    """y = gelu(x W' + b) in float32, or with x, W and y rounded to bfloat16 around sums in
    float32. Gives float32, since attention rounds its logits too far in bfloat16; but for what an
    activation gives, which the next product alone reads, and would round again.

    A `gelu` that follows is computed in the same pass.
    """

    weight: Tensor
    packed: bool
    if TYPE_CHECKING:
        # TorchScript would take a declared optional for no buffer, and leave it behind on a GPU.
        bias: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        dtype: torch.dtype = torch.float32,
        gelu: nn.GELU | None = None,
    ) -> None:
        super().__init__()
        # Not copied in float32: a tied head is saved and loaded as one with its embedding.
        self.register_buffer("weight", linear.weight.detach().to(dtype))
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self.dtype = dtype
        # oneDNN's names: "none" for no activation, and for GELU by the error function.
        self.activation = "none" if gelu is None else "gelu"
        self.algorithm = "" if gelu is None else gelu.approximate
        self.rows = ROWS  # TorchScript sees attributes, no globals
        self.packed = False

    @torch.jit.export
    def prepack(self) -> None:
        """Reorders the weight for oneDNN; the plain one is given up."""
        if not self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.rows)
            self.packed = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.packed:
            y = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, self.activation, [], self.algorithm
            )
        else:
            y = F.linear(x, self.weight, self.bias)
            if self.activation == "gelu":
                y = F.gelu(y, approximate=self.algorithm)
        return y if self.activation == "gelu" else y.float()


class HalfLinear(nn.Module):
    """y = gelu(x W' + b) with W rounded to float16, all else in float32: a tenth of the error
    of bfloat16, where x is rounded too, and to 8 bits of mantissa instead of 11.

    FBGEMM's kernel reads half the bytes of float32, which is what a step of a few rows waits for,
    and multiplies in float32: at many rows it is no faster than that.
    """

    weight: Tensor
    packed: bool
    if TYPE_CHECKING:
        bias: Tensor | None  # as above

    def __init__(self, linear: nn.Linear, gelu: nn.GELU | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().half())
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.algorithm = "" if gelu is None else gelu.approximate
        # TorchScript learns the type from a value: of no use until `prepack`.
        self.kernel = torch.ops.quantized.linear_prepack_fp16(torch.zeros(1, 1), None)
        self.packed = False

    @torch.jit.export
    def prepack(self) -> None:
        """Reorders the weight for FBGEMM; the plain one is given up."""
        if not self.packed:
            self.kernel = torch.ops.quantized.linear_prepack_fp16(self.weight.float(), self.bias)
            self.weight = torch.empty([0])
            self.packed = True

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            y = torch.ops.quantized.linear_dynamic_fp16(x, self.kernel)
        else:
            y = F.linear(x, self.weight.to(x.dtype), self.bias)
        return F.gelu(y, approximate=self.algorithm) if self.algorithm != "" else y


class Int8Linear(nn.Module):
    """y = gelu(x W' + b) with W in int8, a scale for each of its rows (output channels), and
    x in 8 bits, a scale for each row of x.

    x is sent as unsigned bytes around 128, which the processor's instructions want; `offset` takes
    the 128 out again.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor
    offset: Tensor
    bias: Tensor
    packed: bool

    def __init__(self, linear: nn.Linear, gelu: nn.GELU | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(1e-10) / 127
        quantized = torch.round(weight / scale[:, None]).to(torch.int8)
        bias = weight.new_zeros(weight.size(0)) if linear.bias is None else linear.bias.detach()
        self.register_buffer("weight", quantized)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(weight.size(0), dtype=torch.int32))
        offset = -128 * quantized.sum(1, dtype=torch.int64).double() * scale.double()
        self.register_buffer("offset", offset.float())
        self.register_buffer("bias", bias.float().clone())
        self.algorithm = "" if gelu is None else gelu.approximate
        self.packed = False

    @torch.jit.export
    def prepack(self) -> None:
        """Reorders the weight for oneDNN; the plain one is given up."""
        if not self.packed:
            self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)
            self.packed = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.packed:
            # Two passes that make no copy, which in an encoder is megabytes; so below, too.
            largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
            step = largest.clamp_min_(1e-10).div_(127)
            # By way of signed bytes, to which torch has a fast kernel; 128 more, modulo 256.
            u8 = (x / step).round_().to(torch.int8).to(torch.uint8).add_(128)
            y = torch.ops.onednn.qlinear_pointwise(
                u8, 1.0, 0, self.weight, self.scale, self.zero, self.offset,
                1.0, 0, torch.float32, "none", [], "",
            )  # fmt: skip
            y = torch.addcmul(self.bias, y, step, out=y)
        else:
            y = F.linear(x, self.weight.float() * self.scale[:, None], self.bias)
        if self.algorithm != "":
            y = torch.ops.aten.gelu_(y, approximate=self.algorithm)
        return y


class RescoredHead(nn.Module):
    """Logits (B, Q, V) of (B, Q, D): those of `rough`, but for the `RESCORED` greatest of each row,
    which are computed again in float32, over the embedding that is in memory anyway (tied).

    Words that are nearly as good as each other are what rounding turns around first: on flickr8k,
    an int8 head alone changes as many captions as int8 in all other layers of the decoder.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, head: nn.Linear, rough: nn.Module) -> None:
        super().__init__()
        self.rough = rough
        # Not copied: a tied head is saved and loaded as one with its embedding.
        self.register_buffer("weight", head.weight.detach())
        bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach()
        self.register_buffer("bias", bias.float())
        self.count = min(RESCORED, head.out_features)

    def forward(self, x_BQD: Tensor) -> Tensor:
        logits_BQV = self.rough(x_BQD)
        logits_NV = logits_BQV.flatten(0, -2)
        _, candidates_NC = greatest(logits_NV, self.count)
        exact_NC1 = self.weight[candidates_NC] @ x_BQD.float().flatten(0, -2).unsqueeze(2)
        exact_NC = exact_NC1.squeeze(2) + self.bias[candidates_NC]
        return logits_NV.scatter_(1, candidates_NC, exact_NC).view_as(logits_BQV)
