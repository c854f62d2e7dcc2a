"""Encoders and decoders whose blocks run in C, on x86 processors with AVX-512.

TorchScript runs a block as dozens of calls, each of which reads and writes memory; with the few
rows of a decoding step, they take longer than reading the weights. `native_blocks.c` runs all
blocks in one call. The weights are those of the script, in another layout. Results are the same up
to rounding.

Without a compiler, on other processors, for DaViT and for decoders with weights in float16,
everything stays TorchScript.

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
from handler.native_library import Block, Linear, Norm, Run, native_library

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3}
LAYERS = ("PackedLinear", "Int8Linear")  # of export.layers
# A photo has a multiple of so many places for its keys (PLACES in C).
PLACES = 32


def native_encoder(
    script: torch.jit.ScriptModule, config: Mapping[str, Any]
) -> "NativeEncoder | None":
    """An encoder of an export, not yet packed, with its blocks in C; None, and `script` unchanged,
    where that is not possible. `config` is its section of `config.json`."""
    layers = [] if "kind" in config else list(_encoder_layers(script))
    if not _possible(layers, config):
        return None
    return NativeEncoder(script, config) if native_library() else None


def native_decoder(
    script: torch.jit.ScriptModule, config: Mapping[str, Any]
) -> "NativeDecoder | None":
    """A decoder likewise."""
    if not _possible(list(_decoder_layers(script)), config):
        return None
    return NativeDecoder(script, config) if native_library() else None


def _possible(layers: Sequence[Any], config: Mapping[str, Any]) -> bool:
    """Whether C has all layers, and the config, which may have been edited, fits them: C checks no
    bounds. What does not fit stays TorchScript, which does."""
    if not layers or any(getattr(x, "original_name", None) not in LAYERS for x in layers):
        return False
    width, heads = layers[0].weight.size(1), config.get("heads")
    return (
        config.get("width") == width
        and type(heads) is int
        and heads > 0
        and width % heads == 0
        and config.get("activation") in ACTIVATIONS
        and type(config.get("layer_norm_eps")) is float
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


class _Weights:
    """The weights of a script's layers, as C reads them."""

    def __init__(self, layers: Sequence[Any], config: Mapping[str, Any]) -> None:
        library = native_library()
        assert library is not None
        self.library = library
        self._eps, self._activation = config["layer_norm_eps"], ACTIVATIONS[config["activation"]]
        self._kept: list[Tensor] = []  # as long as C has their addresses
        self._arena = torch.empty(sum(map(self._size, layers)), dtype=torch.uint8)
        self._filled = 0
        library.use_large_pages(self._arena.data_ptr(), self._arena.numel())

    def _size(self, layer: Any) -> int:
        outputs, inputs = layer.weight.shape
        return self.library.packed_bytes(KINDS[layer.weight.dtype], inputs, outputs)

    def norm(self, module: Any) -> Norm:
        if module.original_name == "Identity":
            return Norm()
        return Norm(self._address(module.weight), self._address(module.bias), self._eps)

    def activated(self, layer: Any) -> Linear:
        """A layer with the activation of the config behind it."""
        return self.linear(layer, activation=self._activation)

    def linear(self, layer: Any, gain: Tensor | None = None, activation: int = 0) -> Linear:
        """Packs a layer's weight and drops the plain one. `gain` multiplies its outputs."""
        weight = layer.weight.contiguous()
        outputs, inputs = weight.shape
        kind, address = KINDS[weight.dtype], self._arena.data_ptr() + self._filled
        self._filled += self._size(layer)
        self.library.pack(kind, inputs, outputs, weight.data_ptr(), address)
        layer.weight = weight.new_empty(0)
        offset, scale, bias = None, gain, layer.bias
        if weight.dtype == torch.int8:
            offset = self._address(128 * weight.sum(1, dtype=torch.int32))
            scale = layer.scale if gain is None else layer.scale * gain
        if bias is not None and gain is not None:
            bias = bias.float() * gain
        vectors = [None if v is None else self._address(v.float()) for v in (scale, bias)]
        return Linear(address, vectors[0], offset, vectors[1], kind, inputs, outputs, activation)

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()

    def product(self, linear: Linear, x: Tensor) -> Tensor:
        """One layer by itself, (..., inputs) -> (..., outputs)."""
        x = x.contiguous()
        rows = x.numel() // linear.inputs
        y = x.new_empty([*x.shape[:-1], linear.outputs])
        scratch = torch.empty(rows * (4 * linear.inputs + 8), dtype=torch.uint8)
        self.library.run_linear(
            *(ctypes.addressof(linear), x.data_ptr(), rows, y.data_ptr(), scratch.data_ptr()),
            torch.get_num_threads(),
        )
        return y


