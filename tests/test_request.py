"""One request's fields as TorchServe hands them over, to a photo and options or a typed error."""

import argparse
import base64
import json
import time
import tracemalloc
from dataclasses import fields

import pytest
from conftest import REPOSITORY
from hypothesis import example, given, settings
from hypothesis import strategies as st

from handler.beam_search import OPTIONS, UNLIMITED, DecodeOptions, InvalidParameter
from handler.image_preprocess import ImageTooLarge, InvalidImage, UnsupportedMediaType
from handler.request import (
    MissingImage,
    Request,
    add_decoding_options,
    decoding_options,
    describe_error,
    options_table,
    parse_option,
    parse_request,
    to_json,
)

PHOTO = b"\xff\xd8\xff photo"
BASE64 = base64.b64encode(PHOTO).decode()


def form(**values: str) -> dict:
    return {"image": bytearray(PHOTO), **{k: bytearray(v.encode()) for k, v in values.items()}}


# --- where the photo may stand


@pytest.mark.parametrize(
    "data",
    [
        {"body": bytearray(PHOTO)},
        {"image": bytearray(PHOTO)},
        {"data": bytearray(PHOTO)},
        {"body": {"image": BASE64}},
        {"body": {"data": BASE64}},
        {"body": {"image": f"data:image/jpeg;base64,{BASE64}"}},
        {"body": {"image": f"DATA:image/jpeg;charset=x;BASE64,{BASE64}"}},
        {"body": {"image": BASE64[:4] + "\r\n " + BASE64[4:] + "\n"}},
    ],
)
def test_every_place_of_the_photo(data):
    assert parse_request(data) == Request(PHOTO)


def test_a_photo_sent_as_json_by_mistake_is_a_photo():
    """`curl -H 'Content-Type: application/json' --data-binary @photo.jpg`"""
    data = {"body": bytearray(PHOTO)}
    assert parse_request(data, "application/json").photo == PHOTO


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        ({}, ""),
        ({"body": bytearray()}, ""),
        ({"body": bytearray(b" \r\n")}, "image/jpeg"),
        ({"body": ""}, "text/plain"),
        ({"body": None}, "application/json"),
        ({"body": []}, "application/json"),
        ({"body": [{"image": BASE64}]}, "application/json"),
        ({"body": "a string"}, "application/json"),
        ({"body": 3}, "application/json"),
        ({"body": {}}, "application/json"),
        ({"body": {"image": ""}}, "application/json"),
        ({"body": {"image": None}}, "application/json"),
        ({"body": {"image": "data:image/png;base64,"}}, "application/json"),
        ({"body": {"num_beams": 3}}, "application/json"),
        ({"body": bytearray(b'{"image": ')}, "application/json"),
        ({"body": bytearray(b"nonsense")}, "Application/JSON; charset=utf-8"),
        ({"body": bytearray(b' {"image": ')}, ""),
        ({"image": bytearray()}, ""),
        ({"num_beams": bytearray(b"3")}, ""),
    ],
)
def test_no_photo(data, content_type):
    with pytest.raises(MissingImage):
        parse_request(data, content_type)


