"""What one client may cost the server: beams times tokens, encoder passes, streamed tokens, lines
of the logs."""

import base64
import contextlib
import json
import re
import socket
import time
import zipfile

import pytest
import requests
import torch
import yaml
from live import REPOSITORY, change_settings, client_of, configure, key
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from worker import Worker, rest

from export.archive import build_archive
from handler.beam_search import DecodeOptions, InvalidParameter
from handler.caption_tokenizer import CaptionTokenizer, PieceStream
from handler.captioner import Captioner
from handler.errors import UserError
from handler.request import HandlerSettings, within
from handler.serve import server as serve


@pytest.fixture(scope="module")
def worker(tiny_export, tmp_path_factory) -> Worker:
    folder = tmp_path_factory.mktemp("limited")
    with zipfile.ZipFile(build_archive(tiny_export, folder / "captioner.mar", "1.0")) as archive:
        archive.extractall(folder / "unpacked")
    return Worker(folder / "unpacked")


@pytest.fixture
def handler(worker):
    """The handler that the worker loaded, as it is before the test."""
    handler = worker.service._entry_point.__self__
    cap = handler.max_beam_tokens
    yield handler
    handler.max_beam_tokens = cap


@pytest.fixture(scope="module")
def photo(tiny_data) -> bytes:
    return (tiny_data / "images/17.png").read_bytes()


# --- beams times tokens ---


@pytest.mark.parametrize(
    ("options", "asked", "expected"),
    [
        ({"num_beams": 16, "max_new_tokens": 256}, True, 256),
        ({"num_beams": 16, "max_new_tokens": 257}, True, None),
        ({"num_beams": 5}, False, 819),
        ({"num_beams": 1}, False, None),
        ({"do_sample": True, "num_return_sequences": 16}, False, 256),
        ({"do_sample": True, "num_return_sequences": 16, "max_new_tokens": 300}, True, None),
        ({"num_beams": 16, "max_new_tokens": 1000}, False, 256),  # a default of the checkpoint
    ],
)
def test_beams_times_tokens_are_capped(options, asked, expected):
    """16 beams of 1,023 tokens took 1.2 GB of keys and values a photo, and nothing stopped them."""
    options = DecodeOptions(**options)
    if asked and expected is None:
        with pytest.raises(InvalidParameter, match="4096.*max_beam_tokens") as refused:
            within(options, 1023, 4096, asked)
        assert refused.value.field == "max_new_tokens"
        assert "num_beams" in str(refused.value) or "num_return_sequences" in str(refused.value)
    else:
        assert within(options, 1023, 4096, asked).max_new_tokens == expected


def test_a_cap_that_leaves_no_token_is_named():
    """The client was told that a length which it had not sent must be 1 or more."""
    with pytest.raises(InvalidParameter, match="num_beams 5 x .* above the server's limit of 4"):
        within(DecodeOptions(num_beams=5), 30, 4, asked=False)


def test_a_request_above_the_cap_is_refused_by_name(worker, handler, photo):
    handler.max_beam_tokens = 16
    refused, shortened, good = worker.predict(
        rest({"image": photo, "num_beams": b"4", "max_new_tokens": b"5"}),
        rest({"image": photo, "num_beams": b"8", "min_new_tokens": b"2"}),
        rest({"image": photo, "num_beams": b"2", "max_new_tokens": b"8"}),
    )
    assert (refused.status, refused.json["type"]) == (400, "InvalidParameter")
    assert (
        "num_beams 4 x max_new_tokens 5 is above the server's limit of 16"
        in (refused.json["message"])
    )
    assert (shortened.status, good.status) == (200, 200)
    assert len(shortened.json["captions"][0]["tokens"]) <= 2
    [card] = worker.predict({"headers": rest({}, describe="True")["headers"], "parameters": []})
    assert card.json["max_beam_tokens"] == 16


