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
from handler.image_preprocess import seen_region
from handler.web.word_maps import WHOLE, box, on_photo, peak
from handler.words import words_of
from training.data.manifest import Manifest, Row
from training.data.scene_language import Scene, SceneObject, caption_words, referents
from training.model import Encoder, split_heads
from training.scores.captions import preprocessed


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


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(0.0, width) * max(0.0, height)
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (first, second))
    return both / (areas - both)


def judge(
    map_gg: Tensor,
    objects: Sequence[SceneObject],
    size: Sequence[int],
    seen: Sequence[float] = WHOLE,
) -> tuple[bool, float]:
    """Whether the peak of a map is inside one of the objects, and the best overlap of its box.
    `size` is that of the picture, `seen` the region of it that the map covers."""
    x, y = on_photo(peak(map_gg), seen)
    width, height = size
    boxes = [(x0 / width, y0 / height, x1 / width, y1 / height)
             for x0, y0, x1, y1 in (item["box"] for item in objects)]  # fmt: skip
    inside = any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)
    return inside, max(overlap(on_photo(box(map_gg), seen), truth) for truth in boxes)


@torch.inference_mode()
def best_layers(
    captioner: Captioner, manifest: Manifest, rows: Sequence[Row]
) -> tuple[list[int], float]:
    """The decoder layers whose mean attention points best, one of them or all, and their pointing
    accuracy (0 if no word names a shape). The words are those of one reference of each row, so that
    the choice does not depend on what the model says."""
    count = captioner.config["model"]["decoder"]["layers"]
    candidates = [[*range(count)], *([layer] for layer in range(count) if count > 1)]
    before, inside = captioner.map_layers, [0] * len(candidates)
    total = 0
    for part, images_B3SS in preprocessed(captioner, manifest, rows, disable=True):
        memory_BPD = captioner.encode(images_B3SS)
        named = [_named(row.captions[0], row.scene or {}) for row in part]
        ids = [captioner.tokenizer.encode(row.captions[0]) for row in part]
        total += sum(map(len, named))
        for number, captioner.map_layers in enumerate(candidates):
            for row, words, maps_Tgg, tokens in zip(
                part, named, captioner.attention_memory(memory_BPD, ids), ids, strict=True
            ):
                pieces = captioner.tokenizer.pieces(tokens)
                judged = _judge_words(words, pieces, maps_Tgg, row.scene or {}, captioner)
                inside[number] += sum(is_inside for is_inside, _ in judged)
    captioner.map_layers = before
    best = max(range(len(candidates)), key=inside.__getitem__)
    return candidates[best], inside[best] / max(1, total)


NamedWord = tuple[int, list[SceneObject]]


def _named(caption: str, scene: Scene) -> list[NamedWord]:
    """The words of a caption that name a shape in the picture."""
    return [(index, objects) for index, objects in referents(caption, scene) if objects]


def _judge_words(
    named: Sequence[NamedWord],
    tokens: Sequence[str],
    maps_Tgg: Tensor,
    scene: Scene,
    captioner: Captioner,
) -> list[tuple[bool, float]]:
    """`judge` for each word that names a shape, by its index among the words of `tokens`."""
    words = words_of(tokens, [0.0] * len(tokens), maps_Tgg)
    owner = [word for word in words for _ in caption_words(word.text)]
    seen = seen_region(scene["size"], captioner.preprocessing)
    return [
        judge(owner[index].map_gg, objects, scene["size"], seen)
        for index, objects in named
        if index < len(owner)  # the caption is cut at the model's positions
    ]


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
            named = [(i - given, objects) for i, objects in _named(caption.text, scene)]
            named = [(index, objects) for index, objects in named if index >= 0]
            counted += len(named)
            if not named:
                continue
            for way, maps_Tgg in all_maps(captioner, image_3SS, caption):
                results[way] += _judge_words(named, caption.tokens, maps_Tgg, scene, captioner)
    if not counted:
        raise UserError("no caption names a shape that is in its picture; train the model further")
    table = {
        way: (sum(i for i, _ in judged) / counted, sum(o for _, o in judged) / counted)
        for way, judged in results.items()
    }
    return table, counted, absent
