"""Joins the tokens of a caption into words with their attention maps.

Dimension key: T tokens, g cells along one side of a map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Words that do not name anything visible, for which no map or box is drawn.
FUNCTION_WORDS = frozenset(
    word
    for line in (
        "a an the this that these those some any each every another other all both no not only",
        "i you he she it we they him her them his its their our your my who which what there here",
        "and or but while as than then so if because in on at of to from into onto with without by",
        "for over under above below beneath beside between through across around near behind along",
        "against up down out off toward towards next is are was were be been being am has have",
        "had do does did can could will would may something someone very just also too",
    )
    for word in line.split()
)


@dataclass(frozen=True)
class Word:
    """A word of a caption: its text, the sum of its tokens' log-probabilities, and its attention
    map (g, g), which sums to 1."""

    text: str
    log_prob: float
    map_gg: Tensor

    @property
    def names_something(self) -> bool:
        """Whether it is a content word."""
        bare = self.text.lower().strip(".,;:!?\"'()")
        return bare not in FUNCTION_WORDS and any(c.isalnum() for c in bare)


def words_of(tokens: Sequence[str], log_probs: Sequence[float], maps_Tgg: Tensor) -> list[Word]:
    """Joins tokens into words. If tokens begin with a space (byte pairs), each such token starts a
    word, whose map is the mean of its tokens' maps; otherwise each token is a word."""
    is_subword = any(token[:1].isspace() for token in tokens)
    groups: list[list[int]] = []
    for number, token in enumerate(tokens):
        if groups and is_subword and not token[:1].isspace():
            groups[-1].append(number)
        else:
            groups.append([number])
    return [
        Word(
            "".join(tokens[i] for i in group).strip(),
            sum(log_probs[i] for i in group),
            maps_Tgg[group].mean(0),
        )
        for group in groups
    ]
