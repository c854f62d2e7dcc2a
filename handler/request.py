"""A request's fields -> a photo and options, or a typed error. All that is decided about one
request, without a server."""

import argparse
import base64
import json
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from handler.beam_search import OPTIONS, DecodeOptions, InvalidParameter
from handler.errors import (
    ImageTooComplex,
    ImageTooLarge,
    InvalidImage,
    UnsupportedMediaType,
    UserError,
)
from handler.image_decode import sniff

IMAGE_FIELDS = ("image", "data")
FLAGS = ("attention", "stream")
# What the ranges of options call a model's sizes, where no model is there.
SIZES = {
    "positions": "the model's positions less one",
    "half": "half of the model's positions in",
    "vocabulary": "the vocabulary",
}
# ASCII on purpose: Python's int() and float() take other scripts' digits, "1_000", "nan" and more.
INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
# No text matches in two ways: a client's megabytes of digits would take days to refuse otherwise.
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
# A request has two dozen fields. A body of 24 MiB can hold millions of values, 80 bytes each.
MAX_JSON_VALUES = 1000


class MissingImage(UserError):
    """The request holds no photo."""


# What the client is told: the contract's type and the HTTP status, most particular first.
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
    """What one client asks for: the photo's bytes, its decoding options as given, the prompts where
    there are several, and the flags."""

    photo: bytes
    options: dict[str, Any] = field(default_factory=dict)
    prompts: Any = None
    attention: bool = False
    stream: bool = False


@dataclass(frozen=True)
class HandlerSettings:
    """`handler:` in `model-config.yaml`: torch's threads (all cores without it), decoding defaults
    below the checkpoint's own, and the most beams or samples times `max_new_tokens` of a request:
    each of these tokens keeps its keys and values until the caption ends."""

    threads: int | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    max_beam_tokens: int = 4096

    @classmethod
    def read(cls, values: Any) -> "HandlerSettings":
        """Raises UserError naming the field that is unknown or wrong."""
        where, values = "model-config.yaml: handler", {} if values is None else values
        known = [one.name for one in fields(cls)]
        if not isinstance(values, dict) or (unknown := set(map(str, values)) - set(known)):
            names = "" if not isinstance(values, dict) else f"{min(unknown)!r} is unknown; "
            raise UserError(f"{where}: {names}the fields are {', '.join(known)}")
        settings = cls(**{name: value for name, value in values.items() if value is not None})
        for name, least in (("threads", 1), ("max_beam_tokens", 16)):
            value = getattr(settings, name)
            if value is not None and (type(value) is not int or value < least):
                raise UserError(f"{where}.{name} must be a whole number, {least} or more")
        if not isinstance(settings.decoding, dict):
            raise UserError(f"{where}.decoding must be a mapping of decoding options")
        return settings


def within(
    options: DecodeOptions, positions: int, max_beam_tokens: int, asked: bool
) -> DecodeOptions:
    """The options of a request within the server's limit on beams (or samples) times tokens, or its
    share for each of several prompts. What the client `asked` for is refused above it, a default
    length is shortened."""
    longest = options.max_new_tokens or positions
    if options.rows * longest <= max_beam_tokens:
        return options
    if asked:
        many = "num_return_sequences" if options.do_sample else "num_beams"
        raise InvalidParameter(
            "max_new_tokens",
            f"{many} {options.rows} x max_new_tokens {longest} is above the server's limit of "
            f"{max_beam_tokens} (max_beam_tokens); lower one of them",
        )
    return replace(options, max_new_tokens=max_beam_tokens // options.rows)


def describe_error(error: Exception) -> dict[str, Any]:
    """The body of an error answer. Anything that is not the client's doing says nothing of the
    inside."""
    for kind, name, code in ERRORS:
        if isinstance(error, kind):
            return {"code": code, "type": name, "message": " ".join(str(error).split())}
    return {"code": 500, "type": "InternalError", "message": "the captioner failed"}


def parse_request(data: dict[str, Any], content_type: str = "") -> Request:
    """What TorchServe hands over for one request (shared table: raw body, JSON, form or gRPC) with
    the `content-type` of the request.

    Raises MissingImage, InvalidImage (bad base64), UnsupportedMediaType or InvalidParameter.
    """
    if set(data) != {"body"}:
        return parse_fields(data, from_form)
    body = data["body"]
    if isinstance(body, str):
        # TorchServe decodes text/*, if the handler lets it.
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
    """A JSON body, decoded within bounds of memory and time. Raises MissingImage."""
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > MAX_JSON_VALUES:
        raise MissingImage(
            f"the JSON body has more than {MAX_JSON_VALUES} values; send the photo as base64 in "
            "the field 'image'"
        )
    try:
        # Python refuses integers of thousands of digits; 40 are out of every range already.
        return json.loads(body, parse_int=lambda digits: int(digits[:40]))
    except (ValueError, RecursionError) as error:
        raise MissingImage("the body is malformed JSON and holds no photo") from error


def parse_fields(given: dict[str, Any], read_photo: Any) -> Request:
    """The fields of a form, a JSON object or a gRPC input."""
    present = [name for name in IMAGE_FIELDS if name in given]
    if len(present) > 1:
        raise InvalidParameter("data", "image and data are the same field; send one of them")
    if not present:
        raise MissingImage("there is no field 'image'; send a photo in it")
    photo = read_photo(given[present[0]])
    if not photo:
        raise MissingImage(f"the field '{present[0]}' is empty; send a photo in it")
    request = Request(photo)
    for name, value in given.items():
        if name in FLAGS:
            setattr(request, name, parse_truth(name, plain(value)))
        elif name == "prompts":
            request.prompts = [] if value is None else value
        elif name not in IMAGE_FIELDS:
            request.options[name] = parse_option(name, plain(value))
    return request


def plain(value: Any) -> Any:
    """Form fields and gRPC values are bytes: their text is what counts. JSON values stay."""
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "replace")
    return value