def test_a_batch_keeps_within_the_cap_too(worker, handler, photo, monkeypatch):
    """Eight requests just within it took eight times its memory."""
    searched, whole = [], Captioner.caption_memory

    def counted(self, memory, *rest):
        searched.append(len(memory))
        return whole(self, memory, *rest)

    monkeypatch.setattr(Captioner, "caption_memory", counted)
    fields = {"image": photo, "num_beams": b"4", "max_new_tokens": b"5"}
    body = {"image": base64.b64encode(photo).decode(), "max_new_tokens": 2, "num_beams": 1}
    requests = [rest(fields)] * 5 + [
        rest({"body": body | {"prompts": ["a"] * 9}}, "application/json") for _ in range(2)
    ]
    together = [answer.json for answer in worker.predict(*requests)]
    assert searched == [14, 9]  # no more than 16 photos, or one a request
    searched.clear()
    handler.max_beam_tokens = 40
    assert [answer.json for answer in worker.predict(*requests)] == together
    assert searched == [2, 2, 10, 9]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"thread": 1}, "'thread' is unknown; the fields are threads, decoding, max_beam_tokens"),
        ({"threads": 0}, "threads must be an integer, 1 or more"),
        ({"threads": True}, "threads must be"),
        ({"max_beam_tokens": "many"}, "max_beam_tokens must be an integer, 16 or more"),
        ({"decoding": [1]}, "decoding must be a mapping"),
        ([1], "the fields are"),
    ],
)
def test_settings_of_the_handler_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        HandlerSettings.read(values)


def test_the_shipped_settings_are_read():
    shipped = yaml.safe_load((REPOSITORY / "handler/model-config.yaml").read_text())
    assert HandlerSettings.read(shipped["handler"]).max_beam_tokens == 4096
    assert HandlerSettings.read(None) == HandlerSettings.read({}) == HandlerSettings()


# --- one encoder pass ---


def test_a_photo_is_encoded_once_whatever_is_asked(worker, handler, photo, monkeypatch):
    """Five captions with attention encoded the photo six times."""
    passes, encode = [], handler.captioner.encoder

    def counted(images):
        passes.append(len(images))
        return encode(images)

    monkeypatch.setattr(handler.captioner, "encoder", counted)
    fields = {"image": photo, "num_return_sequences": b"5", "attention": b"true"}
    with_maps, picture = worker.predict(
        rest(fields), rest({"image": photo}, explain="True", accept="image/png")
    )
    assert passes == [2]
    assert picture.headers["content-type"] == "image/png"
    monkeypatch.undo()
    image = handler.captioner.preprocess(photo)
    for caption in with_maps.json["captions"]:
        ids = [handler.captioner.tokenizer.vocabulary[token] for token in caption["tokens"]]
        expected = handler.captioner.attention(image, ids).flatten(1)
        assert torch.allclose(torch.tensor(caption["attention"]["maps"]), expected, atol=1e-5)


# --- streams ---


