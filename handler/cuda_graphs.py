"""Encoder and decoder steps replayed as CUDA graphs.

A captioner is hundreds of small kernels a step, and launching them one by one takes a GPU longer
than running them. A graph launches all of them at once, but for fixed shapes and addresses: so keys
and values live in buffers that every search is given anew, and each number of photos, and each
(photos, queries, time) of a search, has a graph of its own, captured when it first comes up.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Kept, those used last.
GRAPHS = 1024


class GraphedEncoder:
    """`encoder` (images (B, 3, S, S) -> memory (B, P, D)) on a GPU."""

    def __init__(self, encoder: Callable[[Tensor], Tensor]) -> None:
        self._encoder = encoder
        self._pool = torch.cuda.graph_pool_handle()
        self._memories: dict[tuple[int, ...], Tensor] = {}
        self._graphs: dict[tuple[int, ...], _Graph] = {}

    def __call__(self, images_B3SS: Tensor) -> Tensor:
        shape = tuple(images_B3SS.shape)
        if shape not in self._graphs:
            graph = _Graph(self._encoder, (images_B3SS,), self._memories, self._pool)
            self._graphs[shape] = graph
        return self._graphs[shape]((images_B3SS,)).clone()


class GraphedDecoder:
    """`decoder` (see `training.model.Decoder`) as the search wants it, on a GPU.

    For one search at a time: the next one is given the same buffers, and the next step writes over
    the logits of the last.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.vocab_size, self.max_positions = decoder.vocab_size, decoder.max_positions
        self._pool = torch.cuda.graph_pool_handle()
        self._crosses: dict[tuple[int, ...], list[Tensor]] = {}
        self._caches: dict[tuple[int, int], list[Tensor]] = {}
        self._logits: dict[tuple[int, ...], Tensor] = {}
        self._steps: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()

    def begin(self, memory_BPD: Tensor) -> list[Tensor]:
        """Cross-attention keys and values, in the buffers kept for as many photos."""
        photos, *shape = memory_BPD.shape
        room = _power_of_two(photos)
        with torch.jit.optimized_execution(False):
            made = self._decoder.begin(memory_BPD)
        kept = self._crosses.get((room, *shape))
        if kept is None:
            kept = [keys.new_empty([room, *keys.shape[1:]]) for keys in made]
            self._crosses[room, *shape] = kept
        cross = [keys[:photos] for keys in kept]
        torch._foreach_copy_(cross, made)
        return cross

    def new_cache(self, photos: int, slots: int) -> list[Tensor]:
        """Self-attention keys and values, with room for at least as many slots; what is in them is
        written before it is read."""
        room = _power_of_two(photos), _power_of_two(slots)
        if room not in self._caches:
            self._caches[room] = self._decoder.new_cache(*room)
        return [keys[:photos] for keys in self._caches[room]]

    def attention(self, *given: Tensor) -> Tensor:
        """As `Decoder.attention`."""
        with torch.jit.optimized_execution(False):
            return self._decoder.attention(*given)

    def step(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        cache: list[Tensor],
        used: int,
        cross: list[Tensor],
    ) -> Tensor:
        """As `Decoder.step`."""
        key = (*tokens_BQ.shape, used, cache[0].data_ptr(), cross[0].data_ptr())
        inputs = (tokens_BQ, positions_BQ, mask_BQS)
        step = self._steps.get(key)
        if step is None:
            run = lambda *given: self._decoder.step(*given, cache, used, cross)  # noqa: E731
            step = self._steps[key] = _Graph(run, inputs, self._logits, self._pool)
            if len(self._steps) > GRAPHS:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return step(inputs)


class _Graph:
    """One captured function: what it reads is copied in before each replay."""

    def __init__(
        self,
        run: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        outputs: dict[tuple[int, ...], Tensor],
        pool: Any,
    ) -> None:
        """`run` takes `inputs`. What it gives goes into the tensor of `outputs` for the shape of
        the first of them: one for all graphs, since the pool's own is the next graph's, too."""
        self.inputs = [given.clone() for given in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # As it stands: what TorchScript's optimizer would compile cannot be compiled in a capture.
        with torch.jit.optimized_execution(False):
            # Libraries make their handles and workspaces in the first run on a stream.
            stream = _side_stream(torch.cuda.current_device())
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                first = run(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.output = outputs.setdefault(tuple(inputs[0].shape), first)
            with torch.cuda.graph(self.graph, pool=pool):
                self.output.copy_(run(*self.inputs))

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.output


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: torch's allocator keeps what is freed for its own stream alone."""
    return torch.cuda.Stream(device)


def _power_of_two(count: int) -> int:
    """The least one that is not below `count`."""
    return 1 << (count - 1).bit_length()
