"""Captions to tokens: all captions of a photo are packed into one row.

The captions of a photo follow each other in one row of tokens. They share one encoder pass and need
no padding between them. A mask makes each caption causal and hides its neighbours.

Dimension key: B photos, Q packed tokens of a photo, P memory tokens, D width.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import UserError
from training.data.manifest import Row

IGNORED = -100  # target of padding; torch's cross-entropy leaves it out
GIVEN = -101  # target of a token that is given: part of a prompt, which is not learnt


@dataclass(frozen=True)
class Batch:
    """`photos` is (B, 3, S, S) images or (B, P, D) features; tokens, positions and targets are
    (B, Q), the mask is (B, Q, Q). `indices` are the positions of the photos in the split; `mirror`
    is true where a photo and its captions are mirrored. `prompted` tells that some targets are
    GIVEN."""

    photos: Tensor
    tokens: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor
    indices: Sequence[int]
    mirror: Sequence[bool]
    prompted: bool = False

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.photos, self.tokens, self.positions, self.targets, self.mask)
        photos, tokens, positions, targets, mask = (t.to(device) for t in tensors)
        return Batch(
            photos, tokens, positions, targets, mask, self.indices, self.mirror, self.prompted
        )

    def learnt(self, real_BQ: Tensor) -> tuple[Tensor, Tensor | None]:
        """The targets of the M tokens that are learnt, and which of the N tokens that `real_BQ`
        marks they are; None if all of them are."""
        targets_N = self.targets[real_BQ]
        if not self.prompted:
            return targets_N, None
        learnt_N = targets_N != GIVEN
        return targets_N[learnt_N], learnt_N


def pack_captions(
    captions: Sequence[Sequence[Sequence[int]]],
    tokenizer: CaptionTokenizer,
    max_tokens: int,
    given: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packs token ids [photo][caption][token] into tokens, positions, targets (B, Q) and mask
    (B, Q, Q). Each caption follows the ids `given`, whose targets are GIVEN. A text of more than
    `max_tokens` tokens, including the end token and a forced first one, is truncated and has no end
    token among its targets."""
    rows = []
    for photo in captions:
        tokens: list[int] = []
        targets: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        for number, ids in enumerate(photo):
            text = [*(given or tokenizer.opening[1:]), *ids, tokenizer.end_id][:max_tokens]
            tokens += [tokenizer.begin_id, *text[:-1]]
            targets += [GIVEN] * len(given) + text[len(given) :]
            positions += range(len(text))
            segments += [number] * len(text)
        rows.append((tokens, positions, targets, segments))
    length = max(len(row[0]) for row in rows)
    fills = (tokenizer.pad_id, 0, IGNORED, -1)
    tokens_BQ, positions_BQ, targets_BQ, segments_BQ = (
        torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in rows])
        for i, fill in enumerate(fills)
    )
    # Padding attends to padding: softmax over a row without any visible token gives NaN.
    same_BQQ = segments_BQ.unsqueeze(2) == segments_BQ.unsqueeze(1)
    return tokens_BQ, positions_BQ, targets_BQ, same_BQQ.tril()


SIDES = {"left": "right", "right": "left"}


def mirrored(caption: str) -> str:
    """The caption of the mirrored photo: left and right are swapped."""
    # Python finds "rıght" as well, without a dot on its i, where case does not matter.
    return re.sub(
        r"\b(left|right)\b",
        lambda match: SIDES.get(match[0].lower(), match[0]),
        caption,
        flags=re.IGNORECASE,
    )


class Captions:
    """Token ids of every caption of a split, original and mirrored. Each follows the ids of a
    prompt, `given`, which are not learnt. `longest` is the length of the longest caption, `cut` the
    number of captions longer than `max_tokens`; both count the prompt, the end token and a forced
    first one. `unknown` is the number of captions with a word that is not in the vocabulary."""

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: CaptionTokenizer,
        max_tokens: int,
        given: Sequence[int] = (),
    ) -> None:
        self.rows, self.tokenizer, self.max_tokens, self.given = rows, tokenizer, max_tokens, given
        if len(given) + 1 >= max_tokens:
            raise UserError(
                f"decoder.max_tokens ({max_tokens}) leaves no room for a caption behind the "
                f"{len(given)} tokens of decoding.prompt; raise it"
            )
        # Byte pairs have the space between two words at the beginning of the second.
        space = " " if given and not tokenizer.text_of(given)[-1:].isspace() else ""
        # Most captions are their own mirror image, and of drawn scenes many are equal.
        encode = cache(lambda caption: tokenizer.encode(space + caption))
        self.plain = [[encode(c) for c in row.captions] for row in rows]
        self.mirrored = [[encode(mirrored(c)) for c in row.captions] for row in rows]
        every = [ids for photo in self.plain for ids in photo]
        self.total = len(every)
        lengths = [len(given) + len(ids) + len(tokenizer.opening) for ids in every]
        self.longest = max(lengths)
        self.cut = sum(length > max_tokens for length in lengths)
        self.unknown = sum(tokenizer.unknown_id in ids for ids in every)

    def notes(self, max_new_tokens: int, borrowed: str | None = None) -> list[str]:
        """One line for each kind of loss: truncated captions, captions longer than
        `max_new_tokens`, the limit of what is generated, and unknown words. `borrowed` is the
        checkpoint that the vocabulary comes from, if it was not fitted on these captions."""
        notes = []
        if self.cut:
            notes.append(
                f"{self.cut} of {self.total} captions are longer than decoder.max_tokens "
                f"({self.max_tokens}) and are cut; the longest has {self.longest} tokens"
            )
        unsaid = sum(len(ids) > max_new_tokens for photo in self.plain for ids in photo)
        if max_new_tokens < self.max_tokens - 1 - len(self.given) and unsaid:
            notes.append(
                f"{unsaid} of {self.total} captions are longer than any that is written: raise "
                f"decoding.max_new_tokens ({max_new_tokens})"
            )
        if borrowed is not None:
            notes += self._new_words(borrowed)
        elif self.unknown:
            notes.append(
                f"{self.unknown} of {self.total} captions have words that the vocabulary lacks; "
                "lower tokenizer.min_count, raise tokenizer.vocab_size, or set tokenizer.kind: bpe"
            )
        return notes

    def _new_words(self, borrowed: str) -> list[str]:
        """The words that the vocabulary of a checkpoint lacks, in a line."""
        captions = (caption for row in self.rows for caption in row.captions)
        new = Counter(w.lower() for text in captions for w in self.tokenizer.unknown_words(text))
        if not new:
            return []
        share = sum(new.values()) / sum(len(ids) for photo in self.plain for ids in photo)
        common = ", ".join(word for word, _ in new.most_common(3))
        way_out = "fit a vocabulary: leave --from (make: FROM=) and tokenizer.checkpoint out"
        if self.tokenizer.is_word_level:
            way_out = f'add them with --add-words 2 (make: ARGS="--add-words 2"), or {way_out}'
        return [
            f"words that the vocabulary of {borrowed} lacks: {len(new)}, {share:.1%} of all words "
            f"({common}); they are learnt as unknown and never written. To learn them, {way_out}"
        ]

    def batch(self, photos: Tensor, indices: Sequence[int], mirror: Sequence[bool]) -> Batch:
        chosen = [
            (self.mirrored if flipped else self.plain)[index]
            for index, flipped in zip(indices, mirror, strict=True)
        ]
        tokens, positions, targets, mask = pack_captions(
            chosen, self.tokenizer, self.max_tokens, self.given
        )
        return Batch(photos, tokens, positions, targets, mask, indices, mirror, len(self.given) > 0)
