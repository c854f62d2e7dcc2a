"""A live server at its limits: a full queue, and captions that are not ASCII."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from live import change_settings, client_of, configure, key, post

from export.archive import build_archive
from handler.captioner import Captioner
from handler.client.stubs import load
from handler.serve import server as serve

pytestmark = pytest.mark.live

QUEUE = 2


@pytest.fixture(scope="module")
def export(tiny_export, tmp_path_factory) -> Path:
    """The tiny captioner, with letters beyond ASCII, and beyond Latin, in every word."""
    folder = tmp_path_factory.mktemp("not-ascii") / "tiny"
    shutil.copytree(tiny_export, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = content["model"]["vocab"].items()
    content["model"]["vocab"] = {w if w[0] == "<" else f"{w}é犬": number for w, number in words}
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def client(export, tmp_path_factory):
    """A server that answers one request at a time and lets two wait."""
    folder = tmp_path_factory.mktemp("limits")
    archive = build_archive(export, folder / "model_store/captioner.mar", "1.0")
    change_settings(archive, minWorkers=1, maxWorkers=1, batchSize=1, jobQueueSize=QUEUE)
    try:
        yield client_of(serve.start(configure(folder), home=folder), folder)
    finally:
        serve.stop(folder)


@pytest.fixture(scope="module")
def photo(tiny_data) -> bytes:
    return (tiny_data / "images/18.png").read_bytes()


@pytest.fixture(scope="module")
def caption(export, photo):
    [[caption]] = Captioner.load(export).caption([photo], num_beams=1)
    assert not caption.text.isascii()
    return caption


def test_captions_that_are_not_ascii(client, photo, caption):
    """As UTF-8, not as escapes, by every way out of the server."""
    answer = post(client, files={"image": photo}, data={"num_beams": "1"})
    assert answer.json()["caption"] == caption.text
    assert caption.text.encode() in answer.content
    assert client.caption_grpc(photo, num_beams=1)["captions"][0]["tokens"] == caption.tokens
    assert client.picture(photo, num_beams=1).startswith(b"\x89PNG")
    streamed = post(client, files={"image": photo}, data={"num_beams": "1", "stream": "1"})
    lines = [json.loads(line) for line in streamed.content.decode().splitlines() if line]
    assert [line["token"] for line in lines[:-1]] == caption.tokens
    assert lines[-1]["caption"] == caption.text


def test_a_full_queue_refuses_and_recovers(client, photo, caption):
    """TorchServe's own 503 and INTERNAL; what is taken is answered, and nothing is lost."""
    messages, stubs = load()
    request = messages.PredictionsRequest(
        model_name="captioner", input={"image": photo, "num_beams": b"1"}
    )

    def by_rest(_: int) -> bool:
        answer = post(client, files={"image": photo}, data={"num_beams": "1"})
        if answer.status_code == 200:
            assert answer.json()["caption"] == caption.text
            return True
        assert (answer.status_code, answer.json()["code"]) == (503, 503)
        assert answer.json()["type"] == "ServiceUnavailableException"
        return False

    def by_grpc(_: int) -> bool:
        try:
            answer = stub.Predictions(request, metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INTERNAL
            return False
        assert json.loads(answer.prediction)["caption"] == caption.text
        return True

    metadata = [("authorization", f"Bearer {key(client)}")]
    with grpc.insecure_channel(client.grpc_target) as channel, ThreadPoolExecutor(32) as pool:
        stub = stubs.InferenceAPIsServiceStub(channel)
        for ask in (by_rest, by_grpc):
            taken = list(pool.map(ask, range(64)))
            assert QUEUE < sum(taken) < 64
    assert post(client, files={"image": photo}).status_code == 200
