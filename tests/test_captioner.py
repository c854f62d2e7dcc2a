"""What Captioner.caption takes as its photos."""

from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from handler.beam_search import DecodeOptions, InvalidParameter, SpecialIds, search
from handler.caption_tokenizer import CaptionTokenizer
from handler.captioner import Captioner, check_photos
from handler.errors import InvalidImage, UserError
from training.checkpoint import load_captioner
from training.model import CaptioningModel, Decoder, DecoderConfig, EncoderConfig


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    """One of random weights."""
    encoder = EncoderConfig(image_size=8, patch_size=4, width=8, layers=1, heads=1, mlp_width=8)
    tokenizer = CaptionTokenizer.train(["a dog", "a cat runs"], "word", 100, 1)
    model = CaptioningModel(
        encoder,
        DecoderConfig(
            tokenizer.vocab_size, 6, width=8, layers=1, heads=1, mlp_width=8, memory_width=8
        ),
    ).eval()
    config = {
        "model": {"encoder": asdict(encoder)},
        "preprocessing": {"image_size": 8},
        "decoding": {"num_beams": 2},
    }
    return Captioner(model.encoder, model.decoder, tokenizer, config)


@pytest.mark.parametrize(
    ("defaults", "given", "changed"),
    [
        ({"min_new_tokens": 4}, {"max_new_tokens": 2}, {"min_new_tokens": 2}),
        ({"max_new_tokens": 2}, {"min_new_tokens": 4}, {"max_new_tokens": 4}),
        (
            {"num_beams": 5, "num_return_sequences": 3},
            {"num_beams": 1},
            {"num_return_sequences": 1},
        ),
        ({"num_beams": 1}, {"num_return_sequences": 3}, {"num_beams": 3}),
        ({"do_sample": True}, {"num_beams": 3}, {"do_sample": False}),
        (
            {"do_sample": True, "num_return_sequences": 8},
            {"do_sample": False},
            {"num_return_sequences": 5},
        ),
        (
            {"do_sample": True, "num_return_sequences": 8},
            {"do_sample": True},
            {"num_return_sequences": 8},
        ),
        ({"num_beams": 3}, {"do_sample": True}, {"num_beams": None}),
        (
            {"num_beams": 4, "num_return_sequences": 2},
            {"num_beams": 3},
            {"num_return_sequences": 2},
        ),
    ],
)
def test_a_default_yields_to_what_is_asked(defaults, given, changed, captioner, monkeypatch):
    """The caller was told of an option that it had not set."""
    monkeypatch.setattr(captioner, "decoding", defaults)
    options = asdict(captioner.options(**given))
    assert options == asdict(DecodeOptions(**{**defaults, **given, **changed}))


@pytest.mark.parametrize("defaults", [{}, {"num_beams": 3, "max_new_tokens": 3}])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"min_new_tokens": 99}, "min_new_tokens must be an integer from 0 to {longest}"),
        ({"min_new_tokens": -1}, "min_new_tokens must be an integer from 0 to {longest}"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer from 1 to {longest}"),
        ({"max_new_tokens": 3.0}, "max_new_tokens must be an integer from 1 to {longest}"),
        ({"top_k": -1}, "top_k must be an integer from 0 to {vocabulary}"),
        ({"num_return_sequences": 17}, "num_return_sequences must be an integer from 1 to "),
    ],
)
def test_a_refusal_names_what_was_asked_and_the_models_range(
    given, told, defaults, captioner, monkeypatch
):
    """It named a default of the checkpoint, which had given way, or a range up to 2147483648."""
    monkeypatch.setattr(captioner, "decoding", defaults)
    sizes = {
        "longest": captioner.decoder.max_positions - 1,
        "vocabulary": captioner.decoder.vocab_size,
    }
    with pytest.raises(InvalidParameter, match=told.format(**sizes)) as refused:
        captioner.options(**given)
    assert refused.value.field == next(iter(given))


@pytest.mark.parametrize("load", [Captioner.load, load_captioner])
@pytest.mark.parametrize("device", ["cuda:9", "nonsense"])
def test_a_device_that_is_not_there_is_named(load, device, tiny_export, tiny_run):
    """An export was called damaged; a checkpoint ended in a traceback."""
    folder = tiny_export if load == Captioner.load else tiny_run / "build/checkpoints/tiny"
    with pytest.raises(UserError, match=f"device '?{device}'?: "):
        load(folder, device=device)


