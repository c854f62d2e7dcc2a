"""Whether the map of a word points at the object that the word names, on drawn scenes, and which
layers of a decoder point best."""

from collections.abc import Sequence

import torch
from torch import Tensor

from handler.captioner import Captioner, encode_prompt, written_prompt
from handler.image_preprocess import seen_region
from handler.web.word_maps import WHOLE, box, on_photo, peak
from handler.words import words_of
from training.data.manifest import Row
from training.data.scene_language import Scene, SceneObject, caption_words, referents

NamedWord = tuple[int, list[SceneObject]]


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


def named_words(caption: str, scene: Scene) -> list[NamedWord]:
    """The words of a caption that name a shape in the picture."""
    return [(index, objects) for index, objects in referents(caption, scene) if objects]


def judge_words(
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


class LayerChoice:
    """Finds the decoder layers whose mean attention points best: one of them, or all. The words are
    those of one reference of each row, so that the choice does not depend on what the model says.
    """

    def __init__(self, captioner: Captioner) -> None:
        self.captioner = captioner
        count = captioner.config["model"]["decoder"]["layers"]
        self.candidates = [[*range(count)], *([layer] for layer in range(count) if count > 1)]
        self.inside = [0] * len(self.candidates)
        self.words = 0

    @torch.inference_mode()
    def add(self, rows: Sequence[Row], memory_BPD: Tensor) -> None:
        """Judges the maps of rows whose photos are encoded already."""
        captioner = self.captioner
        named = [named_words(row.captions[0], row.scene or {}) for row in rows]
        prompt = encode_prompt(captioner.tokenizer, captioner.decoding.get("prompt"))
        written = len(written_prompt(captioner.tokenizer, prompt))
        longest = captioner.decoder.max_positions - written - 1
        ids = [captioner.tokenizer.encode(row.captions[0])[:longest] for row in rows]
        self.words += sum(map(len, named))
        before = captioner.map_layers
        for number, captioner.map_layers in enumerate(self.candidates):
            maps = captioner.attention_memory(memory_BPD, ids, [prompt] * len(ids))
            for row, words, maps_Tgg, tokens in zip(rows, named, maps, ids, strict=True):
                pieces = captioner.tokenizer.pieces(tokens)
                judged = judge_words(words, pieces, maps_Tgg, row.scene or {}, captioner)
                self.inside[number] += sum(is_inside for is_inside, _ in judged)
        captioner.map_layers = before

    def best(self) -> tuple[list[int], float]:
        """The layers and their pointing accuracy, 0 if no word names a shape."""
        best = max(range(len(self.candidates)), key=self.inside.__getitem__)
        return self.candidates[best], self.inside[best] / max(1, self.words)
