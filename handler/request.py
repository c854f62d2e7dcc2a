"""Parses the fields of a request to a photo and options, or raises a typed error. It can be tested
without a server."""

import argparse
import base64
import json
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from handler.beam_search import OPTIONS, DecodeOptions, InvalidParameter, Option
from handler.errors import (
    ImageTooComplex,
    ImageTooLarge,
    InvalidImage,
    UnsupportedMediaType,
    UserError,
)
from handler.files import as_utf8
from handler.image_decode import sniff

IMAGE_FIELDS = ("image", "data")
FLAGS = ("attention", "stream")
# Names of a model's sizes in the ranges of options, when no model is loaded.
SIZES = {
    "positions": "the model's positions less one",
    "half": "half of the model's positions in",
    "vocabulary": "the vocabulary",
}
# Stricter than Python's int() and float(), which accept digits of other scripts, "1_000" and "nan".
INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
# No text matches in two ways: with backtracking, refusing megabytes of digits would take days.
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
# A request has two dozen fields, but a body of 24 MiB can contain millions of values, which take 80
# bytes of memory each.
MAX_JSON_VALUES = 1000


class MissingImage(UserError):
    """The request contains no photo."""


# Exception, type in the answer, HTTP status; subclasses come before their base class.
ERRORS: tuple[tuple[type[Exception], str, int], ...] = (
    (MissingImage, "MissingImage", 400),
    (UnsupportedMediaType, "UnsupportedMediaType", 415),
    (ImageTooLarge, "ImageTooLarge", 413),
    (ImageTooComplex, "ImageTooComplex", 413),
    (InvalidImage, "InvalidImage", 400),
    (InvalidParameter, "InvalidParameter", 400),
)


@dataclass
class Request:
    """A parsed request: the bytes of the photo, the decoding options, several prompts (or None),
    and the flags. Options and prompts are checked later."""

    photo: bytes
    options: dict[str, Any] = field(default_factory=dict)
    prompts: Any = None
    attention: bool = False
    stream: bool = False


@dataclass(frozen=True)
class HandlerSettings:
    """The section `handler` of `model-config.yaml`: the number of torch threads (default: all
    cores), decoding defaults, which the checkpoint's own override, and the maximum of beams (or
    samples) x `max_new_tokens` in a request. The keys and values of each such token are kept until
    the caption ends."""

    threads: int | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    max_beam_tokens: int = 4096

    @classmethod
    def read(cls, values: Any) -> "HandlerSettings":
        """Reads the settings. Raises UserError naming the field that is unknown or invalid."""
        where, values = "model-config.yaml: handler", {} if values is None else values
        known = [one.name for one in fields(cls)]
        if not isinstance(values, dict) or (unknown := set(map(str, values)) - set(known)):
            names = "" if not isinstance(values, dict) else f"{min(unknown)!r} is unknown; "
            raise UserError(f"{where}: {names}the fields are {', '.join(known)}")
        settings = cls(**{name: value for name, value in values.items() if value is not None})
        for name, least in (("threads", 1), ("max_beam_tokens", 16)):
            value = getattr(settings, name)
            if value is not None and (type(value) is not int or value < least):
                raise UserError(f"{where}.{name} must be an integer, {least} or more")
        if not isinstance(settings.decoding, dict):
            raise UserError(f"{where}.decoding must be a mapping of decoding options")
        return settings


def within(
    options: DecodeOptions, positions: int, max_beam_tokens: int, asked: bool
) -> DecodeOptions:
    """Applies the server's limit on beams (or samples) x tokens to the options of one prompt. Above
    it, a length that the client `asked` for raises InvalidParameter; a default length is shortened,
    unless that would leave no token.
    """
    longest = options.max_new_tokens or positions
    if options.rows * longest <= max_beam_tokens:
        return options
    shortened = max_beam_tokens // options.rows
    if asked or not shortened:
        factor = "num_return_sequences" if options.do_sample else "num_beams"
        raise InvalidParameter(
            "max_new_tokens",
            f"{factor} {options.rows} x max_new_tokens {longest} is above the server's limit of "
            f"{max_beam_tokens} (max_beam_tokens); lower one of them",
        )
    return replace(options, max_new_tokens=shortened)