@pytest.fixture(scope="module")
def byte_pairs() -> CaptionTokenizer:
    vocabulary = {token: n for n, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return CaptionTokenizer(tokenizer, 0, 1, 0)


@pytest.mark.parametrize(
    "text", ["a dog", " naïve café", "犬が走る 🐕‍🦺!", "\u0301e", "a\u200db", "𝔘nicode " * 5]
)
def test_pieces_of_a_stream_are_the_text(text, byte_pairs):
    """A character of several bytes comes whole, with the last of its tokens."""
    ids = byte_pairs.encode(text)
    stream = PieceStream(byte_pairs)
    pieces = [stream.add(token_id) for token_id in ids]
    assert "".join(pieces) == byte_pairs.text_of(ids) and "\ufffd" not in "".join(pieces)
    assert pieces == byte_pairs.pieces(ids)


def test_bytes_that_are_no_character_are_not_waited_for(byte_pairs):
    ids = [byte_pairs.vocabulary["Ã"]] * 50
    stream = PieceStream(byte_pairs)
    pieces = [stream.add(token_id) for token_id in ids] + [stream.rest()]
    assert "".join(pieces) == byte_pairs.text_of(ids)
    assert sum(map(bool, pieces)) > 10


def test_a_stream_is_linear_in_its_tokens(byte_pairs, monkeypatch):
    """All ids were decoded again for each token: 19.7 s for 1,023 tokens."""
    decoded = []
    text_of = CaptionTokenizer.text_of
    monkeypatch.setattr(
        CaptionTokenizer,
        "text_of",
        lambda self, ids: decoded.append(len(ids)) or text_of(self, ids),
    )
    ids = byte_pairs.encode("a dog runs " * 100)
    stream = PieceStream(byte_pairs)
    for token_id in ids:
        stream.add(token_id)
    assert sum(decoded) <= 4 * len(ids)


@pytest.mark.parametrize("samples", [1, 3])
def test_the_best_of_several_samples_is_streamed(samples, worker, photo):
    fields = {"image": photo, "stream": b"true", "do_sample": b"true", "seed": b"7",
              "num_return_sequences": str(samples).encode()}  # fmt: skip
    [answer] = worker.predict(rest(fields))
    best = answer.json["captions"][0]
    assert len(answer.json["captions"]) == samples
    assert [json.loads(chunk.body)["token"] for chunk in worker.sent] == best["tokens"]
    assert best["tokens"]


# --- lines of the logs ---

FORGED = "2031-01-01T00:00:00,000 [ERROR] o.p.s.ModelServer - forged"


@pytest.mark.live
def test_no_client_writes_a_line_of_the_logs(tiny_export, tmp_path, photo):
    """An urlencoded body, and escape characters in the address, forged lines of torchserve.log and
    access.log."""
    archive = build_archive(tiny_export, tmp_path / "model_store/captioner.mar", "1.0")
    change_settings(archive, minWorkers=1, maxWorkers=1)
    server = serve.start(configure(tmp_path), home=tmp_path)
    try:
        client = client_of(server, tmp_path)
        headers = {"Authorization": f"Bearer {key(client)}"}
        attack = f"x\r\n{FORGED}\n\x1b[2J\x07{FORGED}"
        form = {**headers, "Content-Type": "application/x-www-form-urlencoded"}
        for body in (attack, f"image={attack}", f"%0d%0a{FORGED}", f"a=%0a{FORGED}&b=%ff%fe"):
            requests.post(f"{client.url}/predictions/captioner", body.encode(), headers=form)
        requests.post(
            f"{client.url}/predictions/captioner", attack.encode(),
            headers={**headers, "Content-Type": "application/json"},
        )  # fmt: skip
        requests.post(
            f"{client.url}/predictions/captioner", headers=headers,
            files={"image": (f"x%0a{FORGED}", photo), "num_beams": (None, attack)},
        )  # fmt: skip
        encoded = requests.utils.quote(attack)
        for path in (
            f"predictions/{encoded}",
            f"{encoded}",
            f"predictions/captioner/{encoded}?{encoded}",
        ):
            requests.get(f"{client.url}/{path}", headers=headers)
        host, port = client.url.removeprefix("http://").split(":")
        for line in (
            f"GET /{attack} HTTP/1.1",
            f"{attack}",
            f"GET / HTTP/1.1\r\nX: \x1b[2J{FORGED}",
        ):
            with socket.create_connection((host, int(port))) as raw:
                raw.sendall(f"{line}\r\n\r\n".encode())
                raw.settimeout(2)
                with contextlib.suppress(OSError):
                    raw.recv(100)
        time.sleep(0.5)
    finally:
        serve.stop(tmp_path)
    for name in ("torchserve.log", "access.log"):
        lines = (tmp_path / "logs" / name).read_bytes().decode("utf-8", "replace").split("\n")
        assert len(lines) > 1
        for line in lines:
            assert not line.startswith(FORGED) and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", line)
            assert not line or re.match(r"20\d\d-\d\d-\d\d", line), line
