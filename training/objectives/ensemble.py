"""An ensemble of captioners: the mean of their word distributions (Hinton et al. 2015,
arXiv:1503.02531, section 1). It may have a single member.

All members must have the same vocabulary and the same preprocessing; encoders and decoders may have
any shape. The search uses an ensemble as one decoder: the keys and values of all members are in one
list, and the memory that the search passes to `begin` is the concatenation of all memories.

Dimension key: B photos, Q queries, S slots, P memory tokens, D width, V vocabulary, N the elements
of all memories of a photo.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from handler.beam_search import KeysValues
from training.model import CaptioningModel, Decoder, ImageEncoder


class Ensemble:
    """The members' `encoders`, each once, and `decoders`; `encoder_of` says which memory a decoder
    reads. `begin`, `new_cache`, `prefill`, `step`, `vocab_size` and `max_positions` are those that
    `handler.beam_search.search` asks of a decoder."""

    def __init__(self, models: Sequence[CaptioningModel]) -> None:
        self.encoders: list[ImageEncoder] = []
        self.encoder_of: list[int] = []
        for model in models:
            differences = [encoder_difference(model.encoder, encoder) for encoder in self.encoders]
            if None not in differences:
                differences.append(None)
                self.encoders.append(model.encoder)
            self.encoder_of.append(differences.index(None))
        self.decoders = [model.decoder for model in models]
        self.vocab_size = self.decoders[0].vocab_size
        self.max_positions = min(decoder.max_positions for decoder in self.decoders)

    def to(self, device: torch.device) -> "Ensemble":
        for part in (*self.encoders, *self.decoders):
            part.to(device)
        return self

    def encode(self, images_B3SS: Tensor) -> list[Tensor]:
        """The memory (B, P, D) of each of `encoders`."""
        return [encoder(images_B3SS) for encoder in self.encoders]

    def log_probs(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQQ: Tensor,
        memories: Sequence[Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """Teacher forcing: the logarithm (B, Q, V) of the mean of the members' distributions, each
        softened by `temperature`."""
        return mean_log_probs(
            [
                decoder(tokens_BQ, positions_BQ, mask_BQQ, memories[number]) / temperature
                for decoder, number in zip(self.decoders, self.encoder_of, strict=True)
            ]
        )

    def encode_flat(self, images_B3SS: Tensor) -> Tensor:
        """All memories in one tensor (B, 1, N), as the search requires."""
        return torch.cat([m.flatten(1) for m in self.encode(images_B3SS)], dim=1).unsqueeze(1)

    def begin(self, memory_B1N: Tensor, prompt_BT: Tensor | None = None) -> KeysValues:
        shapes = [(e.config.memory_tokens, e.config.memory_width) for e in self.encoders]
        parts = memory_B1N.squeeze(1).split([tokens * width for tokens, width in shapes], dim=1)
        memories = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        pairs = zip(self.decoders, self.encoder_of, strict=True)
        return _laid_end_to_end(
            [decoder.begin(memories[number], prompt_BT) for decoder, number in pairs]
        )

    def new_cache(self, photos: int, slots: int) -> KeysValues:
        return _laid_end_to_end([decoder.new_cache(photos, slots) for decoder in self.decoders])

    def prefill(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQQ: Tensor,
        real_BQ: Tensor,
        cache: KeysValues,
        memory: KeysValues,
    ) -> Tensor:
        """As `step`, of the tokens that the texts begin with: (B, 1, V)."""
        return mean_log_probs(
            [
                decoder.prefill(tokens_BQ, positions_BQ, mask_BQQ, real_BQ, own_cache, own_memory)
                for decoder, own_cache, own_memory in self._members(cache, memory)
            ]
        )

    def step(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        cache: KeysValues,
        used: int,
        memory: KeysValues,
    ) -> Tensor:
        """The logarithm (B, Q, V) of the members' mean distribution, which serves as logits."""
        return mean_log_probs(
            [
                decoder.step(tokens_BQ, positions_BQ, mask_BQS, own_cache, used, own_memory)
                for decoder, own_cache, own_memory in self._members(cache, memory)
            ]
        )

    def _members(
        self, cache: KeysValues, memory: KeysValues
    ) -> Iterator[tuple[Decoder, KeysValues, KeysValues]]:
        """Each decoder with its own part of both."""
        start = 0
        for decoder in self.decoders:
            part = slice(start, start + len(decoder.blocks))
            own_cache, own_memory = (
                KeysValues(of.keys[part], of.values[part]) for of in (cache, memory)
            )
            yield decoder, own_cache, own_memory
            start = part.stop


def _laid_end_to_end(members: Sequence[KeysValues]) -> KeysValues:
    """Concatenates the lists of layers of all members."""
    return KeysValues(
        [keys for member in members for keys in member.keys],
        [values for member in members for values in member.values],
    )


def mean_log_probs(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of the distributions with the logits (..., V)."""
    if len(logits) == 1:
        return logits[0].log_softmax(-1)
    logs = torch.stack([one.log_softmax(-1) for one in logits])
    return logs.logsumexp(0) - math.log(len(logits))


def encoder_difference(one: ImageEncoder, other: ImageEncoder) -> str | None:
    """The difference due to which two encoders compute different memories: a field of their
    configs, or `weights`; None if there is none. Dropout is ignored: it is off in inference."""
    theirs = dataclasses.asdict(other.config)
    for name, value in dataclasses.asdict(one.config).items():
        if value != theirs.get(name) and name != "dropout":
            return name
    state = other.state_dict()
    same = all(torch.equal(w.cpu(), state[name].cpu()) for name, w in one.state_dict().items())
    return None if same else "weights"
