"""Print every field of a config as Markdown (`docs/config.md`)."""

import dataclasses
import typing
from typing import Any

from handler.errors import ArgumentParser, run_command
from training.config import (
    UNIONS,
    DecoderShape,
    Distillation,
    EncoderSource,
    SelfCritical,
    Stage,
    TokenizerChoice,
    TrainConfig,
    Validation,
    choices_of,
)

SECTIONS = {
    "The whole run": TrainConfig,
    "`encoder`": EncoderSource,
    "`decoder`": DecoderShape,
    "`tokenizer`": TokenizerChoice,
    "Each of `stages`": Stage,
    "`distillation` of a stage": Distillation,
    "`self_critical` of a stage": SelfCritical,
    "`validation`": Validation,
}
HEAD = """# Every field of a config

A config is a YAML file. `CONFIG=` is the name of a preset under `training/configs/`, or a path. An
unknown field, a value out of its range and a contradiction between fields are errors that are found
before any other file is read. This page is the output of `python -m training.describe_config` and
describes the dataclasses in `training/config.py`.
"""


def section(heading: str, kind: Any) -> str:
    """A heading and a table with a line for each field of a dataclass."""
    hints = typing.get_type_hints(kind)
    lines = [
        f"\n## {heading}\n",
        "| field | values | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for item in dataclasses.fields(kind):
        values = allowed(hints[item.name], item.metadata["range"])
        lines.append(f"| `{item.name}` | {values} | {default(item)} | {item.metadata['about']} |")
    return "\n".join(lines) + "\n"


def allowed(kind: Any, limits: Any) -> str:
    """The values of a field: its choices, its range, or its kind."""
    if choices := choices_of(kind):
        return ", ".join(f"`{choice}`" for choice in choices)
    if typing.get_origin(kind) in UNIONS:
        kind = typing.get_args(kind)[0]
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
        return "a mapping"
    if typing.get_origin(kind) is tuple:
        return "a list"
    name = {str: "a string", bool: "true, false", int: "an integer", float: "a number"}[kind]
    return f"{name}, {limits.text}" if limits else name


def default(item: Any) -> str:
    if item.metadata["default"]:
        return str(item.metadata["default"])
    if item.default_factory is not dataclasses.MISSING:
        return "the defaults below" if dataclasses.is_dataclass(item.default_factory) else "empty"
    if item.default is dataclasses.MISSING:
        return "required"
    if item.default is None:
        return "none"
    return f"`{str(item.default).lower() if isinstance(item.default, bool) else item.default}`"


def main() -> None:
    ArgumentParser(prog="training.describe_config", description=__doc__).parse_args()
    print(HEAD + "".join(section(*item) for item in SECTIONS.items()), end="")


if __name__ == "__main__":
    run_command(main)
