"""Encoder and decoder steps replayed as CUDA graphs.

A captioner is hundreds of small kernels a step, and launching them one by one takes a GPU longer
than running them. A graph launches all of them at once, but for fixed shapes and addresses: so keys
and values live in buffers that every search is given anew, and each number of photos, and each
(photos, queries, time) of a search, has a graph of its own, captured when it first comes up.

For one caller at a time: what the next is given lies where the last one's lay.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from handler.beam_search import DecoderWithMaps, KeysValues, first_photos

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
    """`decoder` on a GPU, as the search wants it. A step writes over the logits of the last."""

    def __init__(self, decoder: DecoderWithMaps) -> None:
        self._decoder = decoder
        self.vocab_size, self.max_positions = decoder.vocab_size, decoder.max_positions
        self._pool = torch.cuda.graph_pool_handle()
        self._memories: dict[tuple[int, ...], KeysValues] = {}
        self._caches: OrderedDict[tuple[int, int], KeysValues] = OrderedDict()
        self._logits: dict[tuple[int, ...], Tensor] = {}
        self._steps: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()

    def begin(self, memory_BPD: Tensor, prompt_BT: Tensor | None = None) -> KeysValues:
        """As `Decoder.begin`, in the buffers kept for as many photos."""
        with torch.jit.optimized_execution(False):
            made = self._decoder.begin(memory_BPD, prompt_BT)
        photos, *shape = made.keys[0].shape
        if photos > MOST_PHOTOS:
            return made
        room = _power_of_two(photos)
        kept = self._memories.get((room, *shape))
        if kept is None:
            room_for = [[t.new_empty([room, *t.shape[1:]]) for t in part] for part in made]
            kept = KeysValues(*room_for)
            self._memories[room, *shape] = kept
        memory = first_photos(kept, photos)
        torch._foreach_copy_([*memory.keys, *memory.values], [*made.keys, *made.values])
        return memory

    def new_cache(self, photos: int, slots: int) -> KeysValues:
        """Self-attention keys and values, with room for at least as many slots; what is in them is
        written before it is read."""
        if photos > MOST_PHOTOS or slots > MOST_SLOTS:
            return self._decoder.new_cache(photos, slots)
        room = _power_of_two(photos), _power_of_two(slots)
        if room not in self._caches:
            self._caches[room] = self._decoder.new_cache(*room)
        self._caches.move_to_end(room)
        if len(self._caches) > CACHES:
            _, oldest = self._caches.popitem(last=False)
            for key in [key for key in self._steps if oldest.keys[0].data_ptr() in key[-2:]]:
                del self._steps[key]
        return first_photos(self._caches[room], photos)

    def attention(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        memory_BPD: Tensor,
        prompt_BT: Tensor | None = None,
    ) -> Tensor:
        """As `Decoder.attention`."""
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
        """As `Decoder.prefill`; never a graph, since prompts have all lengths."""
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
        """As `Decoder.step`."""
        inputs = (tokens_BQ, positions_BQ, mask_BQS)
        address = cache.keys[0].data_ptr()
        if not any(address == kept.keys[0].data_ptr() for kept in self._caches.values()):
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
