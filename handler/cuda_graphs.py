"""Replays encoder and decoder steps as CUDA graphs.

A decoder step launches hundreds of small kernels, and launching them takes longer than running
them. A graph launches all of them at once, but only for fixed shapes and addresses. Therefore all
searches use the same buffers for keys and values, and there is one graph of the encoder per number
of photos, and one graph of the decoder per (photos, queries, step). Each is captured when it is
first needed.

Only one thread may use them at a time, because each call overwrites the buffers of the last one.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from handler.beam_search import DecoderWithMaps, KeysValues, first_photos

# Larger searches run without graphs: they gain little, and their buffers would not be freed.
MOST_PHOTOS, MOST_SLOTS = 32, 512
# Maximum number of graphs of steps and of caches; the least recently used ones are dropped.
STEPS, CACHES = 1024, 8


class GraphedEncoder:
    """An encoder (images (B, 3, S, S) -> memory (B, P, D)) with one CUDA graph per batch size."""

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
    """A `Decoder` with CUDA graphs. Each step overwrites the logits of the previous one."""

    def __init__(self, decoder: DecoderWithMaps) -> None:
        self._decoder = decoder
        self.vocab_size, self.max_positions = decoder.vocab_size, decoder.max_positions
        self._pool = torch.cuda.graph_pool_handle()
        self._memories: dict[tuple[int, ...], KeysValues] = {}
        self._caches: OrderedDict[tuple[int, int], KeysValues] = OrderedDict()
        self._logits: dict[tuple[int, ...], Tensor] = {}
        self._steps: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()

    def begin(self, memory_BPD: Tensor, prompt_BT: Tensor | None = None) -> KeysValues:
        """Like `Decoder.begin`, with the result in a buffer for this number of photos."""
        with torch.jit.optimized_execution(False):
            computed = self._decoder.begin(memory_BPD, prompt_BT)
        photos, *shape = computed.keys[0].shape
        if photos > MOST_PHOTOS:
            return computed
        capacity = _power_of_two(photos)
        buffer = self._memories.get((capacity, *shape))
        if buffer is None:
            empty = [[t.new_empty([capacity, *t.shape[1:]]) for t in part] for part in computed]
            buffer = KeysValues(*empty)
            self._memories[capacity, *shape] = buffer
        memory = first_photos(buffer, photos)
        torch._foreach_copy_([*memory.keys, *memory.values], [*computed.keys, *computed.values])
        return memory

    def new_cache(self, photos: int, slots: int) -> KeysValues:
        """A buffer for self-attention keys and values with at least `slots` slots. It is not
        cleared: each slot is written before it is read."""
        if photos > MOST_PHOTOS or slots > MOST_SLOTS:
            return self._decoder.new_cache(photos, slots)
        capacity = _power_of_two(photos), _power_of_two(slots)
        if capacity not in self._caches:
            self._caches[capacity] = self._decoder.new_cache(*capacity)
        self._caches.move_to_end(capacity)
        if len(self._caches) > CACHES:
            _, oldest = self._caches.popitem(last=False)
            for key in [key for key in self._steps if oldest.keys[0].data_ptr() in key[-2:]]:
                del self._steps[key]
        return first_photos(self._caches[capacity], photos)

    def attention(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        memory_BPD: Tensor,
        prompt_BT: Tensor | None = None,
    ) -> Tensor:
        """Like `Decoder.attention`, without a graph."""
        inputs = (tokens_BQ, positions_BQ, mask_BQS)
        with torch.jit.optimized_execution(False):
            return self._decoder.attention(*inputs, memory_BPD, prompt_BT)

    def prefill(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQQ: Tensor,
        real_BQ: Tensor,
        cache: KeysValues,
        memory: KeysValues,
    ) -> Tensor:
        """Like `Decoder.prefill`, without a graph, because prompts have many lengths."""
        with torch.jit.optimized_execution(False):
            return self._decoder.prefill(tokens_BQ, positions_BQ, mask_BQQ, real_BQ, cache, memory)

    def step(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        cache: KeysValues,
        used: int,
        memory: KeysValues,
    ) -> Tensor:
        """Like `Decoder.step`, with a graph if `cache` is one of the buffers."""
        inputs = (tokens_BQ, positions_BQ, mask_BQS)
        address = cache.keys[0].data_ptr()
        if not any(address == buffer.keys[0].data_ptr() for buffer in self._caches.values()):
            with torch.jit.optimized_execution(False):
                return self._decoder.step(*inputs, cache, used, memory)
        key = (*tokens_BQ.shape, used, address, memory.keys[0].data_ptr())
        step = self._steps.get(key)
        if step is None:
            run = partial(self._decoder.step, cache=cache, used=used, memory=memory)
            step = self._steps[key] = _Graph(run, inputs, self._logits, self._pool)
            if len(self._steps) > STEPS:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return step(inputs)


class _Graph:
    """A function captured as a CUDA graph. Its inputs are copied to fixed buffers before each
    replay."""

    def __init__(
        self,
        run: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        outputs: dict[tuple[int, ...], Tensor],
        pool: Any,
    ) -> None:
        """Captures `run(*inputs)`. The result is copied to the tensor of `outputs` for the shape of
        the first input. All graphs share these tensors, because the next graph may overwrite a
        tensor in the shared memory pool."""
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        self.device = inputs[0].device
        # Without TorchScript's optimizer, which would compile kernels during the capture.
        with torch.cuda.device(self.device), torch.jit.optimized_execution(False):
            # The first run on a stream creates the handles and workspaces of libraries.
            stream = _side_stream(self.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                first = run(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.output = outputs.setdefault(tuple(inputs[0].shape), first)
            with torch.cuda.graph(self.graph, pool=pool, stream=stream):
                self.output.copy_(run(*self.inputs))

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.output


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all graphs: torch's allocator reuses memory only on the same stream."""
    return torch.cuda.Stream(device)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