def test_json_is_read_here_whatever_its_content_type():
    """TorchServe decodes bodies of exactly `application/json`, without bounds; the handler does it
    instead."""
    body = bytearray(json.dumps({"image": BASE64, "num_beams": 3}).encode())
    for content_type in ("application/json", "Application/JSON; charset=utf-8", "text/plain", ""):
        assert parse_request({"body": body}, content_type) == Request(PHOTO, {"num_beams": 3})
    assert parse_request({"body": body.decode()}, "text/plain").photo == PHOTO


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * 2**20 + b"[]]",
        b'{"image": [' + b"{}," * 2**20 + b"{}]}",
        b"[" * 900,
        b"[" * 2**20,
        b"[" + b"1," * 2**20 + b"1]",
    ],
)
def test_a_body_of_a_million_values_costs_no_memory(body):
    """24 MiB of "[]," were 670 MB of lists, eight times that in a batch."""
    tracemalloc.start()
    with pytest.raises(MissingImage):
        parse_request({"body": body}, "application/json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(body) + 2**18


def test_a_photo_of_spaces_costs_no_memory():
    """base64 in pieces of one letter was a list of as many texts."""
    encoded = " ".join(BASE64) + " " * 2**20
    tracemalloc.start()
    assert parse_request({"body": {"image": encoded}}).photo == PHOTO
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(encoded)


def test_megabytes_of_digits_are_refused_at_once():
    """The pattern of numbers took time that grew with their square: days for a request's worth."""
    for text in ("1" * 2**21 + "x", "1" * 2**20 + "." + "1" * 2**20 + "x", "." + "1" * 2**20 + "x"):
        for name in ("temperature", "num_beams"):
            start = time.monotonic()
            with pytest.raises(InvalidParameter):
                DecodeOptions(**parse_request(form(**{name: text})).options)
            assert time.monotonic() - start < 5


def test_an_integer_of_thousands_of_digits_is_out_of_range():
    body = f'{{"image": "{BASE64}", "seed": {"9" * 5000}}}'.encode()
    with pytest.raises(InvalidParameter, match="seed"):
        DecodeOptions(**parse_request({"body": body}, "application/json").options)


@pytest.mark.parametrize(
    "image", ["not base64!", "abc", 3, ["x"], "http://example.org/cat.jpg", "data:image/png,abc"]
)
def test_no_base64(image):
    with pytest.raises(InvalidImage) as caught:
        parse_request({"body": {"image": image}})
    assert type(caught.value) is InvalidImage


def test_text_is_left_to_the_decoder_which_calls_it_unsupported():
    assert parse_request({"body": "hello"}, "text/plain").photo == b"hello"


def test_both_image_and_data():
    with pytest.raises(InvalidParameter, match="image and data"):
        parse_request({"image": bytearray(PHOTO), "data": bytearray(PHOTO)})


# --- options


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("num_beams", "3", 3),
        ("num_beams", " 3 ", 3),
        ("seed", "0", 0),
        ("length_penalty", "-0.5", -0.5),
        ("length_penalty", "2", 2.0),
        ("temperature", "1e-1", 0.1),
        ("do_sample", "true", True),
        ("do_sample", "0", False),
        ("do_sample", "False", False),
        ("early_stopping", "never", "never"),
        ("early_stopping", "1", True),
        ("prompt", "a photo of", "a photo of"),
        ("prompt", " a photo of ", " a photo of "),  # a space may be a token
        ("prompt", "true", "true"),
        ("prompt", "3", "3"),
    ],
)
def test_text_and_json_values_are_the_same(name, text, value):
    for request in (parse_request(form(**{name: text})), parse_json(name, text)):
        assert request.options == {name: value}
        assert type(request.options[name]) is type(value)
    assert parse_json(name, value).options == {name: value}


def parse_json(name: str, value: object) -> Request:
    return parse_request({"body": {"image": BASE64, name: value}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", ""),
        ("num_beams", "  "),
        ("num_beams", "3.0"),
        ("num_beams", 3.0),
        ("num_beams", True),
        ("num_beams", None),
        ("num_beams", [3]),
        ("num_beams", {"a": 1}),
        ("num_beams", "three"),
        ("num_beams", "1_0"),
        ("num_beams", "٣"),
        ("num_beams", "0x3"),
        ("num_beams", "9" * 5000),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("temperature", "1_0.5"),
        ("temperature", ""),
        ("temperature", False),
        ("do_sample", "yes"),
        ("do_sample", ""),
        ("do_sample", 2),
        ("do_sample", 1.0),
        ("early_stopping", "always"),
        ("prompt", ""),
        ("prompt", " \n"),
        ("prompt", None),
        ("prompt", ["a", "photo"]),
        ("attention", ""),
        ("attention", "maybe"),
        ("stream", "2"),
    ],
)
def test_wrong_values_name_their_field(name, value):
    with pytest.raises(InvalidParameter, match=name):
        parse_json(name, value)
    if isinstance(value, str):
        with pytest.raises(InvalidParameter, match=name):
            parse_request(form(**{name: value}))


def test_bytes_that_are_no_text():
    with pytest.raises(InvalidParameter, match="num_beams"):
        parse_request({"image": bytearray(PHOTO), "num_beams": bytearray(b"\xff\xfe")})


@pytest.mark.parametrize(
    "name", ["beams", "Num_Beams", "", "num_beams ", "x" * 999, "a\nb", "\ud800"]
)
def test_unknown_fields_are_named_safely(name):
    with pytest.raises(InvalidParameter, match="is unknown") as caught:
        parse_json(name, 1)
    message = describe_error(caught.value)["message"]
    assert len(message) < 500
    assert message.isprintable()
    message.encode()  # a lone surrogate of a client's JSON would end the worker


def test_the_client_is_not_quoted_back():
    """Neither a value nor a photo's bytes stand in an error."""
    with pytest.raises(InvalidParameter) as caught:
        parse_json("num_beams", "SECRET")
    assert "SECRET" not in json.dumps(describe_error(caught.value))


def test_flags():
    request = parse_request(form(attention="true", stream="1"))
    assert (request.attention, request.stream, request.options) == (True, True, {})
    assert parse_json("attention", False).attention is False


def test_every_option_of_the_search_is_a_field():
    assert set(OPTIONS) == {field.name for field in fields(DecodeOptions)}