def parse_option(name: str, value: Any) -> Any:
    """A decoding option from a JSON value or its text. Its range is for DecodeOptions to check."""
    if name not in OPTIONS:
        known = ", ".join((*IMAGE_FIELDS, *FLAGS, "prompts", *OPTIONS))
        raise InvalidParameter(name[:50], f"{printable(name)} is unknown; the fields are {known}")
    text = value.strip() if isinstance(value, str) else None
    if text == "":
        raise InvalidParameter(name, f"{name} is empty; give a value or leave it out")
    option = OPTIONS[name]
    if option.kind == "string":
        if text is None:
            raise InvalidParameter(name, f"{name} must be a string")
        return value  # as it is: a tokenizer may read a space at its end
    value = value if text is None else text
    if option.kind != "boolean":
        return parse_number(name, value, option.kind == "integer")
    word = "" if text is None else text.lower()
    return word if word in option.values[2:] else parse_truth(name, value, option.choices)


def parse_number(name: str, value: Any, integer: bool) -> int | float:
    """A JSON number or the text of one; 3.0 and "3.0" are no integers."""
    what = "an integer" if integer else "a number"
    if isinstance(value, str) and (INTEGER if integer else NUMBER).fullmatch(value):
        return int(value) if integer else float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        # Beyond 30 digits it is out of every range, and float() of it would overflow.
        return value if integer else float(max(-(10**30), min(10**30, value)))
    if isinstance(value, float) and not integer:
        return value
    raise InvalidParameter(name, f"{name} must be {what}")


def parse_truth(name: str, value: Any, choices: str = "true or false") -> bool:
    """true and false, as JSON or as text, also 1 and 0."""
    text = str(value).strip().lower() if isinstance(value, str | int) else ""
    if text in ("true", "1"):
        return True
    if text in ("false", "0"):
        return False
    raise InvalidParameter(name, f"{name} must be {choices}")


def from_form(value: Any) -> bytes:
    """A file field, or a gRPC value. A form's text field arrives as bytes too."""
    return bytes(value) if isinstance(value, bytes | bytearray) else str(value).encode()


def from_json(value: Any) -> bytes:
    """Base64, or a data: URL. Other URLs are not fetched."""
    if value is None:
        return b""
    if not isinstance(value, str):
        raise InvalidImage("the field 'image' must be text: base64, or a data: URL")
    if value[:5].lower() == "data:":
        head, _, value = value.partition(",")
        if not head.lower().endswith(";base64"):
            raise InvalidImage("the data: URL must be in base64")
    try:
        # Line feeds are common in base64. Not split(): every piece would cost 50 bytes.
        packed = value.encode("ascii").translate(None, b" \t\r\n\f\v")
        return base64.b64decode(packed, validate=True)
    except ValueError as error:
        raise InvalidImage("the field 'image' is no valid base64") from error


def printable(name: str) -> str:
    """A field's name as it can be repeated to the client who sent it."""
    return "".join(c if c.isprintable() else "?" for c in name[:50])


def add_decoding_options(parser: argparse.ArgumentParser, defaults: str = "checkpoint") -> None:
    """Every decoding option as a flag; `defaults` names whose defaults apply without it."""
    group = parser.add_argument_group(f"decoding options (the {defaults}'s defaults otherwise)")
    for name, option in OPTIONS.items():
        # A bare flag is true (`--do-sample`).
        bare: dict[str, Any] = {} if option.kind == "string" else {"nargs": "?", "const": "true"}
        group.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="TEXT" if option.kind == "string" else "VALUE",
            help=f"{option.help} ({option.range(SIZES)})",
            **bare,
        )


def decoding_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The decoding options that were given, as `Captioner.options` takes them."""
    return {name: parse_option(name, text) for name, text in given_options(arguments).items()}


def given_options(arguments: argparse.Namespace) -> dict[str, str]:
    """The decoding options that were given, as they were typed."""
    given = {name: getattr(arguments, name) for name in OPTIONS}
    return {name: text for name, text in given.items() if text is not None}


def options_table() -> str:
    """The decoding options as the table of docs/serving.md."""
    rows = ["| option | range | default | meaning |", "| --- | --- | --- | --- |"]
    for name, option in OPTIONS.items():
        default = option.unset or str(getattr(DecodeOptions, name)).lower()
        rows.append(f"| `{name}` | {option.range(SIZES)} | {default} | {option.help} |")
    return "\n".join(rows) + "\n"


def to_json(answer: dict[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False, allow_nan=False)
