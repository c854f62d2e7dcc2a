"""Linear layers for decoding on a CPU: kernels of oneDNN, and one of FBGEMM, with weights that are
packed once after loading.

`torch.nn.Linear` stores its weight in a layout that kernels have to convert in every call. oneDNN
can reorder the weight into the blocks of its kernel, which makes the few rows of a decoding step
three to five times as fast. A packed weight cannot be saved, so an export contains the plain one,
and `Captioner.load` calls `prepack()` on every layer of this module. Before that, on a GPU, and
without oneDNN, the plain product gives the same result (in int8 except for the rounding of the
input).

Every layer processes each row independently: the result of a photo never depends on the other
photos in its batch.

Dimension key: B photos, Q queries, N = B * Q, D width, V vocabulary, C candidates.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler.beam_search import greatest

# The number of rows that the packed layout is optimized for: the beams of a few photos. A layout
# for one row is slow for more, while this one is also fast for the hundreds of rows of an encoder.
ROWS = 8
# With 8 beams a search keeps at most 16 continuations of one beam. Other logits only contribute to
# the denominator of the softmax.
RESCORED = 16


class PackedLinear(nn.Module):
    """y = gelu(x W' + b) in float32, or in bfloat16 (x, W and y) with sums in float32.

    The result is converted to float32, because bfloat16 is too coarse for the logits of attention.
    With `gelu`, which is computed in the same pass, it stays in bfloat16: only the next product
    reads it, and would round it again.
    """

    weight: Tensor
    packed: bool
    if TYPE_CHECKING:
        # TorchScript does not treat a declared Optional as a buffer and would not move it to a GPU.
        bias: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        dtype: torch.dtype = torch.float32,
        gelu: nn.GELU | None = None,
    ) -> None:
        super().__init__()
        # Not copied in float32: a tied head and its embedding are saved and loaded as one tensor.
        self.register_buffer("weight", linear.weight.detach().to(dtype))
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self.dtype = dtype
        # oneDNN's names: "none" is no activation, and also GELU computed by the error function.
        self.activation = "none" if gelu is None else "gelu"
        self.algorithm = "" if gelu is None else gelu.approximate
        self.rows = ROWS  # TorchScript can read attributes, but not globals
        self.packed = False

    @torch.jit.export
    def prepack(self) -> None:
        """Reorders the weight for oneDNN and drops the plain one."""
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
    """y = gelu(x W' + b) with W rounded to float16 and everything else in float32. The error is a
    tenth of that of bfloat16, in which x is rounded as well, and to 8 bits of mantissa instead of
    11.

    FBGEMM's kernel reads half the bytes of float32, which determines the time of a step of a few
    rows. It multiplies in float32, so it is not faster than float32 for many rows.
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
        # TorchScript infers the type from this value; `prepack` replaces it.
        self.kernel = torch.ops.quantized.linear_prepack_fp16(torch.zeros(1, 1), None)
        self.packed = False

    @torch.jit.export
    def prepack(self) -> None:
        """Reorders the weight for FBGEMM and drops the plain one."""
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
    """y = gelu(x W' + b) with W in int8, one scale for each of its rows (output channels), and x in
    8 bits, one scale for each row of x.

    x is passed as unsigned bytes with zero point 128, which the processor's instructions require;
    `offset` corrects for the 128.
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
        """Reorders the weight for oneDNN and drops the plain one."""
        if not self.packed:
            self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)
            self.packed = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.packed:
            # In place here and below: a copy has megabytes in an encoder.
            largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
            step = largest.clamp_min_(1e-10).div_(127)
            # Converted by way of int8, for which torch has a fast kernel; + 128 wraps modulo 256.
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
    """Logits (B, Q, V) of (B, Q, D): those of `rough`, with the `RESCORED` greatest of each row
    recomputed in float32 from the embedding, which is in memory anyway (tied weights).

    Rounding first changes the order of words with nearly equal logits: on flickr8k, an int8 head
    alone changes as many captions as int8 in all other layers of the decoder.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, head: nn.Linear, rough: nn.Module) -> None:
        super().__init__()
        self.rough = rough
        # Not copied: a tied head and its embedding are saved and loaded as one tensor.
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
