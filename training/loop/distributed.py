"""Training in one process, or in several that `torchrun` starts on one machine or many.

    torchrun --standalone --nproc-per-node 4 -m -- training.train --config NAME

(Without `--`, torchrun would interpret `--run` as one of its own options. On several machines,
replace `--standalone` with `--nnodes`, `--rdzv-backend c10d` and `--rdzv-endpoint`.)

Each process trains on its share of every batch, and DistributedDataParallel averages the gradients,
so that N processes make the same steps as one. The run's folder must be on a disk that all
processes can read; only the first one writes to it.
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

# How long the others wait while the first process computes features or validates.
PATIENCE = timedelta(hours=6)

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The position of this process: `rank` of `world`, and `local` rank on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Waits until all processes have called it."""
        self.tell(None)

    def tell(self, value: T) -> T:
        """Broadcasts the value of the first process."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of the values of all processes, without gradient."""
        value = value.detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def mean(self, total: Tensor, count: Tensor) -> Tensor:
        """The loss of this process, scaled so that the average of all gradients is the gradient of
        the mean over the counts of all processes."""
        return total * self.world / self.sum(count)

    def share(self, batches: list[list[int]]) -> list[list[int]]:
        """The part of each batch for this process."""
        if min(map(len, batches)) < self.world:
            raise UserError(
                f"{self.world} processes for a batch of {min(map(len, batches))} photos; "
                "start fewer, or increase batch_photos"
            )
        return [batch[self.rank :: self.world] for batch in batches]

    def one_first(self, make: Callable[[], T]) -> T:
        """The result of `make`, which writes a file that later calls read. It runs in the first
        process, then in one per machine, which may have another disk, then in the rest."""
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
    """The position of this process among those of torchrun; a single process without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return Processes()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world > 1 and not dist.is_initialized():
        # Objects are broadcast over gloo, gradients on GPUs over NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return Processes(rank, world, local)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def without_exchange(module: nn.Module, when: bool) -> contextlib.AbstractContextManager[None]:
    """Does not average gradients: for all batches of an accumulated step but the last."""
    if when and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
