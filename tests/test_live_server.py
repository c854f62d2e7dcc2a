"""A real TorchServe on free ports, in a folder of its own: REST and gRPC as the eager model."""

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import requests
from live import client_of, configure, key, metrics_of, post, worker_processes
from PIL import Image

from export.archive import build_archive
from handler.client.connection import Client
from handler.client.stubs import load
from handler.errors import UserError
from handler.serve import server as serve
from training.checkpoint import load_captioner

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def folder(tiny_export, tmp_path_factory):
    """A folder with the archive and the configuration, where the server is started."""
    folder = tmp_path_factory.mktemp("server")
    build_archive(tiny_export, folder / "model_store/captioner.mar", "1.0")
    configure(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    try:
        yield serve.start(folder / "config.properties", home=folder)
    finally:
        serve.stop(folder)


@pytest.fixture(scope="module")
def client(server, folder):
    return client_of(server, folder)


@pytest.fixture(scope="module")
def photo(tiny_data):
    return (tiny_data / "images/18.png").read_bytes()


@pytest.fixture(scope="module")
def eager(tiny_run):
    return load_captioner(tiny_run / "build/checkpoints/tiny")


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


def test_a_prompt_by_form_json_and_grpc(client, eager, photo):
    expected = eager.caption([photo], prompt="the square")[0][0]
    assert expected.text.startswith("the square ")
    encoded = base64.b64encode(photo).decode()
    answers = [
        client.caption(photo, prompt="the square"),
        client.caption_grpc(photo, prompt="the square"),
        post(client, json={"image": encoded, "prompt": "the square"}).json(),
    ]
    for answer in answers:
        assert answer["caption"] == expected.text
        assert answer["captions"][0]["tokens"] == expected.tokens


def test_raw_form_and_json_bodies_say_the_same(client, eager, photo):
    expected = eager.caption([photo])[0][0].text
    encoded = base64.b64encode(photo).decode()
    answers = [
        post(client, data=photo, headers={"Content-Type": "image/png"}),
        post(client, files={"data": photo}),
        requests.put(
            f"{client.url}/predictions/captioner",
            data=photo,
            timeout=60,
            headers={"Authorization": f"Bearer {key(client)}"},
        ),  # as curl -T
        post(
            client,
            data=json.dumps({"image": encoded}),
            headers={"Content-Type": "application/json; charset=utf-8"},
        ),
        post(client, json={"image": encoded}),
        post(client, json={"image": f"data:image/png;base64,{encoded}", "num_beams": "5"}),
    ]
    assert [a.json()["caption"] for a in answers] == [expected] * 6
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
        ({"data": b'{"image": ', "headers": {"Content-Type": "application/json"}}, 400,
         "MissingImage"),
        ({"data": b"[" + b"[]," * 999 + b"[]]", "headers": {"Content-Type": "application/json"}},
         400, "MissingImage"),
        ({"data": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400,
         "MissingImage"),
        ({"files": {"image": b"x", "temperature": b"1" * 2**20 + b"x"}}, 400, "InvalidParameter"),
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
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "wrong"}):
        answer = requests.post(
            f"{client.url}/predictions/captioner", data=photo, headers=headers, timeout=60
        )
        assert (answer.status_code, answer.json()["type"]) == (400, "InvalidKeyException")


def test_grpc_streams_of_every_kind_do_no_harm(client, photo):
    """An empty input, an error and a request to stream: each ended the worker in some handler."""
    messages, stubs = load()
    metadata = (("authorization", f"Bearer {key(client)}"),)
    inputs = [{}, {"image": b"broken"}, {"image": photo, "stream": b"true", "num_beams": b"1"}]
    with grpc.insecure_channel(client.grpc_target) as channel:
        stub = stubs.InferenceAPIsServiceStub(channel)
        for given in inputs:
            request = messages.PredictionsRequest(model_name="captioner", input=given)
            for answers in (
                list(stub.StreamPredictions(request, metadata=metadata, timeout=30)),
                [stub.Predictions(request, metadata=metadata, timeout=30)],
            ):
                assert [json.loads(a.prediction)["code"] in (400, 415) for a in answers] == [True]
    assert client.caption_grpc(photo)["caption"]