class _Stack:
    """Blocks that run one after the other."""

    def __init__(self, weights: _Weights, blocks: Sequence[Block], width: int, heads: int) -> None:
        self._library = weights.library
        self._weights = weights
        self.width, self.heads, self.layers = width, heads, len(blocks)
        self._hidden = blocks[0].up.outputs
        self._blocks = (Block * len(blocks))(*blocks)

    def room(self, photos: int, tokens: int) -> tuple[Tensor, Tensor]:
        """For the keys, by channel, and values of photos in one layer."""
        shape = [photos, self.heads, self.width // self.heads]
        places = -(-tokens // PLACES) * PLACES
        return torch.zeros(*shape, places), torch.empty(*shape[:2], tokens, shape[2])

    def read(self, x_BPD: Tensor) -> Tensor:
        """The tokens of each photo attend to each other. Replaces `x`, contiguous float32."""
        for x_1PD in x_BPD.split(1):  # what is made of one photo stays in the cache
            keys, values = self.room(*x_1PD.shape[:2])
            self.run(x_1PD, KeysValues([keys] * self.layers, [values] * self.layers), image=1)
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
        """Replaces `x`, contiguous float32, by the output of the last block."""
        photos, queries, _ = x_BQD.shape
        run = Run(
            blocks=ctypes.addressof(self._blocks),
            layers=self.layers,
            photos=photos,
            queries=queries,
            width=self.width,
            heads=self.heads,
            hidden=self._hidden,
            threads=torch.get_num_threads(),
            tokens=photo.values[0].size(2),
            places=photo.keys[0].size(3),
            half=photo.keys[0].dtype == torch.bfloat16,
            used=used,
            x=x_BQD.data_ptr(),
            **given,
        )
        photo_keys, photo_values = _addresses(photo.keys), _addresses(photo.values)
        run.photo_keys, run.photo_values = map(ctypes.addressof, (photo_keys, photo_values))
        if cache is not None and mask_BQS is not None:
            cache_keys, cache_values = _addresses(cache.keys), _addresses(cache.values)
            run.cache_keys, run.cache_values = map(ctypes.addressof, (cache_keys, cache_values))
            run.slots = cache.keys[0].size(2)
            mask_BQS = mask_BQS if mask_BQS.stride(2) == 1 else mask_BQS.contiguous()
            run.mask = mask_BQS.data_ptr()
            run.mask_photo, run.mask_query = mask_BQS.stride()[:2]
        address = ctypes.addressof(run)
        scratch = torch.empty(self._library.scratch_bytes(address), dtype=torch.uint8)
        run.scratch = scratch.data_ptr()
        self._library.run_blocks(address)


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


class NativeEncoder:
    """Images (B, 3, S, S) -> memory (B, P, D), as the encoder of `training.model`."""

    def __init__(self, script: torch.jit.ScriptModule, config: Mapping[str, Any]) -> None:
        """Takes the weights of the blocks out of `script`."""
        self._script, self._config = script, config
        weights = _Weights(list(_encoder_layers(script)), config)
        blocks = [self._block(weights, block) for block in script.blocks.children()]
        self._stack = _Stack(weights, blocks, config["width"], config["heads"])
        pack_layers(script)

    def _block(self, weights: _Weights, block: Any) -> Block:
        gains = [None, None]
        if self._config.get("layer_scale"):
            gains = [block.scale1.detach(), block.scale2.detach()]
        return Block(
            before=(Norm * 3)(weights.norm(block.norm1), Norm(), weights.norm(block.norm2)),
            qkv=weights.linear(block.attention.qkv),
            out=weights.linear(block.attention.out, gains[0]),
            up=weights.activated(block.mlp.up),
            down=weights.linear(block.mlp.down, gains[1]),
        )

    def __call__(self, images_B3SS: Tensor) -> Tensor:
        script, prefix = self._script, self._config.get("prefix_tokens", 1)
        x_BPD = script.patch_embed(images_B3SS).flatten(2).transpose(1, 2)
        positions = script.positions
        if prefix:
            prefix_BnD = script.prefix.expand(x_BPD.size(0), -1, -1)
            if self._config.get("prefix_positions", True):
                x_BPD = torch.cat([prefix_BnD, x_BPD], dim=1) + positions
            else:
                x_BPD = torch.cat([prefix_BnD, x_BPD + positions], dim=1)
        else:
            x_BPD = x_BPD + positions
        x_BPD = self._stack.read(_apply(script.norm_pre, x_BPD).contiguous())
        return _apply(script.projection, _apply(script.norm, x_BPD))


def _apply(module: Any, x: Tensor) -> Tensor:
    """What was traced as nothing has no input."""
    return x if module.original_name == "Identity" else module(x)


class NativeDecoder:
    """A `DecoderWithMaps`, as the decoder of `training.model`."""

    def __init__(self, script: torch.jit.ScriptModule, config: Mapping[str, Any]) -> None:
        """Takes the weights of the layers out of `script`."""
        self.vocab_size, self.max_positions = script.vocab_size, script.max_positions
        self.prefix = script.prefix
        layers = list(_decoder_layers(script))
        # Keys and values of a photo are as fine as the weights, or nearly so.
        self._half = _rough_head(script).weight.dtype != torch.float32
        self._weights = weights = _Weights(layers, config)
        width, blocks = config["width"], list(script.blocks.children())
        self._prompt_encoder, self._prompt_stack = script.prompt_encoder, None
        if self._prompt_encoder is not None:
            readers = list(self._prompt_encoder.blocks.children())
            heads = readers[0].self_attention.heads
            blocks_in_c = [_block(weights, block) for block in readers]
            self._prompt_stack = _Stack(weights, blocks_in_c, width, heads)
        self._kv = [
            weights.linear(block.cross_attention.kv)
            for block in blocks
            if block.cross_attention is not None
        ]
        self._stack = _Stack(
            weights, [_block(weights, block) for block in blocks], width, script.heads
        )
        self._embeddings = script.token_embedding.weight, script.position_embedding.weight
        self._embedding_norm, self._norm = script.embedding_norm, script.norm
        self._transform: tuple[Linear, Any] | None = None
        if script.head_transform.original_name != "Identity":
            transform = script.head_transform
            self._transform = weights.activated(transform.dense), transform.norm
        self._rescored = None
        if script.head.original_name == "RescoredHead":
            self._rescored = script.head.weight, script.head.bias, script.head.count
        self._head = weights.linear(_rough_head(script))

    def begin(self, memory_BPD: Tensor, prompt_BT: Tensor | None = None) -> KeysValues:
        """Like `Decoder.begin`, with the keys by channel, (B, H, d, places): places are the tokens
        up to a multiple of PLACES. In bfloat16 unless the weights are float32."""
        if self._prompt_encoder is not None:
            memory_BPD = self._read_prompt(memory_BPD, prompt_BT)
        rooms: list[tuple[Tensor, Tensor]] = []
        if self.prefix:
            rooms = [self._stack.room(*memory_BPD.shape[:2]) for _ in range(self._stack.layers)]
            photo = KeysValues([keys for keys, _ in rooms], [values for _, values in rooms])
            x_BPD = memory_BPD.to(torch.float32, copy=True).contiguous()
            self._stack.run(x_BPD, photo, image=1)
        for linear in self._kv:
            kv_BPD = self._weights.product(linear, memory_BPD.float())
            keys_BHPd, values_BHPd = (self._by_head(x) for x in kv_BPD.chunk(2, dim=-1))
            missing = -keys_BHPd.size(2) % PLACES
            rooms.append((F.pad(keys_BHPd.transpose(2, 3), [0, missing]), values_BHPd))
        dtype = torch.bfloat16 if self._half else torch.float32
        return KeysValues(
            [keys.to(dtype).contiguous() for keys, _ in rooms],
            [values.to(dtype).contiguous() for _, values in rooms],
        )

    def _read_prompt(self, photo_BPD: Tensor, prompt_BT: Tensor | None) -> Tensor:
        """Like `PromptEncoder.forward`."""
        encoder, stack = self._prompt_encoder, self._prompt_stack
        assert encoder is not None and stack is not None
        if prompt_BT is None:
            prompt_BT = encoder.default_1T.expand(photo_BPD.size(0), -1)
        words_BTD = F.embedding(prompt_BT, self._embeddings[0])
        x_BPD = torch.cat([photo_BPD, words_BTD], dim=1)
        x_BPD = x_BPD + encoder.positions.weight[: x_BPD.size(1)]
        return encoder.norm(stack.read(encoder.embedding_norm(x_BPD).contiguous()))

    def _by_head(self, x_BPD: Tensor) -> Tensor:
        return x_BPD.unflatten(2, (self._stack.heads, -1)).transpose(1, 2)

    def new_cache(self, photos: int, slots: int) -> KeysValues:
        """Like `Decoder.new_cache`, but not cleared: each slot is written before it is read."""
        stack = self._stack
        shape = [photos, stack.heads, slots, stack.width // stack.heads]
        return KeysValues(*([torch.empty(shape) for _ in range(stack.layers)] for _ in range(2)))

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
        weights_LBHQP = torch.empty(shape)
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
        words, places = self._embeddings
        x_BQD = F.embedding(tokens_BQ, words).float() + F.embedding(positions_BQ, places).float()
        return self._embedding_norm(x_BQD).contiguous()

    def _logits(self, x_BQD: Tensor) -> Tensor:
        x_BQD = self._norm(x_BQD)
        if self._transform is not None:
            dense, norm = self._transform
            x_BQD = norm(self._weights.product(dense, x_BQD))
        x_BQD = x_BQD.contiguous()
        logits_BQV = self._weights.product(self._head, x_BQD)
        if self._rescored is not None:
            weight, bias, count = self._rescored
            width = self._stack.width
            rows = x_BQD.numel() // width
            self._weights.library.rescore(
                *(logits_BQV.data_ptr(), rows, self.vocab_size, count, x_BQD.data_ptr(), width),
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