def test_sizes_that_differ_do_not_multiply(monkeypatch):
    """Many beams beside many tokens: each photo took the memory of both."""
    shape = DecoderConfig(9, 40, width=8, layers=1, heads=1, mlp_width=8, memory_width=8)
    decoder, taken = Decoder(shape).eval(), []
    new_cache = decoder.new_cache

    def recorded(photos: int, tokens: int) -> object:
        taken.append(photos * tokens)
        return new_cache(photos, tokens)

    monkeypatch.setattr(decoder, "new_cache", recorded)
    few = [DecodeOptions(num_beams=2, max_new_tokens=36) for _ in range(7)]
    memory, special = torch.randn(8, 3, 8), SpecialIds(1, 2, [0])
    many = DecodeOptions(num_beams=16, max_new_tokens=4)
    with torch.inference_mode():
        search(decoder, memory, [many, *few], special)
        assert len(taken) == 2 and sum(taken) <= 7 * 2 * 36 + 16 * 4
        taken.clear()
        search(decoder, memory, [DecodeOptions(num_beams=3, max_new_tokens=36), *few], special)
    assert len(taken) == 1


def test_what_is_asked_is_still_checked_against_itself(captioner):
    for given in (
        {"min_new_tokens": 3, "max_new_tokens": 2},
        {"num_beams": 1, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ):
        with pytest.raises(InvalidParameter):
            captioner.options(**given)


@pytest.mark.parametrize(
    "photos",
    ["a.jpg", Path("a.jpg"), b"x", bytearray(b"x"), memoryview(b"x"), np.zeros((2, 2, 3))],
)
def test_one_thing_in_place_of_a_list_is_refused_by_name(photos):
    """A path was looped over letter by letter, bytes number by number."""
    captioner = object.__new__(Captioner)
    with pytest.raises(TypeError, match=f"type {type(photos).__name__}; give a list of photos"):
        captioner.caption(photos)


NOT_PHOTOS = ["a.jpg", Path("a.jpg"), None, 5, True, [1, 2], np.zeros((2, 2, 3), np.uint8)]


@pytest.mark.parametrize("photo", NOT_PHOTOS, ids=lambda photo: type(photo).__name__)
def test_what_is_no_photo_is_refused_by_its_type(captioner, photo):
    """A number was a file of so many zero bytes, a path a TypeError of Python's."""
    said = f"^a photo is of type {type(photo).__name__}; give the bytes of its file.*PIL image$"
    options = captioner.options()
    picture = Image.new("RGB", (8, 8))
    for call in (
        lambda: captioner.caption([picture, photo]),
        lambda: captioner.caption_each([picture, photo], [options] * 2),
        lambda: captioner.preprocess(photo),
    ):
        with pytest.raises(InvalidImage, match=said):
            call()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (lambda _: [{"num_beams": 2}], "a list with a dict"),
        (lambda _: [None], "a list with a NoneType"),
        (lambda _: None, "of type NoneType"),
        (lambda one: one, "of type DecodeOptions"),
        (lambda one: [one, one], "a list of 2"),
        (lambda _: [], "a list of 0"),
    ],
)
def test_options_of_another_type_are_refused(captioner, options, says):
    with pytest.raises(
        InvalidParameter, match=f"^options is {says}; give a list of Dec.* 1 photos"
    ):
        captioner.caption_each([Image.new("RGB", (8, 8))], options(captioner.options()))


WRONG = ["3", None, 2.0, True, [2], np.int64(2), b"2", object()]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("field", [field.name for field in fields(DecodeOptions)])
def test_an_option_of_another_type_is_refused_by_name(captioner, field, value):
    """Whatever is not refused gives a caption."""
    try:
        [[_, *_]] = captioner.caption([Image.new("RGB", (8, 8))], **{field: value})
    except InvalidParameter as error:
        assert error.field == field and field in str(error) and "\n" not in str(error)
    else:
        assert value is None or type(value) in (bool, float), (field, value)


def test_an_array_of_choices_is_no_choice(captioner):
    """Its comparison has many answers."""
    with pytest.raises(InvalidParameter, match="early_stopping"):
        captioner.options(early_stopping=np.array(["never", "never"]))


@pytest.mark.parametrize("photos", [[], [b"x"], (b"x",), [Image.new("RGB", (2, 2))]])
def test_lists_and_tuples_are_taken(photos):
    check_photos(photos)
