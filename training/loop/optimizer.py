"""Learning rates, the optimizer, the average of the weights, gradient checkpointing."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from training.config import Stage
from training.loop.distributed import Processes
from training.loop.muon import Muon
from training.model import CaptioningModel


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then cosine decay to zero."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


# The parts of an encoder behind its last block.
TOP = ("norm", "projection", "grid_positions")


def learning_rate(
    name: str, stage: Stage, encoder_layers: int, depths: Sequence[int] = ()
) -> float:
    """The peak learning rate of a parameter. In the encoder it is multiplied by
    `encoder_layer_decay` for each layer below the last norm (Clark et al. 2020, as in BEiT's
    fine-tuning). A DaViT has stages of so many blocks as `depths` says, each with an entry."""
    part, *rest = name.split(".")
    if part == "decoder":
        return stage.decoder_lr
    if rest[0] == "blocks":
        below = encoder_layers - int(rest[1])
    elif rest[0] == "entries":
        below = encoder_layers + 1 - sum(depths[: int(rest[1])])
    else:
        below = 0 if rest[0] in TOP else encoder_layers + 1
    return stage.encoder_lr * stage.encoder_layer_decay**below


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), or where the stage has `optimizer:
    muon`, Muon for the matrices of the blocks and AdamW for everything else, with the same rates.

    With Muon its state is that of both, under their names.
    """

    def __init__(self, model: CaptioningModel, stage: Stage, processes: Processes) -> None:
        matrices, others = parameter_groups(model, stage)
        self.adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), lr=0.0)
        self.muon = Muon(matrices, processes) if matrices else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self.adamw.param_groups, *(self.muon.param_groups if self.muon else ())]

    def step(self) -> None:
        self.adamw.step()
        if self.muon:
            self.muon.step()

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        state = self.adamw.state_dict()
        return {"adamw": state, "muon": self.muon.state_dict()} if self.muon else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"] if self.muon else state)
        if self.muon:
            self.muon.load_state_dict(state["muon"])


def parameter_groups(
    model: CaptioningModel, stage: Stage
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The parameter groups for Muon and for AdamW by learning rate. Vectors (biases, norms) and
    position embeddings have no weight decay."""
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    depths = getattr(model.encoder_config, "depths", ())
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.") and stage.encoder == "frozen":
            continue
        rate = learning_rate(name, stage, len(model.encoder.blocks), depths)
        decay = parameter.ndim > 1 and "position" not in name
        is_matrix = stage.optimizer == "muon" and parameter.ndim == 2 and ".blocks." in name
        groups.setdefault((is_matrix, rate, decay), []).append(parameter)
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for (is_matrix, rate, decay), parameters in groups.items():
        weight_decay = stage.weight_decay if decay else 0.0
        (matrices if is_matrix else others).append(
            {"params": parameters, "base_lr": rate, "weight_decay": weight_decay}
        )
    return matrices, others


def set_checkpointing(model: CaptioningModel, on: bool) -> None:
    """Gradient checkpointing (Chen et al. 2016): the activations within a block are recomputed in
    the backward pass instead of being kept."""
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    if model.decoder.prompt_encoder is not None:
        blocks += model.decoder.prompt_encoder.blocks
    for block in blocks:
        vars(block).pop("forward", None)
        if on:
            vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)


@torch.no_grad()
def update_average(
    average: CaptioningModel, model: CaptioningModel, decay: float, step: int
) -> None:
    """Exponential moving average of the weights. The decay is smaller in the first steps, so that
    the random initial weights soon have no influence."""
    decay = min(decay, (1 + step) / (10 + step))
    ours = [p.data for p in average.parameters()]
    theirs = [p.data for p in model.parameters()]
    torch._foreach_lerp_(ours, theirs, 1 - decay)