def describe_error(error: Exception) -> dict[str, Any]:
    """The body of an error answer. The message of an internal error does not reveal its cause."""
    for kind, name, code in ERRORS:
        if isinstance(error, kind):
            return {"code": code, "type": name, "message": " ".join(str(error).split())}
    return {"code": 500, "type": "InternalError", "message": "the captioner failed"}


def parse_request(data: dict[str, Any], content_type: str = "") -> Request:
    """Parses the fields that TorchServe passes for one request (raw body, JSON, form or gRPC).
    `content_type` is the header of the request.

    Raises MissingImage, InvalidImage (invalid base64), UnsupportedMediaType or InvalidParameter.
    """
    if set(data) != {"body"}:
        return parse_fields(data, from_form)
    body = data["body"]
    if isinstance(body, str):
        # TorchServe decodes bodies of type text/*.
        body = body.encode("utf-8", "replace")
    if isinstance(body, bytes | bytearray):
        photo = bytes(body)
        if not photo.strip():
            raise MissingImage("the body is empty; send a photo")
        is_json = "json" in content_type.lower() or photo.lstrip()[:1] in (b"{", b"[")
        if sniff(photo) is not None or not is_json:
            return Request(photo)
        body = parse_json(photo)
    if not isinstance(body, dict):
        raise MissingImage("the JSON body must be an object with a field 'image'")
    return parse_fields(body, from_json)


def parse_json(body: bytes) -> Any:
    """Decodes a JSON body within limits of memory and time. Raises MissingImage."""
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > MAX_JSON_VALUES:
        raise MissingImage(
            f"the JSON body has more than {MAX_JSON_VALUES} values; send the photo as base64 in "
            "the field 'image'"
        )
    try:
        # Python refuses integers of thousands of digits. Those of 40 are out of every range.
        return json.loads(body, parse_int=lambda digits: int(digits[:40]))
    except (ValueError, RecursionError) as error:
        raise MissingImage("the body is malformed JSON and contains no photo") from error


def parse_fields(values: dict[str, Any], read_photo: Any) -> Request:
    """Parses the fields of a form, a JSON object or a gRPC input."""
    present = [name for name in IMAGE_FIELDS if name in values]
    if len(present) > 1:
        raise InvalidParameter("data", "image and data are the same field; send one of them")
    if not present:
        raise MissingImage("there is no field 'image'; send a photo in it")
    photo = read_photo(values[present[0]])
    if not photo:
        raise MissingImage(f"the field '{present[0]}' is empty; send a photo in it")
    request = Request(photo)
    for name, value in values.items():
        if name in FLAGS:
            setattr(request, name, parse_truth(name, plain(name, value)))
        elif name == "prompts":
            request.prompts = [] if value is None else value
        elif name not in IMAGE_FIELDS:
            request.options[name] = parse_option(name, value)
    return request


def plain(name: str, value: Any) -> Any:
    """Decodes form fields and gRPC values, which are bytes; JSON values are unchanged."""
    if not isinstance(value, bytes | bytearray):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise InvalidParameter(name, f"{name} must be text in UTF-8") from error


def parse_option(name: str, value: Any) -> Any:
    """Parses a decoding option from a JSON value, or from text or its bytes. DecodeOptions checks
    its range."""
    if name not in OPTIONS:
        known = ", ".join((*IMAGE_FIELDS, *FLAGS, "prompts", *OPTIONS))
        raise InvalidParameter(name[:50], f"{printable(name)} is unknown; the fields are {known}")
    option, value = OPTIONS[name], plain(name, value)
    text = value.strip() if isinstance(value, str) else None
    if text == "":
        raise InvalidParameter(
            name, f"{name} is empty; give {option.range(SIZES)}, or leave it out"
        )
    if option.kind == "string":
        if text is None:
            raise InvalidParameter(name, f"{name} must be a string")
        return value  # not stripped: a space at the end may change the tokens
    value = value if text is None else text
    if option.kind != "boolean":
        return parse_number(name, value, option)
    word = "" if text is None else text.lower()
    return word if word in option.values[2:] else parse_truth(name, value, option.choices)