def test_the_table_in_the_docs_is_the_declared_one():
    """After a change paste what `print(options_table())` gives."""
    page = (REPOSITORY / "docs/serving.md").read_text(encoding="utf-8")
    [section] = [part for part in page.split("\n## ") if part.startswith("Decoding options\n")]
    table = section[section.index("| option") :].split("\n### ")[0]
    assert table.strip() == options_table().strip()


@pytest.mark.parametrize(
    "name", [name for name, option in OPTIONS.items() if option.kind in ("integer", "number")]
)
def test_the_declared_range_is_what_is_checked(name):
    option = OPTIONS[name]
    step = 1 if option.kind == "integer" else 1e-6
    # Enough of what limits others.
    wide = {"num_beams": 16} if name == "num_return_sequences" else {}
    lowest = option.low + step if option.above else option.low
    for value in (lowest, option.high):
        assert getattr(DecodeOptions(**{**wide, name: value}), name) == value
        assert parse_json(name, value).options == {name: value}
    for value in (lowest - step, option.high + step):
        high = "or more" if option.high == UNLIMITED else option.high
        with pytest.raises(InvalidParameter, match=rf"^{name} must be .*{high}") as refused:
            DecodeOptions(**{**wide, name: value})
        assert refused.value.field == name
    assert str(option.high) in option.range({}) or option.limit in option.range({})


@pytest.mark.parametrize("prompt", ["", "  ", 3, True, ["a"], "a" * (2**14 + 1), "a \ud800"])
def test_a_prompt_is_a_string(prompt):
    with pytest.raises(InvalidParameter, match="^prompt must be a string") as refused:
        DecodeOptions(prompt=prompt)
    assert refused.value.field == "prompt"


def test_arguments_of_commands_are_the_declared_options():
    parser = argparse.ArgumentParser()
    add_decoding_options(parser, "server")
    usage = " ".join(parser.format_help().split())
    for option in OPTIONS.values():
        assert option.help in usage
    typed = ["--num-beams", "3", "--do-sample", "--early-stopping", "Never"]
    assert decoding_options(parser.parse_args(typed)) == {
        "num_beams": 3, "do_sample": True, "early_stopping": "never",
    }  # fmt: skip


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([*OPTIONS, "attention", "stream", "other"]), json_values | st.binary())
@example("length_penalty", 10**400)
@example("length_penalty", -(10**400))
@example("temperature", "1e9999")
def test_any_value_is_an_option_or_an_invalid_parameter(name, value):
    """A JSON integer of hundreds of digits made float() overflow: our 500 instead of their 400."""
    try:
        options = parse_request({"image": bytearray(PHOTO), name: value}).options
        DecodeOptions(**options)
    except InvalidParameter as error:
        assert describe_error(error)["code"] == 400


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=12), json_values | st.binary(), max_size=4), st.text())
def test_any_request_is_understood_or_refused(data, content_type):
    for given_data in (data, {"body": data}, {"body": list(data.values())}):
        try:
            parse_request(given_data, content_type)
        except (MissingImage, InvalidImage, InvalidParameter) as error:
            to_json(describe_error(error)).encode()


# --- errors


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (MissingImage("x"), "MissingImage", 400),
        (InvalidImage("x"), "InvalidImage", 400),
        (UnsupportedMediaType("x"), "UnsupportedMediaType", 415),
        (ImageTooLarge("x"), "ImageTooLarge", 413),
        (InvalidParameter("f", "x"), "InvalidParameter", 400),
    ],
)
def test_types_and_codes_of_the_contract(error, kind, code):
    assert describe_error(error) == {"code": code, "type": kind, "message": "x"}


def test_nothing_of_the_inside_is_told():
    said = describe_error(RuntimeError("/home/me/secret.py: mat1 and mat2"))
    assert said["type"] == "InternalError"
    assert said["code"] == 500
    assert "secret" not in said["message"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("num_beams", "three", "num_beams must be an integer from 1 to 16"),
        ("num_beams", 3.0, "num_beams must be an integer from 1 to 16"),
        ("temperature", "x", "temperature must be a number above 0 to 10"),
        ("max_new_tokens", "x", "max_new_tokens must be an integer, 1 or more"),
        ("num_beams", "", "num_beams is empty; give 1 to 16, or leave it out"),
        ("prompt", b"caf\xe9", "prompt must be text in UTF-8"),
        ("attention", b"\xff", "attention must be text in UTF-8"),
    ],
)
def test_a_field_of_another_kind_is_told_its_range(name, value, told):
    """Only that it was no integer; and a prompt's bytes that are no UTF-8 were captioned."""
    with pytest.raises(InvalidParameter) as refused:
        parse_request({"image": bytearray(PHOTO), name: value})
    assert str(refused.value) == told and refused.value.field == name


def test_parse_option_serves_the_command_line_too():
    assert parse_option("early_stopping", "Never") == "never"