def test_a_wrong_token_is_refused_by_grpc(client, photo):
    messages, stubs = load()
    request = messages.PredictionsRequest(model_name="captioner", input={"image": photo})
    with grpc.insecure_channel(client.grpc_target) as channel:
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.RpcError) as caught:
                stubs.InferenceAPIsServiceStub(channel).Predictions(
                    request, metadata=metadata, timeout=30
                )
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_the_model_card(client, server, folder):
    keys = json.loads((folder / "key_file.json").read_text())
    answer = requests.get(
        f"{server.management}/models/captioner?customized=true",
        headers={"Authorization": f"Bearer {keys['management']['key']}"},
        timeout=30,
    )
    card = answer.json()[0]["customizedMetadata"]
    assert card["model"]["precision"] == "fp32"
    assert card["options"]["num_beams"] == {"default": 5, "range": "1 to 16"}


def test_a_clients_describe_header_gets_a_caption(client, photo):
    answer = post(client, files={"image": photo}, headers={"describe": "True"})
    assert "caption" in answer.json()


def test_explanations_as_json_and_as_a_picture(client, photo):
    answer = post(client, "explanations/captioner", files={"image": photo})
    assert "attention" in answer.json()["captions"][0]
    answer = post(client, "explanations/captioner", files={"image": photo},
                  headers={"Accept": "image/png"})  # fmt: skip
    assert answer.headers["Content-Type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).format == "PNG"
    bad = post(client, "explanations/captioner", files={"image": b"x"},
               headers={"Accept": "image/png"})  # fmt: skip
    assert (bad.status_code, bad.json()["type"]) == (415, "UnsupportedMediaType")


def test_a_photo_of_16_mib_passes_and_a_larger_one_is_refused(client, photo):
    """In base64 too: the server's own limit must not come first."""
    whole = photo + bytes(16 * 2**20 - len(photo))
    assert client.caption(whole)["caption"]
    encoded = base64.b64encode(whole).decode()
    assert "caption" in post(client, json={"image": encoded}).json()
    assert client.caption_grpc(whole)["caption"]
    answer = post(client, files={"image": whole + b"x"})
    assert (answer.status_code, answer.json()["type"]) == (413, "ImageTooLarge")
    with pytest.raises(UserError, match=r"ImageTooLarge \(413\)"):
        client.caption(bytes(25 * 2**20))


def test_only_this_machine_is_listened_to(server):
    import psutil

    listening = [
        connection.laddr.ip
        for connection in psutil.Process(server.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 5
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def test_models_cannot_be_registered_from_outside(client, server, folder):
    keys = json.loads((folder / "key_file.json").read_text())
    answer = requests.post(
        f"{server.management}/models?url=http://127.0.0.1:1/x.mar",
        headers={"Authorization": f"Bearer {keys['management']['key']}"},
        timeout=30,
    )
    assert answer.status_code in (403, 405)


def test_a_renewed_key_is_used(client, photo, folder):
    """As after an hour: the old key is refused, and the client asks for a new one."""
    keys = json.loads((folder / "key_file.json").read_text())
    server = serve.running(folder)
    requests.get(
        f"{server.management}/token?type=inference",
        headers={"Authorization": f"Bearer {keys['API']['key']}"},
        timeout=30,
    ).raise_for_status()
    refused = requests.post(
        f"{client.url}/predictions/captioner",
        files={"image": photo},
        headers={"Authorization": f"Bearer {keys['inference']['key']}"},
        timeout=30,
    )
    assert (refused.status_code, refused.json()["type"]) == (400, "InvalidKeyException")
    assert client.caption(photo)["caption"]
    (folder / "key_file.json").write_text(
        json.dumps({**json.loads((folder / "key_file.json").read_text()),
                    "inference": {"key": "expired"}})
    )  # fmt: skip
    client.management = server.management
    assert client.caption(photo)["caption"]


def test_no_log_holds_a_key_or_a_clients_words(client, folder, photo):
    post(client, files={"image": photo}, data={"secret-field": "secret-value"})
    post(client, data=b'{"secret-json', headers={"Content-Type": "application/json"})
    time.sleep(0.5)
    logs = "".join(p.read_text(errors="replace") for p in (folder / "logs").iterdir())
    keys = json.loads((folder / "key_file.json").read_text())
    for secret in ("secret-", *(entry["key"] for entry in keys.values())):
        assert secret not in logs
    assert "MODEL_LOG" in logs


def test_one_bad_request_never_touches_its_neighbours(client, eager, photo):
    expected = eager.caption([photo])[0][0].text

    def ask(number: int) -> bool:
        if number % 3:
            return client.caption(photo)["caption"] == expected
        return post(client, files={"image": b"GIF89a broken"}).status_code == 400

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(48)))


def test_metrics_agree_with_what_the_client_counted(client, server, photo):
    before = metrics_of(server)
    answers = [client.caption(photo, num_return_sequences=n) for n in (1, 2, 3)]
    answers.append(client.caption_grpc(photo))
    for bad in ({"files": {"image": b"x"}}, {"files": {"image": b"GIF89a"}}, {"json": {}}):
        assert post(client, **bad).status_code in (400, 415)
    expected = {
        "captioner_photos_total": 4,
        "captioner_tokens_total": sum(len(c["tokens"]) for a in answers for c in a["captions"]),
        "captioner_errors_total UnsupportedMediaType": 1,
        "captioner_errors_total InvalidImage": 1,
        "captioner_errors_total MissingImage": 1,
        "captioner_batch_size_count": 7,
        "captioner_batch_size_sum": 7,
        "captioner_decode_seconds_count": 4,
        "captioner_encode_seconds_count": 4,
        "captioner_search_seconds_count": 4,
    }
    deadline = time.monotonic() + 10
    while True:  # TorchServe reads the worker's lines after it has passed its answer on
        now = metrics_of(server)
        found = {name: now.get(name, 0) - before.get(name, 0) for name in expected}
        if found == expected or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert found == expected
    for name in ("decode", "encode", "search"):
        spent = f"captioner_{name}_seconds_sum"
        assert 0 < now[spent] - before.get(spent, 0) < 60


def test_killed_workers_are_back_by_themselves(client, eager, photo, server):
    """The last test of this server: what is in flight may fail, nothing more."""
    workers = worker_processes(server)
    assert len(workers) == 2  # as model-config.yaml says
    for worker in workers:
        worker.kill()
    expected = eager.caption([photo])[0][0].text
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = post(client, files={"image": photo})
        if answer.status_code == 200:
            break
        assert answer.status_code >= 500
        time.sleep(0.3)
    assert answer.json()["caption"] == expected


@pytest.mark.slow
def test_tls_under_a_path_of_other_letters(folder, eager, photo, tmp_path, monkeypatch):
    """Java reads a properties file as Latin-1, and file names in the letters of the locale."""
    home = tmp_path / "büro 犬"
    home.mkdir()
    (home / "model_store").symlink_to(folder / "model_store")
    for locale in ("C.UTF-8", "C"):
        monkeypatch.setenv("LC_ALL", locale)
        try:
            server = serve.start(configure(home), tls=True, home=home)
            client = client_of(server, home)
            expected = eager.caption([photo])[0][0].text
            assert client.caption(photo)["caption"] == expected
            assert client.caption_grpc(photo)["caption"] == expected
        finally:
            serve.stop(home)


def test_tls(folder, eager, photo, tmp_path):
    """`make serve TLS=1`: https and gRPC over TLS with a certificate of its own making."""
    (tmp_path / "model_store").symlink_to(folder / "model_store")
    try:
        server = serve.start(configure(tmp_path), tls=True, home=tmp_path)
        assert server.inference.startswith("https://")
        assert (tmp_path / "build/tls/key.pem").stat().st_mode & 0o777 == 0o600
        client = client_of(server, tmp_path)
        expected = eager.caption([photo])[0][0].text
        assert client.caption(photo)["caption"] == expected
        assert client.caption_grpc(photo)["caption"] == expected
        assert client.picture(photo).startswith(b"\x89PNG")
        with pytest.raises(UserError, match="no answer"):  # a certificate nobody vouches for
            Client(server.inference, key_file=client.key_file).caption(photo)
        plain = server.inference.replace("https", "http")
        with pytest.raises(UserError, match=r"no answer|403"):
            Client(plain, key_file=client.key_file).caption(photo)
    finally:
        serve.stop(tmp_path)
