"""A real TorchServe on free ports, in folders of its own: REST and gRPC against the eager model."""

import base64
import json
import os
import socket
import subprocess
import sys
import time

import grpc
import pytest
import requests
from conftest import REPOSITORY

from export.archive import build_archive
from handler.client import Client
from handler.errors import UserError
from handler.grpc_stubs import load
from training.checkpoint import load_captioner

pytestmark = pytest.mark.live


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def client(tiny_export, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    build_archive(tiny_export, folder / "model_store/captioner.mar", "1.0")
    rest, management, metrics, grpc_port, grpc_management = free_ports(5)
    lines = []
    replaced = {
        "inference_address": f"http://127.0.0.1:{rest}",
        "management_address": f"http://127.0.0.1:{management}",
        "metrics_address": f"http://127.0.0.1:{metrics}",
        "grpc_inference_port": str(grpc_port),
        "grpc_management_port": str(grpc_management),
    }
    for line in (REPOSITORY / "config.properties").read_text().splitlines():
        name = line.split("=")[0]
        lines.append(f"{name}={replaced[name]}" if name in replaced else line)
    (folder / "config.properties").write_text("\n".join(lines) + "\n")
    (folder / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "TEMP": str(folder / "tmp")}
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, "-W", "ignore", "-m", "handler.serve"]
    done = subprocess.run([*command, "start"], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=240)  # fmt: skip
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        yield Client(
            f"http://127.0.0.1:{rest}", f"127.0.0.1:{grpc_port}", key_file=folder / "key_file.json"
        )
    finally:
        subprocess.run([*command, "stop"], cwd=folder, env=environment, timeout=60)


@pytest.fixture(scope="module")
def photo(tiny_data):
    return (tiny_data / "images/18.png").read_bytes()


@pytest.fixture(scope="module")
def eager(tiny_run):
    return load_captioner(tiny_run / "build/checkpoints/tiny")


def key(client) -> str:
    return json.loads(client.key_file.read_text())["inference"]["key"]


def post(client, path="predictions/captioner", headers=None, **content):
    headers = {"Authorization": f"Bearer {key(client)}", **(headers or {})}
    return requests.post(f"{client.url}/{path}", headers=headers, timeout=60, **content)


def test_rest_and_grpc_give_the_eager_caption(client, eager, photo):
    expected = eager.caption([photo], num_beams=3, num_return_sequences=2)[0]
    for ask in (client.caption, client.caption_grpc):
        answer = ask(photo, num_beams=3, num_return_sequences=2)
        assert answer["caption"] == expected[0].text
        for given, caption in zip(answer["captions"], expected, strict=True):
            assert given["caption"] == caption.text and given["tokens"] == caption.tokens
            assert given["score"] == pytest.approx(caption.score, abs=1e-4)
            assert given["token_log_probs"] == pytest.approx(caption.token_log_probs, abs=1e-4)
        assert answer["model"]["checkpoint"].startswith("sha256:")


def test_raw_form_and_json_bodies_say_the_same(client, eager, photo):
    expected = eager.caption([photo])[0][0].text
    encoded = base64.b64encode(photo).decode()
    answers = [
        post(client, data=photo, headers={"Content-Type": "image/png"}),
        post(client, files={"data": photo}),
        post(client, json={"image": encoded}),
        post(client, json={"image": f"data:image/png;base64,{encoded}", "num_beams": "5"}),
    ]
    assert [a.json()["caption"] for a in answers] == [expected] * 4
    assert all(a.headers["Content-Type"].startswith("application/json") for a in answers)


@pytest.mark.parametrize(
    ("content", "code", "kind"),
    [
        ({"data": b"", "headers": {"Content-Type": "image/jpeg"}}, 400, "MissingImage"),
        ({"data": b"%PDF-1.4", "headers": {"Content-Type": "image/jpeg"}}, 415,
         "UnsupportedMediaType"),
        ({"data": b"\xff\xd8\xff\xe0 broken", "headers": {"Content-Type": "image/jpeg"}}, 400,
         "InvalidImage"),
        ({"json": {"num_beams": 3}}, 400, "MissingImage"),
        ({"json": {"image": "***"}}, 400, "InvalidImage"),
        ({"json": {"image": "aGk=", "nonsense": 1}}, 400, "InvalidParameter"),
    ],
)  # fmt: skip
def test_errors_are_typed(client, content, code, kind):
    answer = post(client, **content)
    assert (answer.status_code, answer.json()["code"]) == (code, code)
    assert answer.json()["type"] == kind


def test_options_out_of_range_are_named_by_rest_and_grpc(client, photo):
    for ask in (client.caption, client.caption_grpc):
        with pytest.raises(UserError, match=r"InvalidParameter.*num_beams must be"):
            ask(photo, num_beams=17)
        with pytest.raises(UserError, match=r"InvalidParameter.*num_beams"):
            ask(photo, num_beams=2, do_sample=True)


def test_attention_and_the_picture(client, photo):
    caption = client.caption(photo, attention=True)["captions"][0]
    assert caption["attention"]["grid"] == [4, 4]
    assert len(caption["attention"]["maps"]) == len(caption["tokens"])
    assert all(sum(m) == pytest.approx(1, abs=1e-4) for m in caption["attention"]["maps"])
    assert client.picture(photo).startswith(b"\x89PNG")


def test_streaming_tells_the_tokens_and_then_the_answer(client, eager, photo):
    answer = post(client, files={"image": photo}, data={"stream": "true", "num_beams": "1"})
    lines = [json.loads(line) for line in answer.text.splitlines() if line]
    expected = eager.caption([photo], num_beams=1)[0][0]
    assert [line["token"] for line in lines[:-1]] == expected.tokens
    assert lines[-1]["caption"] == expected.text
    refused = post(client, files={"image": photo}, data={"stream": "true"})
    assert refused.json()["type"] == "InvalidParameter"


def test_stream_predictions_by_grpc_does_no_harm(client, eager, photo):
    messages, stubs = load()
    with grpc.insecure_channel(client.grpc_target) as channel:
        request = messages.PredictionsRequest(model_name="captioner", input={"image": photo})
        metadata = (("authorization", f"Bearer {key(client)}"),)
        answers = list(
            stubs.InferenceAPIsServiceStub(channel).StreamPredictions(
                request, metadata=metadata, timeout=60
            )
        )
    assert json.loads(answers[-1].prediction)["caption"] == eager.caption([photo])[0][0].text
    assert client.caption(photo)["caption"]


def test_a_wrong_token_is_refused(client, photo):
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = requests.post(
            f"{client.url}/predictions/captioner", data=photo, headers=headers, timeout=60
        )
        assert answer.status_code == 400 and "caption" not in answer.json()


def test_one_bad_request_never_touches_its_neighbours(client, eager, photo):
    from concurrent.futures import ThreadPoolExecutor

    expected = eager.caption([photo])[0][0].text

    def ask(number: int) -> bool:
        if number % 3:
            return client.caption(photo)["caption"] == expected
        return post(client, files={"image": b"GIF89a broken"}).status_code == 400

    with ThreadPoolExecutor(8) as pool:
        started = time.monotonic()
        assert all(pool.map(ask, range(24)))
    assert time.monotonic() - started < 60
