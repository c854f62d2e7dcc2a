"""Reads fields of another library's parsed `config.json` and checks their types."""

from collections.abc import Mapping
from typing import Any, TypeVar

from handler.errors import UserError

VALUE = TypeVar("VALUE", int, float, bool, str)

# Our activations by the names of theirs.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


class Section:
    """A section of a config. Its `name` precedes the names of fields in errors. A field that is
    absent or null has the default."""

    def __init__(self, config: Mapping[str, Any], name: str = "") -> None:
        values = config.get(name) if name else config
        if not isinstance(values, Mapping):
            raise UserError(f"field {name!r} is missing")
        self.values = values
        self.prefix = f"{name}." if name else ""

    def value(self, field: str, default: VALUE) -> VALUE:
        """A field, which must have the type of its default. Raises UserError."""
        value = self.values.get(field)
        if value is None:
            return default
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            kind = type(default).__name__
            raise UserError(f"field '{self.prefix}{field}' must be {kind}, not {value!r}")
        return value

    def numbers(self, field: str, default: list[VALUE]) -> tuple[VALUE, ...]:
        """A list whose values must have the type of those in the default. Raises UserError."""
        values = self.values.get(field, default)
        kind = type(default[0])
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise UserError(
                f"field '{self.prefix}{field}' must be a list of {kind.__name__}, not {values!r}"
            )
        return tuple(values)

    def demand(self, field: str, only: VALUE) -> None:
        """Raises UserError unless a field has the value `only`, the one that is supported."""
        if self.value(field, only) != only:
            raise UserError(
                f"field '{self.prefix}{field}' is {self.values[field]!r}; only {only!r} can be "
                "imported"
            )

    def side(self, field: str, default: int) -> int:
        """A size in pixels, which is a number or a list of two equal numbers. Raises UserError."""
        value = self.values.get(field, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or value < 1:
            raise UserError(
                f"field '{self.prefix}{field}' is {value!r}; only square sizes can be imported"
            )
        return value

    def activation(self, field: str, default: str) -> str:
        theirs = self.value(field, default)
        if theirs not in ACTIVATIONS:
            raise UserError(
                f"field '{self.prefix}{field}' is {theirs!r}; only {', '.join(ACTIVATIONS)} can be "
                "imported"
            )
        return ACTIVATIONS[theirs]