def parse_number(name: str, value: Any, option: Option) -> int | float:
    """Parses a JSON number or a string; 3.0 and "3.0" are not integers."""
    integer = option.kind == "integer"
    if isinstance(value, str) and (INTEGER if integer else NUMBER).fullmatch(value):
        return int(value) if integer else float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        # A number of more than 30 digits is out of every range, and float() could overflow.
        return value if integer else float(max(-(10**30), min(10**30, value)))
    if isinstance(value, float) and not integer:
        return value
    raise InvalidParameter(name, f"{name} must be {option.described()}")


def parse_truth(name: str, value: Any, choices: str = "true or false") -> bool:
    """Parses true or false, as JSON or as a string; also 1 and 0."""
    text = str(value).strip().lower() if isinstance(value, str | int) else ""
    if text in ("true", "1"):
        return True
    if text in ("false", "0"):
        return False
    raise InvalidParameter(name, f"{name} must be {choices}")


def from_form(value: Any) -> bytes:
    """The photo in a file field or a gRPC value. A form's text fields are bytes, too."""
    return bytes(value) if isinstance(value, bytes | bytearray) else str(value).encode()


def from_json(value: Any) -> bytes:
    """Decodes base64 or a data: URL. Other URLs are not fetched."""
    if value is None:
        return b""
    if not isinstance(value, str):
        raise InvalidImage("the field 'image' must be a string: base64, or a data: URL")
    if value[:5].lower() == "data:":
        head, _, value = value.partition(",")
        if not head.lower().endswith(";base64"):
            raise InvalidImage("the data: URL must be in base64")
    try:
        # Line feeds are common in base64. split() would take 50 bytes of memory per piece.
        packed = value.encode("ascii").translate(None, b" \t\r\n\f\v")
        return base64.b64decode(packed, validate=True)
    except ValueError as error:
        raise InvalidImage("the field 'image' is not valid base64") from error


def printable(name: str) -> str:
    """The name of a field, shortened and without control characters, for an error message."""
    return "".join(c if c.isprintable() else "?" for c in name[:50])


def add_decoding_options(parser: argparse.ArgumentParser, defaults: str = "checkpoint") -> None:
    """Adds all decoding options as flags; `defaults` names what defines their defaults."""
    group = parser.add_argument_group(f"decoding options (defaults: those of the {defaults})")
    for name, option in OPTIONS.items():
        # A flag without a value means true (`--do-sample`).
        bare: dict[str, Any] = {} if option.kind == "string" else {"nargs": "?", "const": "true"}
        group.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="TEXT" if option.kind == "string" else "VALUE",
            help=f"{option.help} ({option.range(SIZES)})",
            **bare,
        )


def decoding_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The decoding options that were given, parsed for `Captioner.options`."""
    return {name: parse_option(name, text) for name, text in given_options(arguments).items()}


def given_options(arguments: argparse.Namespace) -> dict[str, str]:
    """The decoding options that were given, as strings."""
    values = {name: getattr(arguments, name) for name in OPTIONS}
    given = {name: text for name, text in values.items() if text is not None}
    for name, text in given.items():
        if as_utf8(text) != text:
            raise InvalidParameter(name, f"--{name.replace('_', '-')} is not UTF-8; write it again")
    return given


def options_table() -> str:
    """The table of decoding options in docs/serving.md."""
    rows = ["| option | range | default | meaning |", "| --- | --- | --- | --- |"]
    for name, option in OPTIONS.items():
        default = option.unset or str(getattr(DecodeOptions, name)).lower()
        rows.append(f"| `{name}` | {option.range(SIZES)} | {default} | {option.help} |")
    return "\n".join(rows) + "\n"


def to_json(answer: dict[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False, allow_nan=False)
