"""How well the map of a word locates the object that the word names, for several ways of computing
maps, on drawn scenes, whose ground truth is known.

The words that count are those in the model's own captions that name a shape in the picture. Two
figures are computed. Pointing game (Zhang et al. 2016, arXiv:1608.00507): the share of words whose
map has its peak inside the box of such an object. Overlap: the mean intersection over union of the
map's box and the box of such an object, the best one.

The ways differ in three respects. Weights: the cross-attention of each layer and head, the mean of
a layer's heads, or the mean of all. Query: the one that predicts the word ("written"), or the one
that has it as input ("read"). Target: the memory tokens, or the patches of the photo, by rolling
out attention through the encoder (Abnar and Zuidema 2020, arXiv:2005.00928: the product of the
layers' attention, averaged over heads and then with the identity for the residual path).

Dimension key, in addition to that of training.model: L layers, T tokens, g cells along one side of
a map.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from handler.captioner import Caption, Captioner
from handler.errors import UserError
from training.data.manifest import Manifest, Row
from training.data.scene_language import caption_words, referents
from training.model import Encoder, split_heads
from training.scores.captions import preprocessed
from training.scores.pointing import judge_words, named_words


def rollout(encoder: Encoder, images_B3SS: Tensor) -> tuple[Tensor, Tensor]:
    """The memory (B, P, D), and the share of each input token in each memory token, (B, P, P); the
    rows sum to 1."""
    inputs: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        for block in encoder.blocks
    ]
    try:
        memory_BPD = encoder(images_B3SS)
    finally:
        for handle in handles:
            handle.remove()
    mixed_BPP = torch.eye(memory_BPD.size(1)).expand(memory_BPD.size(0), -1, -1)
    for block, x_BPD in zip(encoder.blocks, inputs, strict=True):
        q, k, _ = block.attention.qkv(block.norm1(x_BPD)).chunk(3, dim=-1)
        q, k = (split_heads(x, encoder.config.heads) for x in (q, k))
        weights_BPP = (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5).softmax(-1).mean(1)
        mixed_BPP = (weights_BPP + torch.eye(weights_BPP.size(-1))) / 2 @ mixed_BPP
    return memory_BPD, mixed_BPP


def ways(weights_LHQP: Tensor, mixed_PP: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the weights (Q, P) over all memory tokens for every way."""
    layers = weights_LHQP.mean(1)
    chosen = {"mean of all": layers.mean(0)}
    for layer, heads_HQP in enumerate(weights_LHQP, start=1):
        chosen[f"layer {layer}"] = heads_HQP.mean(0)
        for head, weights_QP in enumerate(heads_HQP, start=1):
            chosen[f"layer {layer} head {head}"] = weights_QP
    for name, weights_QP in chosen.items():
        yield name, weights_QP
        yield f"{name}, rolled out", weights_QP @ mixed_PP


@torch.inference_mode()
def all_maps(
    captioner: Captioner, image_3SS: Tensor, caption: Caption
) -> Iterator[tuple[str, Tensor]]:
    """Yields the name of every way and its maps of a caption's tokens, (T, g, g)."""
    grid = captioner.encoder.config.grid
    prefix = captioner.encoder.config.prefix_tokens
    memory_1PD, mixed_1PP = rollout(captioner.encoder, image_3SS.unsqueeze(0))
    first = len(caption.prompt_ids)
    tokens_1Q = torch.tensor([[captioner.tokenizer.begin_id, *caption.prompt_ids, *caption.ids]])
    # If the model has no position for the last token, no query has it as input.
    tokens_1Q = tokens_1Q[:, : captioner.decoder.max_positions]
    queries = tokens_1Q.size(1)
    positions_1Q = torch.arange(queries).unsqueeze(0)
    mask_1QQ = torch.ones(1, queries, queries, dtype=torch.bool).tril()
    weights = captioner.decoder.attention(tokens_1Q, positions_1Q, mask_1QQ, memory_1PD)
    for name, weights_QP in ways(weights[:, 0], mixed_1PP[0]):
        maps_Qgg = weights_QP[:, prefix:].unflatten(1, (grid, grid))
        maps_Qgg = maps_Qgg / maps_Qgg.sum((1, 2), keepdim=True)
        count = len(caption.ids)
        yield f"{name}, written", maps_Qgg[first:][:count]
        read = [*range(first + 1, queries), *([queries - 1] * count)][:count]
        yield f"{name}, read", maps_Qgg[read]


def measure(
    captioner: Captioner, manifest: Manifest, rows: Sequence[Row]
) -> tuple[dict[str, tuple[float, float]], int, int]:
    """Pointing accuracy and mean overlap of each way, the number of words that count, and the
    number of words that name a shape that is not in the picture."""
    results: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    counted = absent = 0
    options = captioner.options()
    for part, images_B3SS in preprocessed(captioner, manifest, rows, desc="grounding"):
        captions = captioner.caption_tensors(images_B3SS, [options] * len(part))
        for row, image_3SS, [caption, *_] in zip(part, images_B3SS, captions, strict=True):
            scene = row.scene or {}
            absent += sum(not objects for _, objects in referents(caption.text, scene))
            # A prompt's words were given: they have no maps.
            given = len(caption_words(captioner.tokenizer.decode(caption.prompt_ids)))
            named = [(i - given, objects) for i, objects in named_words(caption.text, scene)]
            named = [(index, objects) for index, objects in named if index >= 0]
            counted += len(named)
            if not named:
                continue
            for way, maps_Tgg in all_maps(captioner, image_3SS, caption):
                results[way] += judge_words(named, caption.tokens, maps_Tgg, scene, captioner)
    if not counted:
        raise UserError("no caption names a shape that is in its picture; train the model further")
    table = {
        way: (sum(i for i, _ in judged) / counted, sum(o for _, o in judged) / counted)
        for way, judged in results.items()
    }
    return table, counted, absent
