"""Encoders and decoders whose blocks run in C, on x86 processors with AVX-512.

TorchScript runs a block as dozens of calls, each of which reads and writes memory; with the few
rows of a decoding step, they take longer than reading the weights. `native_blocks.c` runs all
blocks in one call. The weights are those of the script, in another layout. Results are the same up
to rounding.

Without a compiler or on other processors, everything stays TorchScript; so do a DaViT, and a
decoder with weights in float16.

C checks no bounds: shapes are checked here, those of the layers when they are taken, those of the
inputs in every call.

Dimension key: B photos, P memory tokens, D width, H heads, d head width, Q queries, S slots, V
vocabulary, L layers, T tokens of a prompt.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from handler.beam_search import KeysValues
from handler.native_library import PANEL, PLACES, Block, Linear, Norm, Run, native_library
from handler.shared_weights import Arena

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = {"gelu": 1, "gelu_tanh": 2, "quick_gelu": 3}
LAYERS = ("PackedLinear", "Int8Linear")  # of export.layers
# What C reads and writes, whatever torch's defaults are.
ON_CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def native_encoder(
    script: torch.jit.ScriptModule, config: Mapping[str, Any], name: str | None = None
) -> "NativeEncoder | None":
    """An encoder of an export, not yet packed, with its blocks in C; None, and `script` unchanged,
    where that is not possible. `config` is its section of `config.json`, which tells what a traced
    module does not: heads, activation, epsilon. Under `name` its weights are shared (see
    `handler.shared_weights`)."""
    if script.original_name != "Encoder" or not _possible(list(_encoder_layers(script)), config):
        return None
    return NativeEncoder(script, config, name) if native_library() else None


def native_decoder(
    script: torch.jit.ScriptModule, config: Mapping[str, Any], name: str | None = None
) -> "NativeDecoder | None":
    """A decoder likewise."""
    if not _possible(list(_decoder_layers(script)), config):
        return None
    return NativeDecoder(script, config, name) if native_library() else None


def _possible(layers: Sequence[Any], config: Mapping[str, Any]) -> bool:
    """Whether C has all layers and the activation, and the heads divide the width."""
    if not layers or any(getattr(x, "original_name", None) not in LAYERS for x in layers):
        return False
    heads, activation = config.get("heads"), config.get("activation")
    return (
        type(heads) is int
        and heads > 0
        and layers[0].weight.size(1) % heads == 0
        and isinstance(activation, str)
        and activation in ACTIVATIONS
        and isinstance(config.get("layer_norm_eps"), float)
    )


def _encoder_layers(script: Any) -> Iterator[Any]:
    for block in script.blocks.children():
        yield from (block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down)


def _decoder_layers(script: Any) -> Iterator[Any]:
    prompt_encoder = [] if script.prompt_encoder is None else [script.prompt_encoder]
    for part in (*prompt_encoder, script):
        for block in part.blocks.children():
            yield from (block.self_attention.qkv, block.self_attention.out)
            if block.cross_attention is not None:
                cross = block.cross_attention
                yield from (cross.kv, cross.q, cross.out)
            yield from (block.mlp.up, block.mlp.down)
    if script.head_transform.original_name != "Identity":
        yield script.head_transform.dense
    yield _rough_head(script)


def _rough_head(script: Any) -> Any:
    return script.head.rough if script.head.original_name == "RescoredHead" else script.head


def _whole(script: Any) -> dict[int, Tensor]:
    """The large tensors that are not packed, each once, by address."""
    words = script.token_embedding.weight
    tensors = [] if words.data_ptr() == _rough_head(script).weight.data_ptr() else [words]
    if script.head.original_name == "RescoredHead":
        tensors.append(script.head.weight)
    return {tensor.data_ptr(): tensor for tensor in tensors}


class _Weights:
    """The weights of a script's layers, as C reads them."""

    def __init__(
        self,
        layers: Sequence[Any],
        config: Mapping[str, Any],
        name: str | None = None,
        kept: Sequence[Tensor] = (),
    ) -> None:
        """Room for `layers`, and for the tensors that are to be `kept`."""
        library = native_library()
        assert library is not None
        self.library = library
        self.width = layers[0].weight.size(1)
        self._eps, self._activation = config["layer_norm_eps"], ACTIVATIONS[config["activation"]]
        self._kept: list[Tensor] = []  # as long as C has their addresses
        size = sum(map(self._size, layers)) + sum(map(_room, kept if name else ()))
        self._arena = Arena(size, name)
        self._memory = self._arena.memory
        self._filled = 0
        library.use_large_pages(self._memory.data_ptr(), self._memory.numel())

    def _size(self, layer: Any) -> int:
        outputs, inputs = layer.weight.shape
        return self.library.packed_bytes(KINDS[layer.weight.dtype], inputs, outputs)

    def norm(self, module: Any) -> Norm:
        if module.original_name == "Identity":
            return Norm()
        vectors = module.weight.float(), module.bias.float()
        for vector in vectors:
            _check(vector, (self.width,))
        return Norm(*map(self._address, vectors), self._eps)

    def activated(self, layer: Any) -> Linear:
        """A layer with the activation of the config behind it."""
        return self.linear(layer, activation=self._activation)

    def linear(self, layer: Any, gain: Tensor | None = None, activation: int = 0) -> Linear:
        """Packs a layer's weight and drops the plain one. `gain` multiplies its outputs."""
        weight = layer.weight.contiguous()
        outputs, inputs = weight.shape
        kind, address = KINDS[weight.dtype], self._memory.data_ptr() + self._filled
        self._filled += self._size(layer)
        if not self._arena.is_filled:
            self.library.pack(kind, inputs, outputs, weight.data_ptr(), address)
        layer.weight = weight.new_empty(0)
        offset, scale, bias = None, gain, layer.bias
        if weight.dtype == torch.int8:
            offset = self._address(128 * weight.sum(1, dtype=torch.int32))
            scale = layer.scale if gain is None else layer.scale * gain
        if bias is not None and gain is not None:
            bias = bias.float() * gain
        vectors = []
        for vector in (scale, bias):
            if vector is not None:
                _check(vector := vector.float(), (outputs,))
            vectors.append(None if vector is None else self._address(vector))
        return Linear(address, vectors[0], offset, vectors[1], kind, inputs, outputs, activation)

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor that is used as it is, shared if the others are."""
        if not self._arena.is_shared:
            return tensor.contiguous()
        place = self._memory[self._filled :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._filled += _room(tensor)
        if not self._arena.is_filled:
            place.copy_(tensor)
        return place

    def seal(self) -> None:
        """All weights are packed: other processes may share them."""
        self._arena.seal()

    def panels(self, linear: Linear) -> Tensor:
        """The weights of a packed layer in float32, (panels, inputs, outputs of a panel)."""
        start = linear.weight - self._memory.data_ptr()
        floats = self._memory[start:].view(torch.float32)
        panels = -(-linear.outputs // PANEL)
        return floats[: panels * linear.inputs * PANEL].view(panels, linear.inputs, PANEL)

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()

    def product(self, linear: Linear, x: Tensor) -> Tensor:
        """One layer by itself, (..., inputs) -> (..., outputs)."""
        _check(x, (*x.shape[:-1], linear.inputs))
        x, rows = x.contiguous(), x.numel() // linear.inputs
        y = torch.empty([*x.shape[:-1], linear.outputs], **ON_CPU)
        address = ctypes.addressof(linear)
        scratch = _scratch(self.library.linear_scratch_bytes(address, rows))
        self.library.run_linear(
            *(address, x.data_ptr(), rows, y.data_ptr(), scratch.data_ptr()),
            torch.get_num_threads(),
        )
        return y


def _room(tensor: Tensor) -> int:
    """Its bytes, up to a multiple of a line of the cache."""
    return -(-tensor.nbytes // 64) * 64


def _scratch(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _check(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    """Raises RuntimeError, as torch does."""
    if tensor.shape != tuple(shape) or tensor.dtype != dtype or not tensor.is_cpu:
        raise RuntimeError(
            f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: expected {tuple(shape)}, "
            f"{dtype} on cpu"
        )


class _Stack:
    """Blocks that run one after the other."""

    def __init__(self, weights: _Weights, blocks: Sequence[Block], heads: int) -> None:
        """Raises RuntimeError if the layers do not fit each other."""
        self.weights = weights  # whose addresses the blocks have
        self.width = width = weights.width
        self.heads, self.layers = heads, len(blocks)
        self._hidden = hidden = blocks[0].up.outputs
        for block in blocks:
            shapes = {"qkv": (width, 3 * width), "out": (width, width)}
            shapes |= {"up": (width, hidden), "down": (hidden, width)}
            if block.cross_q.weight:
                shapes |= {"cross_q": (width, width), "cross_out": (width, width)}
            for name, shape in shapes.items():
                linear = getattr(block, name)
                if (linear.inputs, linear.outputs, linear.kind) != (*shape, block.qkv.kind):
                    raise RuntimeError(f"a layer {name} of another shape or type; export again")
        self._blocks = (Block * len(blocks))(*blocks)

    def room(self, photos: int, tokens: int) -> tuple[Tensor, Tensor]:
        """For the keys, by channel, and values of photos in one layer."""
        shape = [photos, self.heads, self.width // self.heads]
        places = -(-tokens // PLACES) * PLACES
        keys_BHdp = torch.zeros([*shape, places], **ON_CPU)
        return keys_BHdp, torch.empty([*shape[:2], tokens, shape[2]], **ON_CPU)

    def read(self, x_BPD: Tensor, kept: KeysValues | None = None) -> Tensor:
        """The tokens of each photo attend to each other; `kept` receives the keys and values of
        every layer. Replaces `x`, contiguous float32."""
        for number in range(len(x_BPD)):  # one photo's numbers stay in the cache
            if kept is None:
                keys, values = self.room(1, x_BPD.size(1))
                own = KeysValues([keys] * self.layers, [values] * self.layers)
            else:
                own = KeysValues(*([t[number : number + 1] for t in part] for part in kept))
            self.run(x_BPD[number : number + 1], own, image=1)
        return x_BPD

    def run(
        self,
        x_BQD: Tensor,
        photo: KeysValues,
        cache: KeysValues | None = None,
        used: int = 0,
        mask_BQS: Tensor | None = None,
        **given: Any,
    ) -> None:
        """Replaces `x`, contiguous float32, by the output of the last block. Raises RuntimeError if
        shapes or types do not fit."""
        photos, queries, _ = x_BQD.shape
        tokens, places = photo.values[0].size(2), photo.keys[0].size(3)
        d = self.width // self.heads
        _check(x_BQD, (photos, queries, self.width))
        dtype = photo.keys[0].dtype
        _check(photo.keys[0], (photos, self.heads, d, places), dtype)
        _check(photo.values[0], (photos, self.heads, tokens, d), dtype)
        run = Run(
            blocks=ctypes.addressof(self._blocks),
            layers=self.layers,
            photos=photos,
            queries=queries,
            width=self.width,
            heads=self.heads,
            hidden=self._hidden,
            threads=torch.get_num_threads(),
            tokens=tokens,
            places=places,
            bfloat16=dtype == torch.bfloat16,
            used=used,
            x=x_BQD.data_ptr(),
            **given,
        )
        photo_keys, photo_values = self._addresses(photo.keys), self._addresses(photo.values)
        run.photo_keys, run.photo_values = map(ctypes.addressof, (photo_keys, photo_values))
        if cache is not None and mask_BQS is not None:
            _check(mask_BQS, (photos, queries, used + queries), torch.bool)
            slots = cache.keys[0].size(2)
            _check(cache.keys[0], (photos, self.heads, max(slots, used + queries), d))
            _check(cache.values[0], cache.keys[0].shape)
            cache_keys, cache_values = self._addresses(cache.keys), self._addresses(cache.values)
            run.cache_keys, run.cache_values = map(ctypes.addressof, (cache_keys, cache_values))
            run.slots = slots
            mask_BQS = mask_BQS if mask_BQS.stride(2) == 1 else mask_BQS.contiguous()
            run.mask = mask_BQS.data_ptr()
            run.mask_photo, run.mask_query = mask_BQS.stride()[:2]
        address = ctypes.addressof(run)
        scratch = _scratch(self.weights.library.scratch_bytes(address))
        run.scratch = scratch.data_ptr()
        self.weights.library.run_blocks(address)

    def _addresses(self, tensors: Sequence[Tensor]) -> Any:
        """Of all layers."""
        return (ctypes.c_void_p * self.layers)(*(tensor.data_ptr() for tensor in tensors))


class NativeEncoder:
    """Images (B, 3, S, S) -> memory (B, P, D), as the encoder of `training.model`."""

    def __init__(
        self, script: torch.jit.ScriptModule, config: Mapping[str, Any], name: str | None = None
    ) -> None:
        """Takes the weights of the blocks out of `script`."""
        self._script, self._prefix = script, getattr(script, "prefix", None)
        self._memory_positions = bool(config.get("memory_positions"))
        layers = list(_encoder_layers(script))
        weights = _Weights(layers, config, name)
        blocks = [self._block(weights, block) for block in script.blocks.children()]
        weights.seal()
        self._stack = _Stack(weights, blocks, config["heads"])
        pack_layers(script)

    def _block(self, weights: _Weights, block: Any) -> Block:
        # Without layer scale, a traced block has none of these.
        gains = [getattr(block, name, None) for name in ("scale1", "scale2")]
        return Block(
            before=(Norm * 3)(weights.norm(block.norm1), Norm(), weights.norm(block.norm2)),
            qkv=weights.linear(block.attention.qkv),
            out=weights.linear(block.attention.out, gains[0]),
            up=weights.activated(block.mlp.up),
            down=weights.linear(block.mlp.down, gains[1]),
        )

    def __call__(self, images_B3SS: Tensor) -> Tensor:
        script, positions = self._script, self._script.positions
        x_BPD = script.patch_embed(images_B3SS).flatten(2).transpose(1, 2)
        if self._prefix is not None:
            prefix_BnD = self._prefix.expand(x_BPD.size(0), -1, -1)
            if positions.size(1) == x_BPD.size(1):  # the prefix has none
                x_BPD = torch.cat([prefix_BnD, x_BPD + positions], dim=1)
            else:
                x_BPD = torch.cat([prefix_BnD, x_BPD], dim=1) + positions
        else:
            x_BPD = x_BPD + positions
        x_BPD = self._stack.read(_apply(script.norm_pre, x_BPD).contiguous())
        x_BPD = _apply(script.norm, x_BPD)
        if self._memory_positions:
            x_BPD = x_BPD + positions
        return _apply(script.projection, x_BPD)


def _apply(module: Any, x: Tensor) -> Tensor:
    """What was traced as nothing has no input."""
    return x if module.original_name == "Identity" else module(x)


class NativeDecoder:
    """A `DecoderWithMaps`, as the decoder of `training.model`."""

    def __init__(
        self, script: torch.jit.ScriptModule, config: Mapping[str, Any], name: str | None = None
    ) -> None:
        """Takes the weights of the layers out of `script`."""
        self.vocab_size, self.max_positions = script.vocab_size, script.max_positions
        self.prefix = script.prefix
        layers = list(_decoder_layers(script))
        # Keys and values of a photo are as fine as the weights, or nearly so.
        is_exact = _rough_head(script).weight.dtype == torch.float32
        self._memory_dtype = torch.float32 if is_exact else torch.bfloat16
        whole = _whole(script)
        self._weights = weights = _Weights(layers, config, name, list(whole.values()))
        kept = {address: weights.keep(tensor) for address, tensor in whole.items()}
        blocks = list(script.blocks.children())
        self._prompt_encoder, self._prompt_stack = script.prompt_encoder, None
        if self._prompt_encoder is not None:
            readers = list(self._prompt_encoder.blocks.children())
            heads = readers[0].self_attention.heads
            blocks_in_c = [_block(weights, block) for block in readers]
            self._prompt_stack = _Stack(weights, blocks_in_c, heads)
        self._kv = [
            weights.linear(block.cross_attention.kv)
            for block in blocks
            if block.cross_attention is not None
        ]
        self._stack = _Stack(weights, [_block(weights, block) for block in blocks], script.heads)
        self._positions = script.position_embedding.weight
        # Tied to the head, the embeddings of the words are in its packed form, too.
        self._words = kept.get(script.token_embedding.weight.data_ptr())
        self._embedding_norm, self._norm = script.embedding_norm, script.norm
        self._transform: tuple[Linear, Any] | None = None
        if script.head_transform.original_name != "Identity":
            transform = script.head_transform
            self._transform = weights.activated(transform.dense), transform.norm
        self._rescored = None
        if script.head.original_name == "RescoredHead":
            head, words = script.head, _rough_head(script).weight.size(0)
            self._rescored = kept[head.weight.data_ptr()], head.bias.contiguous(), head.count
            _check(self._rescored[0], (words, weights.width))
            _check(self._rescored[1], (words,))
        self._head = weights.linear(_rough_head(script))
        weights.seal()
        if self._words is None:
            self._packed_words = weights.panels(self._head)

    def begin(self, memory_BPD: Tensor, prompt_BT: Tensor | None = None) -> KeysValues:
        """Like `Decoder.begin`, with the keys by channel, (B, H, d, places): places are the tokens
        up to a multiple of PLACES. In bfloat16 unless the weights are float32."""
        if self._prompt_encoder is not None:
            memory_BPD = self._read_prompt(memory_BPD, prompt_BT)
        rooms: list[tuple[Tensor, Tensor]] = []
        if self.prefix:
            rooms = [self._stack.room(*memory_BPD.shape[:2]) for _ in range(self._stack.layers)]
            kept = KeysValues(*([room[part] for room in rooms] for part in range(2)))
            self._stack.read(memory_BPD.to(torch.float32, copy=True).contiguous(), kept)
        for linear in self._kv:
            kv_BPD = self._weights.product(linear, memory_BPD.float())
            keys_BHPd, values_BHPd = (self._by_head(x) for x in kv_BPD.chunk(2, dim=-1))
            missing = -keys_BHPd.size(2) % PLACES
            rooms.append((F.pad(keys_BHPd.transpose(2, 3), [0, missing]), values_BHPd))
        return KeysValues(
            [keys.to(self._memory_dtype).contiguous() for keys, _ in rooms],
            [values.to(self._memory_dtype).contiguous() for _, values in rooms],
        )

    def _read_prompt(self, photo_BPD: Tensor, prompt_BT: Tensor | None) -> Tensor:
        """Like `PromptEncoder.forward`."""
        encoder, stack = self._prompt_encoder, self._prompt_stack
        assert encoder is not None and stack is not None
        if prompt_BT is None:
            prompt_BT = encoder.default_1T.expand(photo_BPD.size(0), -1)
        words_BTD = self._embed_words(prompt_BT)
        x_BPD = torch.cat([photo_BPD, words_BTD], dim=1)
        x_BPD = x_BPD + encoder.positions.weight[: x_BPD.size(1)]
        return encoder.norm(stack.read(encoder.embedding_norm(x_BPD).contiguous()))

    def _by_head(self, x_BPD: Tensor) -> Tensor:
        return x_BPD.unflatten(2, (self._stack.heads, -1)).transpose(1, 2)

    def new_cache(self, photos: int, slots: int) -> KeysValues:
        """Like `Decoder.new_cache`, but not cleared: each slot is written before it is read."""
        stack = self._stack
        shape = [photos, stack.heads, slots, stack.width // stack.heads]
        layers = range(stack.layers)
        return KeysValues(*([torch.empty(shape, **ON_CPU) for _ in layers] for _ in range(2)))

    def prefill(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQQ: Tensor,
        real_BQ: Tensor,
        cache: KeysValues,
        memory: KeysValues,
    ) -> Tensor:
        """Like `Decoder.prefill`, but padding is computed as well."""
        x_BQD = self._embed(tokens_BQ, positions_BQ)
        self._stack.run(x_BQD, memory, cache, 0, mask_BQQ, prefix=self.prefix)
        return self._logits(x_BQD[:, -1:])

    def step(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        cache: KeysValues,
        used: int,
        memory: KeysValues,
    ) -> Tensor:
        """Like `Decoder.step`."""
        x_BQD = self._embed(tokens_BQ, positions_BQ)
        self._stack.run(x_BQD, memory, cache, used, mask_BQS, prefix=self.prefix)
        return self._logits(x_BQD)

    def attention(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        memory_BPD: Tensor,
        prompt_BT: Tensor | None = None,
    ) -> Tensor:
        """Like `Decoder.attention`."""
        photos, queries = tokens_BQ.shape
        memory = self.begin(memory_BPD, prompt_BT)
        shape = [self._stack.layers, photos, self._stack.heads, queries, memory.values[0].size(2)]
        weights_LBHQP = torch.empty(shape, **ON_CPU)
        self._stack.run(
            self._embed(tokens_BQ, positions_BQ),
            memory,
            self.new_cache(photos, queries),
            0,
            mask_BQS,
            prefix=self.prefix,
            weights=weights_LBHQP.data_ptr(),
        )
        weights_LBHQP = weights_LBHQP[..., : memory_BPD.size(1)]
        return weights_LBHQP / weights_LBHQP.sum(-1, keepdim=True)

    def _embed(self, tokens_BQ: Tensor, positions_BQ: Tensor) -> Tensor:
        x_BQD = self._embed_words(tokens_BQ) + F.embedding(positions_BQ, self._positions).float()
        return self._embedding_norm(x_BQD).contiguous()

    def _embed_words(self, tokens_BQ: Tensor) -> Tensor:
        if self._words is not None:
            return F.embedding(tokens_BQ, self._words).float()
        panel = self._packed_words.size(2)
        return self._packed_words[tokens_BQ // panel, :, tokens_BQ % panel]

    def _logits(self, x_BQD: Tensor) -> Tensor:
        x_BQD = self._norm(x_BQD)
        if self._transform is not None:
            dense, norm = self._transform
            x_BQD = norm(self._weights.product(dense, x_BQD))
        x_BQD = x_BQD.contiguous()
        logits_BQV = self._weights.product(self._head, x_BQD)
        if self._rescored is not None:
            weight, bias, count = self._rescored
            width, words = self._stack.width, logits_BQV.size(-1)
            rows = x_BQD.numel() // width
            self._weights.library.rescore(
                *(logits_BQV.data_ptr(), rows, words, count, x_BQD.data_ptr(), width),
                *(weight.data_ptr(), bias.data_ptr(), torch.get_num_threads()),
            )
        return logits_BQV


def _block(weights: _Weights, block: Any) -> Block:
    """A block of a decoder or a prompt encoder."""
    norms = (block.norm1, block.norm2, block.norm3)
    behind = (block.post_norm1, block.post_norm2, block.post_norm3)
    made = Block(
        before=(Norm * 3)(*map(weights.norm, norms)),
        after=(Norm * 3)(*map(weights.norm, behind)),
        qkv=weights.linear(block.self_attention.qkv),
        out=weights.linear(block.self_attention.out),
    )
    if block.cross_attention is not None:
        made.cross_q = weights.linear(block.cross_attention.q)
        made.cross_out = weights.linear(block.cross_attention.out)
    made.up, made.down = weights.activated(block.mlp.up), weights.linear(block.mlp.down)
    return made


def pack_layers(script: torch.jit.ScriptModule) -> None:
    """Packs the linear layers that still have their weights for this processor (see
    `export.layers`)."""
    if torch.backends.mkldnn.is_available():
        for module in script.modules():
            if hasattr(module, "prepack") and module.weight.numel():
                module.prepack()
