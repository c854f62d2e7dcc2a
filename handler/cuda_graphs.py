"""Encoder and decoder steps replayed as CUDA graphs.

A captioner is hundreds of small kernels a step, and launching them one by one takes a GPU longer
than running them. A graph launches all of them at once, but for fixed shapes and addresses: so keys
and values live in buffers that every search is given anew, and each number of photos, and each
(photos, queries, time) of a search, has a graph of its own, captured when it first comes up.

For one caller at a time: what the next is given lies where the last one's lay.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Larger searches run as they are: they gain little, and their buffers would stay.
MOST_PHOTOS, MOST_SLOTS = 32, 512
# Steps, and caches of keys and values, that are kept, those used last.
STEPS, CACHES = 1024, 8


class GraphedEncoder:
    """`encoder` (images (B, 3, S, S) -> memory (B, P, D)) on a GPU."""

    def __init__(self, encoder: Callable[[Tensor], Tensor]) -> None:
        self._encoder = encoder
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, ...], _Graph] = {}

    def __call__(self, images_B3SS: Tensor) -> Tensor:
        shape = tuple(images_B3SS.shape)
        if shape[0] > MOST_PHOTOS:
            with torch.jit.optimized_execution(False):
                return self._encoder(images_B3SS)
        if shape not in self._graphs:
            self._graphs[shape] = _Graph(self._encoder, (images_B3SS,), {}, self._pool)
        return self._graphs[shape]((images_B3SS,)).clone()


class GraphedDecoder:
    """`decoder` (see `training.model.Decoder`) as the search wants it, on a GPU. A step writes over
    the logits of the last."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.vocab_size, self.max_positions = decoder.vocab_size, decoder.max_positions
        self._pool = torch.cuda.graph_pool_handle()
        self._crosses: dict[tuple[int, ...], list[Tensor]] = {}
        self._caches: OrderedDict[tuple[int, int], list[Tensor]] = OrderedDict()
        self._logits: dict[tuple[int, ...], Tensor] = {}
        self._steps: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()

    def begin(self, memory_BPD: Tensor) -> list[Tensor]:
        """Cross-attention keys and values, in the buffers kept for as many photos."""
        photos, *shape = memory_BPD.shape
        with torch.jit.optimized_execution(False):
            made: list[Tensor] = self._decoder.begin(memory_BPD)
        if photos > MOST_PHOTOS:
            return made
        room = _power_of_two(photos)
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
        if photos > MOST_PHOTOS or slots > MOST_SLOTS:
            return self._decoder.new_cache(photos, slots)
        room = _power_of_two(photos), _power_of_two(slots)
        if room not in self._caches:
            self._caches[room] = self._decoder.new_cache(*room)
        self._caches.move_to_end(room)
        if len(self._caches) > CACHES:
            _, (gone, *_) = self._caches.popitem(last=False)
            for key in [key for key in self._steps if gone.data_ptr() in key[-2:]]:
                del self._steps[key]
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
        inputs = (tokens_BQ, positions_BQ, mask_BQS)
        if not any(cache[0].data_ptr() == kept[0].data_ptr() for kept in self._caches.values()):
            with torch.jit.optimized_execution(False):
                return self._decoder.step(*inputs, cache, used, cross)
        key = (*tokens_BQ.shape, used, cache[0].data_ptr(), cross[0].data_ptr())
        step = self._steps.get(key)
        if step is None:
            run = lambda *given: self._decoder.step(*given, cache, used, cross)  # noqa: E731
            step = self._steps[key] = _Graph(run, inputs, self._logits, self._pool)
            if len(self._steps) > STEPS:
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
        self.device = inputs[0].device
        # As it stands: what TorchScript's optimizer would compile cannot be compiled in a capture.
        with torch.cuda.device(self.device), torch.jit.optimized_execution(False):
            # Libraries make their handles and workspaces in the first run on a stream.
            stream = _side_stream(self.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                first = run(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.output = outputs.setdefault(tuple(inputs[0].shape), first)
            with torch.cuda.graph(self.graph, pool=pool, stream=stream):
                self.output.copy_(run(*self.inputs))

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.output


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: torch's allocator keeps what is freed for its own stream alone."""
    return torch.cuda.Stream(device)


def _power_of_two(count: int) -> int:
    """The least one that is not below `count`."""
    return 1 << (count - 1).bit_length()
