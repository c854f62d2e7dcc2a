"""Another library's parameters under our names, strictly: one too many or too few is an error that
names it as the other library does.

A table of names is a sequence of (theirs, ours), in which `{i}` stands for a layer's number and
`{p}` for weight or bias; what has no name of ours is left out.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from handler.errors import UserError

Names = Sequence[tuple[str, str]]


def rename(where: str, state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The tensors of `state` under our names. Raises UserError, which begins with `where`, for
    names that the table does not know, and for two tensors of one name that differ."""
    patterns = [(_pattern(theirs), ours) for theirs, ours in names]
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        for pattern, ours in patterns:
            if match := pattern.fullmatch(key):
                name = ours.format(**match.groupdict())
                if name in renamed and not torch.equal(renamed[name], tensor):
                    raise UserError(f"{where}: {key} stands there twice, with other numbers")
                if name:
                    renamed[name] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        raise UserError(f"{where}: parameters that our model has no place for: {few(unknown)}")
    return renamed


def fill(where: str, module: nn.Module, state: dict[str, Tensor], names: Names) -> None:
    """Loads `state`, under our names, into `module`, every parameter of it. Raises UserError, which
    begins with `where`, for one too many, too few, or of another shape."""
    expected = set(module.state_dict())
    if missing := sorted(expected - set(state)):
        raise UserError(f"{where}: parameters missing: {few(their_names(missing, names))}")
    if extra := sorted(set(state) - expected):
        extra = their_names(extra, names)
        raise UserError(f"{where}: parameters that our model has no place for: {few(extra)}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:500]}") from error


def their_names(ours: Sequence[str], names: Names) -> list[str]:
    """What the other library calls our parameters (the first of the table that fits)."""
    found = []
    for name in ours:
        matches = (
            theirs.format(**match.groupdict())
            for theirs, template in names
            if template and (match := _pattern(template).fullmatch(name))
        )
        found.append(next(matches, name))
    return found


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(text.replace(r"\{p\}", "(?P<p>weight|bias)"))
