"""A request's fields -> a photo and options, or a typed error. Everything that the handler decides
about one request, without a server."""

import base64
import binascii
import json
from dataclasses import fields
from typing import Any

from handler.beam_search import DecodeOptions, InvalidParameter
from handler.errors import UserError
from handler.image_preprocess import ImageTooLarge, InvalidImage, UnsupportedMediaType

IMAGE_FIELDS = ("image", "data")
FLAGS = ("attention", "stream")
OPTION_TYPES = {field.name: field.type for field in fields(DecodeOptions)}
JSON_START = (b"{", b"[")


class MissingImage(UserError):
    """The request holds no photo."""


# What the client is told: the contract's type and the HTTP status, most particular first.
ERRORS: tuple[tuple[type[Exception], str, int], ...] = (
    (MissingImage, "MissingImage", 400),
    (UnsupportedMediaType, "UnsupportedMediaType", 415),
    (ImageTooLarge, "ImageTooLarge", 413),
    (InvalidImage, "InvalidImage", 400),
    (InvalidParameter, "InvalidParameter", 400),
)


def describe_error(error: Exception) -> dict[str, Any]:
    """The body of an error answer. Anything that is not the client's doing says nothing of the
    inside."""
    for kind, name, code in ERRORS:
        if isinstance(error, kind):
            return {"code": code, "type": name, "message": " ".join(str(error).split())}
    return {"code": 500, "type": "InternalError", "message": "the captioner failed"}


def parse_request(data: dict[str, Any]) -> tuple[bytes, dict[str, Any], dict[str, bool]]:
    """Splits what TorchServe hands over for a request into (photo bytes, decoding options, flags).

    Raises MissingImage, InvalidImage (bad base64) or InvalidParameter.
    """
    given = dict(data)
    if set(given) == {"body"}:
        body = given["body"]
        if isinstance(body, dict):
            given = body
        elif isinstance(body, bytes | bytearray):
            photo = bytes(body)
            if not photo.strip():
                raise MissingImage("the body is empty; send a photo")
            if photo.lstrip()[:1] in JSON_START:
                # TorchServe passes malformed JSON on as bytes.
                raise MissingImage("the body is malformed JSON and holds no photo")
            return photo, {}, dict.fromkeys(FLAGS, False)
        else:
            raise MissingImage("the JSON body must be an object with a field 'image'")
        images = [name for name in IMAGE_FIELDS if name in given]
        photos = {name: _from_json(given.pop(name)) for name in images}
    else:
        images = [name for name in IMAGE_FIELDS if name in given]
        photos = {name: _from_form(given.pop(name)) for name in images}
    if len(images) > 1:
        raise InvalidParameter("data", "image and data are the same field; send one of them")
    if not images:
        raise MissingImage("there is no field 'image'; send a photo in it")
    if not photos[images[0]]:
        raise MissingImage("the field 'image' is empty; send a photo in it")
    options: dict[str, Any] = {}
    flags = dict.fromkeys(FLAGS, False)
    for name, value in given.items():
        if name in FLAGS:
            flags[name] = parse_truth(name, plain(value))
        else:
            options[name] = parse_option(name, plain(value))
    return photos[images[0]], options, flags


def plain(value: Any) -> Any:
    """Form fields and gRPC values are bytes; their text is what counts."""
    if isinstance(value, bytes | bytearray):
        try:
            return bytes(value).decode("utf-8").strip()
        except UnicodeDecodeError:
            return "\ufffd"
    return value


def parse_option(name: str, value: Any) -> Any:
    """A decoding option from a JSON value or its text. Its range is for DecodeOptions to check."""
    if name not in OPTION_TYPES:
        known = ", ".join((*IMAGE_FIELDS, *FLAGS, *OPTION_TYPES))
        raise InvalidParameter(name[:50], f"{_printable(name)} is unknown; the fields are {known}")
    if value == "":
        raise InvalidParameter(name, f"{name} is empty; give a value or leave it out")
    kind = str(OPTION_TYPES[name])
    if name == "early_stopping":
        return value if value == "never" else parse_truth(name, value)
    if name == "do_sample":
        return parse_truth(name, value)
    integer = "float" not in kind
    if isinstance(value, str):
        try:
            return int(value) if integer else float(value)
        except ValueError as error:
            what = "an integer" if integer else "a number"
            raise InvalidParameter(name, f"{name} must be {what}") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParameter(name, f"{name} must be {'an integer' if integer else 'a number'}")
    if integer and not isinstance(value, int):
        raise InvalidParameter(name, f"{name} must be an integer")
    return value


def parse_truth(name: str, value: Any) -> bool:
    """true and false, as JSON or as text, also 1 and 0."""
    if isinstance(value, bool):
        return value
    text = str(value).lower() if isinstance(value, str | int) else ""
    if text in ("true", "1"):
        return True
    if text in ("false", "0"):
        return False
    never = " or never" if name == "early_stopping" else ""
    raise InvalidParameter(name, f"{name} must be true or false{never}")


def _from_form(value: Any) -> bytes:
    return bytes(value) if isinstance(value, bytes | bytearray) else str(value).encode()


def _from_json(value: Any) -> bytes:
    """Base64, or a data: URL."""
    if not isinstance(value, str):
        raise InvalidImage("the field 'image' must be text: base64, or a data: URL")
    if value.startswith("data:"):
        head, comma, value = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise InvalidImage("the data: URL must be in base64")
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImage("the field 'image' is no valid base64") from error


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:50])


def to_json(answer: dict[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False)
