"""The interface of a family of Hugging Face captioners, and what all families share: their state
dict is converted to ours by a table of names and a few exact operations, such as concatenating the
query, key and value weights."""

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
    """The tensors of a model under our names, which the conversion changes in place. `where`, the
    name of their file, begins each error message; `names` is the table of names."""

    ours: dict[str, Tensor]
    names: Names
    where: str

    def their(self, name: str) -> str:
        """The other library's name of one of our tensors."""
        return their_names([name], self.names)[0]

    def take(self, *names: str) -> list[Tensor]:
        """Removes tensors and returns them, to convert them to others."""
        if missing := [name for name in names if name not in self.ours]:
            theirs = ", ".join(their_names(missing, self.names))
            raise UserError(f"{self.where}: parameters missing: {theirs}")
        return [self.ours.pop(name) for name in names]

    def join_heads(self) -> None:
        """Concatenates query, key and value of self-attention to one linear layer, and key and
        value of cross-attention to another."""
        groups = {match.groups() for name in self.ours if (match := PART.fullmatch(name))}
        for attention, kind in sorted(groups):
            letters = "kv" if attention.endswith("cross_attention") else "qkv"
            parts = self.take(*(f"{attention}.{letter}.{kind}" for letter in letters))
            self.ours[f"{attention}.{letters}.{kind}"] = torch.cat(parts)

    def join_prefix(self, names: Sequence[str]) -> None:
        """Concatenates the tokens that precede the patches, to (1, n, D)."""
        tokens = [t.reshape(1, -1, t.size(-1)) for t in self.take(*names)]
        self.ours["encoder.prefix"] = torch.cat(tokens, dim=1)


@dataclass(frozen=True)
class Family:
    """One captioner class of transformers, as functions of its parsed `config.json`.

    - `configs` returns our encoder and decoder configs;
    - `names` returns the table of names;
    - `arrange` converts the renamed tensors to ours;
    - `generation` returns the generation config that its `generate` uses. The second argument is
      the content of `generation_config.json`, or None if there is none;
    - `free_size` returns whether the encoder supports photos of any size, so that the image
      processor determines it;
    - `tasks` maps the name of each prompt for its prompt encoder to the words; the first is the
      default;
    - `forced` is true if its `generate` may force the first and the last token.
    """

    architecture: str
    configs: Callable[[Config], tuple[EncoderShape, DecoderConfig]]
    names: Callable[[Config], Names]
    # Its encoder config is of the type that the family's `configs` returns.
    arrange: Callable[[Config, Weights, Any, DecoderConfig], None]
    generation: Callable[[Config, Config | None], Config]
    free_size: Callable[[Config], bool] = lambda _: False
    tasks: Mapping[str, str] = field(default_factory=dict)
    forced: bool = False


def kind_of(section: Section, kinds: Mapping[str, KIND]) -> KIND:
    """The entry of `kinds` for a section's `model_type`. Raises UserError if there is none."""
    kind = section.values.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(
            f"field '{section.prefix}model_type' is {kind!r}; only {', '.join(kinds)} can be "
            "imported"
        )
    return kinds[kind]
