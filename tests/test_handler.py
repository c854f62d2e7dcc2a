"""The handler behind TorchServe's own loader and worker protocol, without Java: batches of every
kind of request, errors that stay with their request, streams, defaults."""

import base64
import io
import json
import logging
import re
import zipfile
from pathlib import Path

import pytest
import yaml
from cost import processor_seconds
from hostile import HOSTILE
from load import OPTIONS
from photos import encoded, natural, smooth
from PIL import Image
from worker import Worker, by_grpc, rest

import handler.answer
from export.archive import build_archive
from handler import caption_handler
from handler.attention_maps import GAP, LABEL, PANEL
from handler.captioner import Captioner
from handler.errors import UserError

JPEG = "image/jpeg"


@pytest.fixture(scope="module")
def folder(tiny_export, tmp_path_factory) -> Path:
    """An unpacked archive."""
    folder = tmp_path_factory.mktemp("unpacked")
    store = tmp_path_factory.mktemp("store")
    archive = build_archive(tiny_export, store / "captioner.mar", "1.0")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def worker(folder):
    return Worker(folder)


@pytest.fixture(scope="module")
def captioner(folder):
    return Captioner.load(folder)


@pytest.fixture(scope="module")
def photos(tiny_data) -> list[bytes]:
    return [(tiny_data / f"images/{n}.png").read_bytes() for n in range(16, 20)]


def test_every_kind_of_request_shares_a_batch(worker, captioner, photos):
    encoded = base64.b64encode(photos[0]).decode()
    answers = worker.predict(
        rest({"body": photos[0]}, JPEG),
        rest({"image": photos[0]}),
        rest({"data": photos[0], "num_beams": b"3"}),
        rest({"body": {"image": encoded, "num_beams": 3}}, "application/json"),
        rest({"body": {"image": f"data:image/png;base64,{encoded}"}}, "application/json"),
        by_grpc({"image": photos[0]}),
        by_grpc({"image": photos[0], "num_beams": b"3"}),
    )
    default, three = (captioner.caption([photos[0]], num_beams=k)[0][0].text for k in (5, 3))
    assert [a.status for a in answers] == [200] * 7
    expected = [default, default, three, three, default, default, three]
    assert [a.json["caption"] for a in answers] == expected
    assert all(a.headers["content-type"] == "application/json" for a in answers)


def test_the_answer_of_the_contract(worker, captioner, photos):
    [answer] = worker.predict(rest({"image": photos[1], "num_return_sequences": b"2"}))
    body = answer.json
    assert set(body) == {"caption", "captions", "model"}
    assert set(body["model"]) == {"name", "version", "checkpoint", "precision"}
    assert (body["model"]["name"], body["model"]["version"]) == ("captioner", "1.0")
    assert (body["model"]["precision"], body["model"]["checkpoint"][:7]) == ("fp32", "sha256:")
    assert body["caption"] == body["captions"][0]["caption"]
    names = {"caption", "score", "log_prob", "tokens", "token_log_probs"}
    for said, caption in zip(
        body["captions"], captioner.caption([photos[1]], num_return_sequences=2)[0], strict=True
    ):
        assert set(said) == names
        assert (said["caption"], said["tokens"]) == (caption.text, caption.tokens)
        assert said["score"] == pytest.approx(caption.score, abs=1e-5)
        assert said["token_log_probs"] == pytest.approx(caption.token_log_probs, abs=1e-5)
        assert said["log_prob"] == pytest.approx(sum(caption.token_log_probs), abs=1e-5)


@pytest.mark.parametrize(
    "name", ["tiff, strips of the same slow bytes", "jpeg, full segments of Photoshop resources"]
)
def test_good_photos_wait_for_one_slow_photo_at_most(worker, captioner, photos, name):
    """Seven that took all of their time, or were decoded just within it, made 14 s."""
    slow = HOSTILE[name]()
    worker.predict(rest({"image": photos[0]}), rest({"image": HOSTILE["avif that is none"]()}))
    before = processor_seconds()
    good, *others = worker.predict(*(rest({"image": data}) for data in [photos[0], *[slow] * 7]))
    assert processor_seconds() - before < 2
    assert good.json["caption"] == captioner.caption([photos[0]])[0][0].text
    assert others[-1].json["type"] == "ImageTooComplex"
    # And the next batch is patient again.
    [answer] = worker.predict(rest({"image": encoded(smooth(), "AVIF")}))
    assert answer.status == 200


