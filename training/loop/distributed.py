"""Training in one process, in several on this machine, or in several that `torchrun` starts on
many.

    python -m training.train --config NAME --processes 4
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:PORT
        -m -- training.train --config NAME

(Without `--`, torchrun would interpret `--run` as one of its own options.)

Each process trains on its share of every batch, and DistributedDataParallel averages the gradients,
so that N processes make the same steps as one. The run's folder must be on a disk that all
processes can read; only the first one writes to it.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from handler.errors import UserError

# How long the others wait while the first process computes features or validates.
PATIENCE = timedelta(hours=6)
# How long a process takes to end whose connection is lost.
ENDING_SECONDS = 10

# The file by which processes of one machine find each other: no port is opened but on loopback.
STORE = "TRAINING_STORE"
FIRST = "TRAINING_FIRST"  # the id of the first of them, which has started the others
# The other processes on this machine that `together` has started.
_others: list["subprocess.Popen[bytes]"] = []

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

    def each_its_part(self, compute: Callable[[Tensor], Tensor], whole_Nx: Tensor) -> Tensor:
        """`compute` of a tensor whose rows it treats one by one, and which all processes have: each
        computes a part of the rows."""
        if self.world == 1:
            return compute(whole_Nx)
        rows = -(-len(whole_Nx) // self.world)
        missing = self.world * rows - len(whole_Nx)
        padded_Nx = torch.cat([whole_Nx, whole_Nx.new_zeros(missing, *whole_Nx.shape[1:])])
        part_nx = compute(padded_Nx[self.rank * rows :][:rows]).contiguous()
        computed_Nx = torch.empty_like(padded_Nx)
        dist.all_gather_into_tensor(computed_Nx, part_nx)
        return computed_Nx[: len(whole_Nx)]

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
                with threads_of_all():
                    made.append(make())
            self.wait()
        return made[0]

    def parallel(self, module: nn.Module) -> nn.Module:
        return module if self.world == 1 else DistributedDataParallel(module)


@contextlib.contextmanager
def threads_of_all() -> Iterator[None]:
    """While the other processes on this machine wait, this one computes in their threads, too."""
    own = torch.get_num_threads()
    torch.set_num_threads(own * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    try:
        yield
    finally:
        torch.set_num_threads(own)


def join(device: torch.device) -> Processes:
    """The position of this process among those of torchrun; a single process without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return Processes()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world > 1 and not dist.is_initialized():
        # Objects are broadcast over gloo, gradients on GPUs over NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = os.environ.get(STORE)
        if store is not None:
            _meet(Path(store), rank, world)
        dist.init_process_group(
            backend,
            init_method=None if store is None else f"file://{store}",
            timeout=PATIENCE,
            rank=rank,
            world_size=world,
        )
    return Processes(rank, world, local)


def _meet(store: Path, rank: int, world: int) -> None:
    """Returns when all processes have come so far, or raises RuntimeError if one has ended: torch
    would wait for it for as long as it waits for a validation."""
    seats = [store.with_name(f"joined-{number}") for number in range(world)]
    awaited = seats[:1] if rank else seats[1:]
    if rank:
        seats[rank].touch()
    while not all(seat.exists() for seat in awaited):
        is_orphan = rank > 0 and os.getppid() != int(os.environ[FIRST])
        if is_orphan or any(other.poll() is not None for other in _others):
            raise RuntimeError("a process ended before it had joined the others")
        time.sleep(0.05)
    if not rank:
        seats[0].touch()


def processes_for(device: torch.device, named: str, count: int) -> int:
    """How many of `count` processes can train together on a device: one on each GPU, and one alone
    on a GPU that is `named` by its number."""
    if device.type != "cuda":
        return count
    return min(count, 1 if ":" in named else torch.cuda.device_count())


@contextlib.contextmanager
def together(count: int) -> Iterator[None]:
    """Runs this program in `count` processes, of which this one is the first, and which share the
    cores. On a CPU two processes of one thread train faster than one of two threads.

    Raises UserError if another process ends early.
    """
    if count == 1 or STORE in os.environ:
        yield
        return
    if "WORLD_SIZE" in os.environ:
        raise UserError("torchrun has started several processes; leave --processes out")
    threads = max(1, torch.get_num_threads() // count)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        os.environ |= {
            STORE: f"{folder}/store",
            FIRST: str(os.getpid()),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": str(threads),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        torch.set_num_threads(threads)
        command = [sys.executable, *sys.orig_argv[1:]]
        _others.clear()
        for rank in range(count):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank:
                output = stack.enter_context(Path(folder, str(rank)).open("wb"))
                _others.append(subprocess.Popen(command, stdout=output, stderr=output))
                stack.callback(_end, _others[-1])
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
        try:
            yield
        except RuntimeError as error:  # how gloo and NCCL report a lost connection
            for rank, other in enumerate(_others, start=1):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    other.wait(ENDING_SECONDS)
                if other.returncode:
                    last = Path(folder, str(rank)).read_text(errors="replace").splitlines()[-1:]
                    raise UserError(
                        f"process {rank} of {count} ended with status {other.returncode}: "
                        + " ".join(last)
                    ) from error
            raise
        for other in _others:
            other.wait()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def without_exchange(module: nn.Module, when: bool) -> contextlib.AbstractContextManager[None]:
    """Does not average gradients: for all batches of an accumulated step but the last."""
    if when and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
