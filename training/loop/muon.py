"""Muon (Jordan et al. 2024): the momentum of each matrix, orthogonalised.

`torch.optim.Muon` computes one matrix after the other in bfloat16, of which a CPU makes several
times as long as of float32, and every process computes all of them. Here matrices of one shape are
one product, in float32, and processes share them. The state is the same as torch's.

Dimension key: k matrices of one shape, m rows, n columns, m <= n.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.loop.distributed import Processes

# Of the quintic iteration that brings all singular values to about 1.
A, B, C = 3.4445, -4.775, 2.0315
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Steps of the size of AdamW's: .2 sqrt(larger side) times the rate (Liu et al. 2025,
    arXiv:2502.16982), with Nesterov momentum and decoupled weight decay."""

    def __init__(self, groups: Iterable[dict[str, Any]], processes: Processes) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.processes = processes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        shapes: dict[torch.Size, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append((parameter, group))
        for shape, members in shapes.items():
            directions_kmn = torch.stack([self._direction(parameter) for parameter, _ in members])
            updates_kmn = self.processes.each_its_part(orthogonalised, directions_kmn)
            for (parameter, group), update_mn in zip(members, updates_kmn, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update_mn, alpha=0.2 * max(shape) ** 0.5 * group["lr"])

    def _direction(self, parameter: Tensor) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return torch.lerp(gradient, momentum, MOMENTUM)


def orthogonalised(x_kmn: Tensor) -> Tensor:
    """Newton-Schulz iterations on (k, m, n), m > n as well. They run on the small square products
    x x', which commute with each other, and are applied to `x` once."""
    if x_kmn.size(1) > x_kmn.size(2):
        return orthogonalised(x_kmn.mT).mT
    x_kmn = x_kmn / x_kmn.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    square_kmm = x_kmn @ x_kmn.mT
    identity_mm = torch.eye(x_kmn.size(1), device=x_kmn.device)
    whole_kmm = identity_mm
    for further in range(ITERATIONS - 1, -1, -1):
        factor_kmm = torch.baddbmm(square_kmm, square_kmm, square_kmm, beta=B, alpha=C)
        factor_kmm += A * identity_mm
        whole_kmm = factor_kmm @ whole_kmm
        if further:
            square_kmm = factor_kmm @ square_kmm @ factor_kmm
    return whole_kmm @ x_kmn
