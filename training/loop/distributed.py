"""One process, or several that `torchrun` started, on one machine or many.

    torchrun --standalone --nproc-per-node 4 -m -- training.train --config NAME

(`--` keeps torchrun from taking `--run` for one of its own options; on several machines
`--nnodes`, `--rdzv-backend c10d` and `--rdzv-endpoint` stand in place of `--standalone`.)
Each process trains on its share of every batch and DistributedDataParallel averages their
gradients, so that N processes make the steps that one would make. The run's folder must be on a
disk that all of them see; only the first writes to it.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from handler.errors import UserError

# The others wait this long for what the first does alone: features, validation.
PATIENCE = timedelta(hours=6)

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's place: `rank` of `world`, `local` on its own machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        self.tell(None)

    def tell(self, value: T) -> T:
        """The first one's value, for all."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of everyone's values, without gradient."""
        value = value.detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def mean(self, total: Tensor, count: Tensor) -> Tensor:
        """This process's loss, such that the average of all gradients is that of the mean over
        everything that all of them counted."""
        return total * self.world / self.sum(count)

    def share(self, batches: list[list[int]]) -> list[list[int]]:
        """This process's part of each batch."""
        if min(map(len, batches)) < self.world:
            raise UserError(
                f"{self.world} processes for a batch of {min(map(len, batches))} photos; "
                "start fewer, or set batch_photos higher"
            )
        return [batch[self.rank :: self.world] for batch in batches]

    def one_first(self, make: Callable[[], T]) -> T:
        """What `make` makes, where it keeps a file for the next to find: the first process, then
        one on each machine whose disk is another, then the rest."""
        turn = 0 if self.first else 1 if self.local == 0 else 2
        made: list[T] = []
        for number in range(3 if self.world > 1 else 1):
            if number == turn:
                made.append(make())
            self.wait()
        return made[0]

    def parallel(self, module: nn.Module) -> nn.Module:
        return module if self.world == 1 else DistributedDataParallel(module)


def join(device: torch.device) -> Processes:
    """This process's place among those that torchrun started; alone without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return Processes()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world > 1 and not dist.is_initialized():
        # What is told goes over gloo, gradients on GPUs over NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return Processes(rank, world, local)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def without_exchange(module: nn.Module, when: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients stay with this process: for all but the last batch of an accumulated step."""
    if when and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
