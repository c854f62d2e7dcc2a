"""What a family of Hugging Face captioners is, and what the families have in common: their state
dict becomes ours by a table of names and a few exact changes, such as joining query, key and value.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from handler.errors import UserError
from training.model import DecoderConfig, EncoderShape
from training.weights.fields import Section
from training.weights.rename import Names, their_names

KIND = TypeVar("KIND")
PART = re.compile(r"(.+attention)\.[kv]\.(weight|bias)")
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Weights:
    """The tensors of a model on their way to our names, which the steps below change in place.
    `where` begins every error: the file that they are from; `names` is the table of names."""

    ours: dict[str, Tensor]
    names: Names
    where: str

    def their(self, name: str) -> str:
        """What the other library calls one of our tensors."""
        return their_names([name], self.names)[0]

    def take(self, *names: str) -> list[Tensor]:
        """Takes tensors out, those that are to be made into others."""
        if missing := [name for name in names if name not in self.ours]:
            theirs = ", ".join(their_names(missing, self.names))
            raise UserError(f"{self.where}: parameters missing: {theirs}")
        return [self.ours.pop(name) for name in names]

    def join_heads(self) -> None:
        """Query, key and value of self-attention are one product here, as are key and value of
        cross-attention."""
        found = {match.groups() for name in self.ours if (match := PART.fullmatch(name))}
        for attention, kind in sorted(found):
            letters = "kv" if attention.endswith("cross_attention") else "qkv"
            parts = self.take(*(f"{attention}.{letter}.{kind}" for letter in letters))
            self.ours[f"{attention}.{letters}.{kind}"] = torch.cat(parts)

    def join_prefix(self, names: Sequence[str]) -> None:
        """The tokens before the patches, as (1, n, D)."""
        tokens = [t.reshape(1, -1, t.size(-1)) for t in self.take(*names)]
        self.ours["encoder.prefix"] = torch.cat(tokens, dim=1)


@dataclass(frozen=True)
class Family:
    """One class of transformers: functions of its parsed `config.json`.

    `configs` reads our shapes; `names` is the table of names; `arrange` makes the renamed tensors
    ours; `generation` is the generation config that its `generate` uses, where
    `generation_config.json` holds the second argument (None: there is none); `free_size` says
    whether the encoder takes photos of any size, the image processor's; `tasks` are the words of
    the prompts that it reads beside the photo, by their names, the default first; `forced` says
    that its generate may force the first and the last token.
    """

    architecture: str
    configs: Callable[[Config], tuple[EncoderShape, DecoderConfig]]
    names: Callable[[Config], Names]
    # Of the shapes that `configs` gives, the encoder's being of the family's own kind.
    arrange: Callable[[Config, Weights, Any, DecoderConfig], None]
    generation: Callable[[Config, Config | None], Config]
    free_size: Callable[[Config], bool] = lambda _: False
    tasks: Mapping[str, str] = field(default_factory=dict)
    forced: bool = False


def kind_of(section: Section, kinds: Mapping[str, KIND]) -> KIND:
    """What a section's `model_type` names. Raises UserError for any other."""
    kind = section.values.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(
            f"field '{section.prefix}model_type' is {kind!r}; only {', '.join(kinds)} can be "
            "imported"
        )
    return kinds[kind]