def test_ordinary_photos_are_decoded_before_slow_ones(worker, captioner):
    """AVIF and HEIC get little time after a photo that took too much: not for its place alone."""
    slow = [rest({"image": HOSTILE["tiff, strips of the same slow bytes"]()})] * 4
    photo = natural(2400, 1800)
    ordinary = [
        encoded(photo, "JPEG", progressive=True),
        encoded(photo, "PNG"),
        encoded(photo, "AVIF", speed=9),
    ]
    answers = worker.predict(*slow, *(rest({"image": data}) for data in ordinary))
    assert [answer.status for answer in answers] == [413] * 4 + [200] * 3
    expected = [captioner.caption([data])[0][0].text for data in ordinary]
    assert [answer.json["caption"] for answer in answers[4:]] == expected


def test_a_photo_alone_or_among_others_has_the_same_caption(worker, photos):
    alone = [worker.predict(rest({"image": photo}))[0].json["caption"] for photo in photos]
    together = worker.predict(*(rest({"image": photo}) for photo in photos))
    assert [answer.json["caption"] for answer in together] == alone


@pytest.mark.parametrize("neighbour", OPTIONS, ids=str)
def test_the_options_of_a_neighbour_change_nothing(worker, photos, neighbour):
    """One request's no_repeat_ngram_size held for all of its batch that had none."""
    requests = [
        rest({"image": photos[0], **{name: str(value).encode() for name, value in given.items()}})
        for given in OPTIONS
    ]
    other = {name: str(value).encode() for name, value in neighbour.items()}
    for request in requests:
        [alone] = worker.predict(request)
        shared = worker.predict(request, rest({"image": photos[1], **other}))[0]
        assert shared.json["caption"] == alone.json["caption"]
        scores = [[c["score"] for c in a.json["captions"]] for a in (shared, alone)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_prompts_by_every_way_share_a_batch(worker, captioner, photos):
    """Prompts of all lengths, and none, beside each other."""
    encoded = base64.b64encode(photos[0]).decode()
    answers = worker.predict(
        rest({"image": photos[0], "prompt": b"the square"}),
        rest({"body": {"image": encoded, "prompt": "The SQUARE on"}}, "application/json"),
        by_grpc({"image": photos[0], "prompt": b"a"}),
        rest({"image": photos[0]}),
        rest({"image": photos[0], "prompt": b"the square", "do_sample": b"1", "seed": b"3"}),
    )
    sampled = {"do_sample": True, "seed": 3}
    options = [{"prompt": "the square"}, {"prompt": "the square on"}, {"prompt": "a"}, {}]
    options.append({"prompt": "the square", **sampled})
    for answer, given in zip(answers, options, strict=True):
        assert answer.status == 200
        [[expected, *_]] = captioner.caption([photos[0]], **given)
        [said] = answer.json["captions"]
        assert answer.json["caption"] == said["caption"] == expected.text
        assert expected.text.startswith(given.get("prompt", ""))
        assert said["tokens"] == expected.tokens
        assert said["token_log_probs"] == pytest.approx(expected.token_log_probs, abs=1e-4)
        assert said["score"] == pytest.approx(expected.score, abs=1e-4)


def test_a_large_jpeg_is_read_as_the_library_reads_it(worker, captioner):
    """The handler decoded large JPEGs at another scale than the captioner did."""
    noise = Image.effect_noise((900, 700), 90).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    [answer] = worker.predict(rest({"image": buffer.getvalue()}))
    expected = captioner.caption([buffer.getvalue()])[0][0]
    assert answer.json["caption"] == expected.text
    assert answer.json["captions"][0]["log_prob"] == pytest.approx(expected.log_prob, abs=1e-5)


# --- errors

ERRORS = [
    (rest({"body": b""}, JPEG), 400, "MissingImage"),
    (rest({"body": {"num_beams": 3}}, "application/json"), 400, "MissingImage"),
    (rest({"body": b'{"image": '}, "application/json"), 400, "MissingImage"),
    (rest({"body": b"\xff\xd8\xff\xe0 cut off"}, JPEG), 400, "InvalidImage"),
    (rest({"body": {"image": "%%%"}}, "application/json"), 400, "InvalidImage"),
    (rest({"body": b"%PDF-1.7"}, JPEG), 415, "UnsupportedMediaType"),
    (rest({"body": b"plain text"}, "text/plain"), 415, "UnsupportedMediaType"),
    (rest({"body": b"\x89PNG\r\n\x1a\n" + bytes(16 * 2**20)}, JPEG), 413, "ImageTooLarge"),
    (rest({"image": b"x", "num_beams": b"17"}), 400, "InvalidParameter"),
    (rest({"image": b"x", "data": b"x"}), 400, "InvalidParameter"),
    (rest({"image": b"x", "nonsense": b"1"}), 400, "InvalidParameter"),
    (rest({"image": b"x", "num_beams": b"3", "do_sample": b"true"}), 400, "InvalidParameter"),
    (rest({"image": b"x", "max_new_tokens": b"99"}), 400, "InvalidParameter"),
    (rest({"image": b"x", "top_k": b"9999999"}), 400, "InvalidParameter"),
    (rest({"image": b"x", "prompt": b"the purple square"}), 400, "InvalidParameter"),
    (rest({"image": b"x", "prompt": b"a a a a a a"}), 400, "InvalidParameter"),
    (rest({"image": b"x", "prompt": b"a", "max_new_tokens": b"9"}), 400, "InvalidParameter"),
    (rest({"image": b"x", "prompt": b" "}), 400, "InvalidParameter"),
    (rest({"image": b"x", "prompt": b"\xff\xfe"}), 400, "InvalidParameter"),
    (rest({"body": {"image": "eA==", "prompt": 3}}, "application/json"), 400, "InvalidParameter"),
]


def test_every_error_stays_with_its_request(worker, photos):
    """All errors of the contract in one batch, a good request between any two of them."""
    expected = worker.predict(rest({"image": photos[0]}))[0].json["caption"]
    batch = []
    for bad, *_ in ERRORS:
        batch += [bad, rest({"image": photos[0]})]
    answers = worker.predict(*batch)
    for answer, (_, code, kind) in zip(answers[::2], ERRORS, strict=True):
        assert (answer.status, answer.json["code"], answer.json["type"]) == (code, code, kind)
        assert set(answer.json) == {"code", "type", "message"}
        assert answer.phrase.isascii() and answer.phrase.isprintable()
        assert answer.headers["content-type"] == "application/json"
    assert {answer.json["caption"] for answer in answers[1::2]} == {expected}
    assert {answer.status for answer in answers[1::2]} == {200}


def test_errors_by_grpc_are_in_the_body(worker):
    [answer] = worker.predict(by_grpc({"image": b"GIF89a broken"}))
    assert (answer.json["code"], answer.json["type"]) == (400, "InvalidImage")


def test_an_unforeseen_failure_says_nothing_of_the_inside(worker, photos, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("/secret/path\n[METRICS]evil.Count:1")

    monkeypatch.setattr(caption_handler, "decode_resized", broken)
    with caplog.at_level(logging.ERROR):
        [answer] = worker.predict(rest({"image": photos[0]}))
    assert (answer.status, answer.json["type"]) == (500, "InternalError")
    assert b"secret" not in answer.body
    assert "RuntimeError" in caplog.text
    # TorchServe takes a line of output that begins so for a metric.
    assert not any(line.startswith("[METRICS]") for line in caplog.text.splitlines())
    assert "secret-key" not in caplog.text


def test_what_fails_together_is_tried_alone(worker, photos, monkeypatch):
    """Only the photo that the model cannot take fails, not the batch it came in."""
    whole = Captioner.caption_memory
    poison = worker.predict(rest({"image": photos[1]}))[0].json["caption"]

    def sometimes(self, memory, options, on_token=None):
        if any(o.seed == 13 for o in options):
            raise RuntimeError("out of memory")
        return whole(self, memory, options, on_token)

    monkeypatch.setattr(Captioner, "caption_memory", sometimes)
    answers = worker.predict(
        rest({"image": photos[1]}),
        rest({"image": photos[0], "seed": b"13"}),
        rest({"image": photos[1]}),
    )
    assert [answer.status for answer in answers] == [200, 500, 200]
    assert {answers[0].json["caption"], answers[2].json["caption"]} == {poison}
    # A stream of which nothing has been sent is tried again, too.
    answers = worker.predict(
        rest({"image": photos[1]}),
        rest({"image": photos[0], "seed": b"13"}),
        rest({"image": photos[1], "stream": b"true", "num_beams": b"1"}),
    )
    assert [answer.status for answer in answers] == [200, 500, 200]


def test_no_answer_or_log_holds_a_header(worker, photos, caplog):
    with caplog.at_level(logging.DEBUG):
        answers = worker.predict(rest({"image": photos[0]}), rest({"image": b"broken"}))
    assert all(b"secret-key" not in answer.body for answer in answers)
    assert "secret-key" not in caplog.text


def counted(caplog) -> dict[str, list[float]]:
    """The metrics on the worker's output, as TorchServe reads them: name and type -> values."""
    pattern = r"\[METRICS\](\w+)\.\w+:([0-9\-,.e]+)\|#([^|]*)\|#type:(\w+)\|#hostname:.*"
    found: dict[str, list[float]] = {}
    for line in caplog.messages:
        if line.startswith("[METRICS]captioner_"):
            name, value, labels, _ = re.fullmatch(pattern, line).groups()
            model, _, kind = labels.partition(",Type:")
            assert model == "ModelName:captioner"
            found.setdefault(f"{name} {kind}".strip(), []).append(float(value))
    return found


def test_metrics_count_what_was_answered(worker, photos, caplog):
    with caplog.at_level(logging.INFO):
        answers = worker.predict(
            rest({"image": photos[0], "num_return_sequences": b"2"}),
            rest({"image": b"broken"}),
            rest({"image": photos[1]}),
            by_grpc({"image": photos[1], "num_beams": b"17"}),
            by_grpc({"image": photos[1], "num_beams": b"0"}),
        )
        [card] = worker.predict(
            {"headers": rest({}, describe="True")["headers"], "parameters": []}
        )  # counts as nothing
    assert card.json["options"]
    found = counted(caplog)
    captions = [c for i in (0, 2) for c in answers[i].json["captions"]]
    assert len(captions) == 3
    assert found.pop("captioner_photos_total") == [2]
    assert found.pop("captioner_tokens_total") == [sum(len(c["tokens"]) for c in captions)]
    assert found.pop("captioner_batch_size") == [5]
    assert found.pop("captioner_errors_total UnsupportedMediaType") == [1]
    assert found.pop("captioner_errors_total InvalidParameter") == [1, 1]
    for name, times in (("decode", 2), ("encode", 1), ("search", 1)):
        seconds = found.pop(f"captioner_{name}_seconds")
        assert len(seconds) == times
        assert all(0 < s < 60 for s in seconds)
    assert found == {}


# --- attention, explanations, description


def test_attention_has_one_map_a_token(worker, photos):
    answers = worker.predict(
        rest({"image": photos[0], "attention": b"true", "num_return_sequences": b"2"}),
        rest({"image": photos[0], "attention": b"true", "prompt": b"the square"}),
    )
    for caption in (caption for answer in answers for caption in answer.json["captions"]):
        assert caption["tokens"]
        attention = caption["attention"]
        assert attention["grid"] == [4, 4]
        assert len(attention["maps"]) == len(caption["tokens"])
        assert all(len(row) == 16 for row in attention["maps"])
        assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in attention["maps"])


def test_explanations_turn_attention_on(worker, photos):
    [answer] = worker.predict(rest({"image": photos[0]}, explain="True"))
    assert answer.headers["content-type"] == "application/json"
    assert "attention" in answer.json["captions"][0]


def test_explanations_as_a_picture_beside_others(worker, photos):
    picture, plain, bad = worker.predict(
        rest({"image": photos[0]}, explain="True", accept="image/png, */*"),
        rest({"image": photos[0]}, accept="image/png"),
        rest({"image": b"broken"}, explain="True", accept="image/png"),
    )
    assert picture.headers["content-type"] == "image/png"
    image = Image.open(io.BytesIO(picture.body))
    assert image.format == "PNG"
    # Rows of panels that have the shape of the photo, 40 x 30.
    assert (image.height - GAP) % (round(PANEL * 3 / 4) + LABEL + GAP) == 0
    assert "caption" in plain.json
    assert (bad.status, bad.headers["content-type"]) == (415, "application/json")


def test_pictures_wait_for_each_other_small(worker, monkeypatch):
    """A batch held all of its photos as they were decoded: 256 MB for one of 64 megapixels."""
    sizes = []
    whole = caption_handler.answer

    def watched(captioner, job, *rest):
        sizes.append(job.image.size)
        return whole(captioner, job, *rest)

    monkeypatch.setattr(caption_handler, "answer", watched)
    photo = encoded(smooth(2000, 1000), "JPEG")
    [answer] = worker.predict(rest({"image": photo}, explain="True", accept="image/png"))
    assert Image.open(io.BytesIO(answer.body)).format == "PNG"
    assert sizes == [(PANEL, PANEL // 2)]


def test_maps_beyond_an_answer_are_refused(worker, photos, monkeypatch):
    """An answer of more than `max_response_size` ends the worker, and the batch with it."""
    monkeypatch.setattr(handler.answer, "MAX_MAP_VALUES", 16)
    refused, plain = worker.predict(
        rest({"image": photos[0], "attention": b"true", "min_new_tokens": b"2"}),
        rest({"image": photos[0]}),
    )
    assert (refused.status, refused.json["type"], plain.status) == (400, "InvalidParameter", 200)
    assert refused.json["message"].startswith("attention: the maps of all tokens")


def test_description_is_the_model_card(worker):
    [answer] = worker.predict({"headers": rest({}, describe="True")["headers"], "parameters": []})
    card = answer.json
    assert card["model"]["precision"] == "fp32"
    assert card["options"]["num_beams"] == {"default": 5, "range": "1 to 16"}
    assert card["options"]["max_new_tokens"] == {"default": 9, "range": "1 to 9"}
    prompt = {"default": None, "range": "a string of at most 5 tokens"}
    assert card["options"]["prompt"] == prompt
    assert all(set(option) == {"default", "range"} for option in card["options"].values())
    assert "BLEU-4" in card["validation"]
    assert card["preprocessing"]["image_size"] == 32


def test_a_clients_describe_header_changes_nothing(worker, photos):
    """BaseHandler would describe the model to the whole batch."""
    first, second = worker.predict(
        rest({"image": photos[0]}, describe="True"), rest({"image": photos[0]})
    )
    assert first.json["caption"] == second.json["caption"]


# --- streams


def test_a_stream_beside_other_requests(worker, captioner, photos):
    answers = worker.predict(
        rest({"image": photos[0]}),
        rest({"image": photos[1], "stream": b"true", "num_beams": b"1"}),
        rest({"image": b"broken"}),
    )
    expected = captioner.caption([photos[1]], num_beams=1)[0][0]
    assert [json.loads(chunk.body) for chunk in worker.sent] == [
        {"token": token} for token in expected.tokens
    ]
    assert all(chunk.request == "r1" and chunk.body.endswith(b"\n") for chunk in worker.sent)
    assert {chunk.headers["ts_stream_next"] for chunk in worker.sent} == {"true"}
    assert answers[1].headers["ts_stream_next"] == "false"
    assert answers[1].json["caption"] == expected.text
    assert "ts_stream_next" not in answers[0].headers
    assert [answer.status for answer in answers] == [200, 200, 415]


def test_a_sampled_stream_is_the_sampled_caption(worker, photos):
    options = {"do_sample": b"true", "seed": b"7"}
    [plain] = worker.predict(rest({"image": photos[0], **options}))
    [answer] = worker.predict(rest({"image": photos[0], "stream": b"1", **options}))
    assert answer.json == plain.json
    tokens = [json.loads(chunk.body)["token"] for chunk in worker.sent]
    assert tokens == plain.json["captions"][0]["tokens"]


def test_a_stream_begins_behind_the_prompt(worker, photos):
    options = {"prompt": b"the square", "num_beams": b"1", "stream": b"true"}
    [answer] = worker.predict(rest({"image": photos[0], **options}))
    tokens = [json.loads(chunk.body)["token"] for chunk in worker.sent]
    assert tokens == answer.json["captions"][0]["tokens"] != []
    assert answer.json["caption"] == " ".join(["the square", *tokens])


@pytest.mark.parametrize(
    "request_",
    [
        rest({"image": b"x", "stream": b"true"}),
        rest({"image": b"x", "stream": b"true", "num_beams": b"2"}),
        rest({"image": b"x", "stream": b"true", "num_beams": b"1"}, explain="True"),
        by_grpc({"image": b"x", "stream": b"true", "num_beams": b"1"}),
    ],
)
def test_streams_that_cannot_be(worker, request_):
    [answer] = worker.predict(request_)
    assert (answer.status, answer.json["type"]) == (400, "InvalidParameter")
    assert "stream" in answer.json["message"]
    assert worker.sent == []


@pytest.mark.parametrize("fields", [{}, {"image": b""}, {"image": b"x"}, {"x": b"1"}])
def test_every_grpc_answer_ends_its_stream(worker, fields):
    """StreamPredictions waits for more otherwise, until the worker is killed: an empty input, which
    looks like a request without headers, did that."""
    [answer] = worker.predict(by_grpc(fields))
    assert answer.headers["ts_stream_next"] == "false"
    assert answer.json["code"] in (400, 415)


# --- defaults


def load_with(folder: Path, tmp_path: Path, yaml_defaults: dict, checkpoint: dict) -> Worker:
    """The model with other defaults in model-config.yaml and in the checkpoint."""
    for file in folder.rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    settings_file = tmp_path / "handler/model-config.yaml"
    settings = yaml.safe_load(settings_file.read_text())
    settings["handler"]["decoding"] = yaml_defaults
    settings_file.write_text(yaml.safe_dump(settings))
    config = json.loads((tmp_path / "config.json").read_text())
    config["decoding"] = checkpoint
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Worker(tmp_path)


def test_request_over_checkpoint_over_model_config_over_table(folder, tmp_path, photos):
    settings = {"num_beams": 2, "num_return_sequences": 2}
    worker = load_with(folder, tmp_path, settings, {"num_beams": 4})
    [card] = worker.predict({"headers": rest({}, describe="True")["headers"], "parameters": []})
    defaults = {name: option["default"] for name, option in card.json["options"].items()}
    assert (defaults["num_beams"], defaults["num_return_sequences"]) == (4, 2)
    assert defaults["length_penalty"] == 1.0
    [answer] = worker.predict(rest({"image": photos[0], "num_return_sequences": b"3"}))
    assert len(answer.json["captions"]) == 3
    # A default of four beams is not the client's contradiction.
    [sampled] = worker.predict(rest({"image": photos[0], "do_sample": b"true"}))
    assert sampled.status == 200
    # Nor are three beams in model-config.yaml that of a checkpoint that samples.
    worker = load_with(folder, tmp_path / "samples", {"num_beams": 3}, {"do_sample": True})
    assert worker.predict(rest({"image": photos[0]}))[0].status == 200


def test_a_prompt_by_default(folder, tmp_path, photos):
    settings, checkpoint = {"prompt": "a"}, {"prompt": "the square", "max_new_tokens": 9}
    worker = load_with(folder, tmp_path / "both", settings, checkpoint)
    other = {"image": photos[0], "prompt": b"the"}
    answers = worker.predict(rest({"image": photos[0]}), rest({"body": photos[0]}), rest(other))
    texts = [answer.json["caption"] for answer in answers]
    assert texts[0] == texts[1] and texts[0].startswith("the square ")
    assert texts[2].startswith("the ")
    [card] = worker.predict({"headers": rest({}, describe="True")["headers"], "parameters": []})
    assert card.json["options"]["prompt"]["default"] == "the square"
    assert card.json["options"]["max_new_tokens"]["default"] == 7
    worker = load_with(folder, tmp_path / "settings", settings, {})
    assert worker.predict(rest({"image": photos[0]}))[0].json["caption"].startswith("a ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_beams": 99}, "num_beams"), ({"prompt": "a purple"}, "'purple'")],
)
def test_a_bad_default_fails_at_the_start(folder, tmp_path, settings, message):
    with pytest.raises(UserError, match=f"model-config.yaml: handler.decoding: .*{message}"):
        load_with(folder, tmp_path, settings, {})
