"""Captions -> tokens: all captions of a photo packed into one row.

The captions of a photo stand one after the other in one row of tokens, so that they share one
encoder pass and waste no padding on each other; a mask keeps each causal and apart from its
neighbours.

Dimension key: B photos, Q packed tokens of a photo, P memory tokens, D width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handler.caption_tokenizer import CaptionTokenizer
from training.data.manifest import Row

IGNORED = -100  # torch's cross-entropy leaves these targets out


@dataclass(frozen=True)
class Batch:
    """`photos` is (B, 3, S, S) images or (B, P, D) features; tokens, positions and targets are
    (B, Q), the mask (B, Q, Q). `indices` are the photos' places in the split, `mirror` says which
    of them are seen (and described) mirrored."""

    photos: Tensor
    tokens: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor
    indices: Sequence[int]
    mirror: Sequence[bool]

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.photos, self.tokens, self.positions, self.targets, self.mask)
        photos, tokens, positions, targets, mask = (t.to(device) for t in tensors)
        return Batch(photos, tokens, positions, targets, mask, self.indices, self.mirror)


def pack_captions(
    captions: Sequence[Sequence[Sequence[int]]], tokenizer: CaptionTokenizer, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packs token ids [photo][caption][token] into tokens, positions, targets (B, Q) and mask
    (B, Q, Q). A caption longer than `max_tokens`, end token included, is cut, and then learns no
    end."""
    rows = []
    for photo in captions:
        tokens: list[int] = []
        targets: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        for number, ids in enumerate(photo):
            target = [*tokenizer.opening[1:], *ids, tokenizer.end_id][:max_tokens]
            tokens += [tokenizer.begin_id, *target[:-1]]
            targets += target
            positions += range(len(target))
            segments += [number] * len(target)
        rows.append((tokens, positions, targets, segments))
    length = max(len(row[0]) for row in rows)
    fills = (tokenizer.pad_id, 0, IGNORED, -1)
    tokens_BQ, positions_BQ, targets_BQ, segments_BQ = (
        torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in rows])
        for i, fill in enumerate(fills)
    )
    # A padding query sees the other padding: a row without any visible slot would be NaN.
    same_BQQ = segments_BQ.unsqueeze(2) == segments_BQ.unsqueeze(1)
    return tokens_BQ, positions_BQ, targets_BQ, same_BQQ.tril()


SIDES = {"left": "right", "right": "left"}


def mirrored(caption: str) -> str:
    """The caption of the mirrored photo: left and right change places."""
    return re.sub(
        r"\b(left|right)\b", lambda match: SIDES[match[0].lower()], caption, flags=re.IGNORECASE
    )


class Captions:
    """Token ids of every caption of a split, as they are and mirrored. `longest` is the length of
    the longest, `cut` how many are longer than `max_tokens`; both count the end token. `unknown` is
    how many captions have a word that the vocabulary lacks."""

    def __init__(self, rows: Sequence[Row], tokenizer: CaptionTokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.plain = [[tokenizer.encode(c) for c in row.captions] for row in rows]
        self.mirrored = [[tokenizer.encode(mirrored(c)) for c in row.captions] for row in rows]
        every = [ids for photo in self.plain for ids in photo]
        self.total = len(every)
        self.longest = max(len(ids) + 1 for ids in every)
        self.cut = sum(len(ids) + 1 > max_tokens for ids in every)
        self.unknown = sum(tokenizer.unknown_id in ids for ids in every)

    def notes(self) -> list[str]:
        """What is lost of the captions, a line each."""
        notes = []
        if self.cut:
            notes.append(
                f"{self.cut} of {self.total} captions are longer than decoder.max_tokens "
                f"({self.max_tokens}) and are cut; the longest has {self.longest} tokens"
            )
        if self.unknown:
            notes.append(
                f"{self.unknown} of {self.total} captions have words that the vocabulary lacks; "
                "lower tokenizer.min_count, raise tokenizer.vocab_size, or set tokenizer.kind: bpe"
            )
        return notes

    def batch(self, photos: Tensor, indices: Sequence[int], mirror: Sequence[bool]) -> Batch:
        chosen = [
            (self.mirrored if flipped else self.plain)[index]
            for index, flipped in zip(indices, mirror, strict=True)
        ]
        tokens, positions, targets, mask = pack_captions(chosen, self.tokenizer, self.max_tokens)
        return Batch(photos, tokens, positions, targets, mask, indices, mirror)
