"""Renames the parameters of another library to ours. An unknown or a missing parameter is an error
that gives its name in the other library.

A table of names is a sequence of (theirs, ours). `{i}` stands for the number of a layer and `{p}`
for weight or bias. A parameter whose name of ours is empty is left out.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from handler.errors import UserError

Names = Sequence[tuple[str, str]]


def rename(where: str, state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The tensors of `state` under our names. Raises UserError, whose message begins with `where`,
    for names that are not in the table, and for different tensors with the same name of ours."""
    patterns = [(_pattern(theirs), ours) for theirs, ours in names]
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        for pattern, ours in patterns:
            if match := pattern.fullmatch(key):
                name = ours.format(**match.groupdict())
                if name in renamed and not torch.equal(renamed[name], tensor):
                    raise UserError(f"{where}: {key} occurs twice, with different values")
                if name:
                    renamed[name] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        raise UserError(f"{where}: parameters that our model does not have: {few(unknown)}")
    return renamed


def fill(where: str, module: nn.Module, state: dict[str, Tensor], names: Names) -> None:
    """Loads all parameters of `module` from `state`, which has our names. Raises UserError, whose
    message begins with `where`, for an unknown or missing parameter or one of another shape."""
    expected = set(module.state_dict())
    if missing := sorted(expected - set(state)):
        raise UserError(f"{where}: parameters missing: {few(their_names(missing, names))}")
    if extra := sorted(set(state) - expected):
        extra = their_names(extra, names)
        raise UserError(f"{where}: parameters that our model does not have: {few(extra)}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:500]}") from error


def their_names(ours: Sequence[str], names: Names) -> list[str]:
    """The other library's names of our parameters, by the first entry of the table that matches."""
    theirs_of_ours = []
    for name in ours:
        matches = (
            theirs.format(**match.groupdict())
            for theirs, template in names
            if template and (match := _pattern(template).fullmatch(name))
        )
        theirs_of_ours.append(next(matches, name))
    return theirs_of_ours


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(text.replace(r"\{p\}", "(?P<p>weight|bias)"))
