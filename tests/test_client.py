"""The client and its command line, against servers of a few lines that misbehave on demand."""

import json
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
from conftest import run_program
from photos import write_mixed_folder
from PIL import Image

from handler.attention_maps import png_bytes
from handler.beam_search import DecodeOptions
from handler.client import connection as client_module
from handler.client.__main__ import main
from handler.client.connection import Client, ServerError
from handler.client.stubs import load
from handler.errors import ArgumentParser, UserError, run_command
from handler.files import locked
from handler.serve.server import Server

ANSWER = {"caption": "a größe 猫", "captions": [{"caption": "a größe 猫"}], "model": {}}


class FakeServer:
    """Answers every POST from `answers` (status, body), the last one for ever; checks the key."""

    def __init__(self) -> None:
        self.answers = [(200, json.dumps(ANSWER).encode())]
        self.key = "right"
        self.requests: list[tuple[str, bytes]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.requests.append((self.path, body))
                status, content = fake.answers[0]
                if self.headers["Authorization"] != f"Bearer {fake.key}":
                    status = 400
                    content = json.dumps({"code": 400, "type": "InvalidKeyException"}).encode()
                elif len(fake.answers) > 1:
                    fake.answers.pop(0)
                self.reply(status, content)

            def do_GET(self) -> None:
                """The management API's rotation."""
                fake.requests.append((self.path, self.headers["Authorization"].encode()))
                fake.rotate()
                self.reply(200, b"{}")

            def reply(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def rotate(self) -> None:
        raise AssertionError("not expected")


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.http.shutdown()
    fake.http.server_close()


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key_file.json"
    write_key(path, "right")
    return path


def write_key(path, key: str) -> None:
    keys = {name: {"key": key} for name in ("inference", "management", "API")}
    path.write_text(json.dumps(keys))


@pytest.fixture
def client(server, key_file):
    return Client(server.url, key_file=key_file, timeout=5)


# --- asking


def test_photo_and_options_travel_as_a_form(client, server):
    answer = client.caption(b"PHOTO", num_beams=3, do_sample=False, seed=None, length_penalty=0.5)
    assert answer == ANSWER
    path, body = server.requests[0]
    assert path == "/predictions/captioner"
    for part in (b'name="image"', b"PHOTO", b'name="num_beams"\r\n\r\n3', b"\r\n\r\nfalse", b"0.5"):
        assert part in body
    assert b"seed" not in body


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"code": 400, "type": "InvalidImage", "message": "cut\\noff"}', "InvalidImage"),
        (503, b'{"code": 503, "type": "ServiceUnavailableException"}', "ServiceUnavailable"),
        (413, b"", "ImageTooLarge"),
        (500, b"<html>", "the server failed"),
        (200, b"no json", "the server failed"),
        (404, b"[]", "the server failed"),
    ],
)
def test_refusals_are_one_line(client, server, status, body, kind, monkeypatch):
    monkeypatch.setattr(client_module, "BUSY_WAITS", (0.01, 0.01))
    server.answers = [(status, body)]
    with pytest.raises(ServerError, match=kind) as caught:
        client.caption(b"x")
    assert caught.value.code == status
    assert "\n" not in str(caught.value)


def test_a_full_queue_is_asked_again(client, server, monkeypatch):
    monkeypatch.setattr(client_module, "BUSY_WAITS", (0.01, 0.01, 0.01))
    full = (503, b'{"code": 503, "type": "ServiceUnavailableException"}')
    server.answers = [full, full, server.answers[0]]
    assert client.caption(b"x") == ANSWER
    assert len(server.requests) == 3


def test_a_silent_server_is_not_waited_for_for_ever(key_file):
    silent = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # accepts, never answers
    client = Client(f"http://127.0.0.1:{silent.server_address[1]}", key_file=key_file, timeout=0.3)
    with pytest.raises(UserError, match=r"none within 0.3 s"):
        client.caption(b"x")
    silent.server_close()


def test_no_server(key_file):
    with pytest.raises(UserError, match="make serve"):
        Client("http://127.0.0.1:9", key_file=key_file).caption(b"x")
    with pytest.raises(UserError, match="make serve"):
        Client(grpc_target="127.0.0.1:9", key_file=key_file).caption_grpc(b"x")


# --- keys


def test_a_rotated_key_is_read_again(client, server, key_file):
    assert client.caption(b"x") == ANSWER
    server.key = "rotated"
    write_key(key_file, "rotated")
    assert client.caption(b"x") == ANSWER


def test_an_expired_key_is_renewed_once_for_all_threads(server, key_file, monkeypatch):
    """Keys expire after an hour and TorchServe renews them only when asked; each renewal ends the
    key before it, so that threads renewing at once would lock each other out."""

    def rotate() -> None:
        server.key = "renewed"
        write_key(key_file, "renewed")

    server.rotate = rotate
    server.key = "expired a minute ago"
    here = Server(1, server.url, server.url, "127.0.0.1:9", "")
    monkeypatch.setattr(client_module, "find_server", lambda: (key_file.parent, here))
    client = Client()
    with futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(client.caption, [b"x"] * 8)) == [ANSWER] * 8
    rotations = [body for path, body in server.requests if path == "/token?type=inference"]
    assert rotations == [b"Bearer right"]


def test_a_key_that_stays_wrong_is_an_error(client, server, key_file):
    write_key(key_file, "wrong")
    with pytest.raises(ServerError, match="InvalidKeyException"):
        client.caption(b"x")


@pytest.mark.parametrize(
    "content",
    [None, "no json", "{}", "[]", '{"inference": {"key": "\N{CJK UNIFIED IDEOGRAPH-4E2D}"}}'],
)
def test_a_missing_or_damaged_key_file_is_named(server, tmp_path, content):
    path = tmp_path / "key_file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="key_file.json"):
        Client(server.url, key_file=path).caption(b"x")


def test_a_key_that_expires_while_the_queue_is_full_is_renewed(
    client, server, key_file, monkeypatch
):
    """It ended a whole folder of photos."""
    server.answers = [(503, b"{}"), *server.answers]

    def later(_: float) -> None:
        server.key = "rotated"

    def renewed(*_: object) -> str:
        write_key(key_file, "rotated")
        return "rotated"

    monkeypatch.setattr(client_module.time, "sleep", later)
    monkeypatch.setattr(Client, "_renewed", renewed)
    assert client.caption(b"x") == ANSWER


def test_a_server_may_need_no_key(server, tmp_path, monkeypatch):
    """As deploy/config.properties has it: there is no key file then."""
    monkeypatch.setattr(client_module, "find_server", lambda: (tmp_path, None))
    with pytest.raises(UserError, match="key_file.json: missing"):
        Client(server.url).caption(b"x")
    server.key = "none"
    assert Client(server.url).caption(b"x") == ANSWER


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "1e9", "soon"])
def test_a_wait_that_is_no_time_is_refused(given, monkeypatch, capsys):
    parser = ArgumentParser(prog="x")
    client_module.add_server_options(parser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--timeout", given])
    assert ended.value.code == 2 and "--timeout" in capsys.readouterr().err


def test_a_key_file_caught_while_it_is_written_is_read_again(client, key_file, monkeypatch):
    key_file.write_text("")
    monkeypatch.setattr(client_module.time, "sleep", lambda seconds: write_key(key_file, "right"))
    assert client.caption(b"x") == ANSWER


def test_the_key_file_of_this_folder_is_found(server, key_file, monkeypatch):
    monkeypatch.chdir(key_file.parent)
    assert Client(server.url).caption(b"x") == ANSWER


# --- gRPC


class GrpcServer:
    """Predictions alone: the same for everyone, or a failure."""

    def __init__(self) -> None:
        messages, stubs = load()
        fake = self
        self.answer, self.failure, self.seen = json.dumps(ANSWER).encode(), None, []

        class Service(stubs.InferenceAPIsServiceServicer):
            def Predictions(self, request, context):
                fake.seen.append((request, dict(context.invocation_metadata())))
                if fake.failure:
                    context.abort(*fake.failure)
                return messages.PredictionResponse(prediction=fake.answer)

        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        stubs.add_InferenceAPIsServiceServicer_to_server(Service(), self.server)
        self.target = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()


@pytest.fixture
def grpc_server():
    fake = GrpcServer()
    yield fake
    fake.server.stop(None)


def test_grpc_on_this_machine_takes_no_proxy(grpc_server, key_file, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    client = Client(grpc_target=grpc_server.target, key_file=key_file)
    assert client.caption_grpc(b"PHOTO")["caption"] == ANSWER["caption"]


def test_grpc_carries_photo_options_and_key(grpc_server, key_file):
    client = Client(grpc_target=grpc_server.target, key_file=key_file)
    assert client.caption_grpc(b"PHOTO", num_beams=3, do_sample=True) == ANSWER
    request, metadata = grpc_server.seen[0]
    assert request.model_name == "captioner"
    assert dict(request.input) == {"image": b"PHOTO", "num_beams": b"3", "do_sample": b"true"}
    assert metadata["authorization"] == "Bearer right"


def test_grpc_errors_are_those_of_rest(grpc_server, key_file, monkeypatch):
    monkeypatch.setattr(client_module, "BUSY_WAITS", (0.01,))
    client = Client(grpc_target=grpc_server.target, key_file=key_file)
    grpc_server.answer = b'{"code": 415, "type": "UnsupportedMediaType", "message": "no"}'
    with pytest.raises(ServerError, match=r"UnsupportedMediaType \(415\): no"):
        client.caption_grpc(b"x")
    for status, kind in (
        (grpc.StatusCode.PERMISSION_DENIED, "InvalidKeyException"),
        (grpc.StatusCode.INTERNAL, "INTERNAL"),
        (grpc.StatusCode.CANCELLED, "CANCELLED"),
    ):
        grpc_server.failure = (status, "two\nlines")
        with pytest.raises(ServerError, match=kind) as caught:
            client.caption_grpc(b"x")
        assert "\n" not in str(caught.value)


# --- the command line


@pytest.fixture
def folder(tmp_path):
    return write_mixed_folder(tmp_path / "photos")


@pytest.fixture
def run(key_file, monkeypatch, capsys):
    """The command in the key file's folder: (status, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(key_file.parent)
        monkeypatch.setattr("sys.argv", ["client", *arguments])
        status = 0
        try:
            run_command(main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_the_command_prints_the_caption(server, key_file):
    """As a program of its own."""
    photo = key_file.parent / "photo.jpg"
    photo.write_bytes(b"PHOTO")
    options = ("--num-beams", "3", "--do-sample", "--early-stopping", "never")
    done = run_program(
        "handler.client", "--image", str(photo), "--url", server.url, *options, cwd=key_file.parent
    )
    assert (done.returncode, done.stdout) == (0, "a größe 猫\n")
    body = server.requests[0][1]
    for part in (b'name="num_beams"\r\n\r\n3', b'"do_sample"\r\n\r\ntrue', b"\r\n\r\nnever"):
        assert part in body


def test_the_picture_is_of_the_printed_caption(server, key_file, run):
    """Sampling without a seed would draw another caption than the one that is printed."""
    (key_file.parent / "photo.jpg").write_bytes(b"PHOTO")
    server.answers = [server.answers[0], (200, b"\x89PNG picture")]
    arguments = ("--image", "photo.jpg", "--url", server.url, "--do-sample")
    status, printed, _ = run(*arguments, "--attention", "out.png")
    assert (status, printed) == (0, "a größe 猫\n")
    assert (key_file.parent / "out.png").read_bytes() == b"\x89PNG picture"
    seeds = [body.split(b'name="seed"')[1].split()[0] for _, body in server.requests]
    assert [path for path, _ in server.requests][1] == "/explanations/captioner"
    assert len(set(seeds)) == 1


def test_the_whole_answer(server, key_file, run):
    (key_file.parent / "photo.jpg").write_bytes(b"PHOTO")
    _, printed, _ = run("--image", "photo.jpg", "--url", server.url, "--json")
    assert json.loads(printed) == ANSWER


def test_a_folder_with_refused_photos_is_status_2(server, key_file, folder, run):
    refusal = (400, b'{"code": 400, "type": "InvalidImage", "message": "cut off"}')
    server.answers = [refusal, server.answers[0]]
    arguments = ("--images", "photos", "--out", "captions.jsonl", "--url", server.url)
    status, printed, said = run(*arguments)
    assert (status, printed) == (2, "captions.jsonl: 2 captioned, 0 unchanged\n")
    assert said.splitlines()[-1].startswith("error: photos: 1 photos without a caption")
    status, printed, _ = run(*arguments)
    assert (status, printed) == (0, "captions.jsonl: 1 captioned, 2 unchanged\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--image"),
        (["--image", "missing.jpg"], "missing.jpg"),
        (["--images", "missing"], "missing"),
        (["--images", "."], "no photo there"),
        (["--image", "key_file.json", "--url", "http://127.0.0.1:9"], "no answer"),
        (["--image", "key_file.json", "--url", "http://a..b:1"], "no answer"),
        (["--image", "key_file.json", "--beams", "3"], "--beams"),
        (["--image", "key_file.json", "--alt-text"], "--images"),
        (["--image", "key_file.json", "--url", "nonsense"], "nonsense"),
        (["--image", "key_file.json", "--timeout", "x"], "--timeout"),
        (["--image", "key_file.json", "--key-file", "none.json"], "none.json"),
        (["--image", "key_file.json", "--url", "https://127.0.0.1:9", "--certificate", "no.pem"],
         "no.pem"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(run, arguments, says):
    status, printed, said = run(*arguments)
    assert (status, printed, said.count("\n")) == (2, "", 1)
    assert says in said


def test_every_decoding_option_is_an_option_of_the_command(run):
    _, usage, _ = run("--help")
    for name in DecodeOptions.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in usage


def test_a_folder_that_another_run_captions_is_refused(server, key_file, run):
    """Two at once wrote rows twice."""
    photos = key_file.parent / "two"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"\xff\xd8\xffPHOTO")
    with locked(key_file.parent / "two.jsonl"):
        status, _, error = run("--images", "two", "--out", "two.jsonl")
    assert status == 2 and "two.jsonl: another process is writing it" in error
    assert not (key_file.parent / "two.jsonl").exists()


def test_a_picture_of_word_maps_replaces_nothing_else(server, key_file, run):
    """The photo itself, named twice by mistake, was replaced by the picture."""
    photo = key_file.parent / "photo.jpg"
    photo.write_bytes(b"PHOTO")
    (key_file.parent / "other.png").write_bytes(b"\x89PNG of the user")
    for path in ("photo.jpg", "other.png"):
        before = (key_file.parent / path).read_bytes()
        status, printed, said = run(
            "--image", "photo.jpg", "--url", server.url, "--attention", path
        )  # fmt: skip
        assert (status, printed) == (2, "") and f"{path}: this file is not a picture of" in said
        assert (key_file.parent / path).read_bytes() == before
    assert server.requests == []
    answer, picture = server.answers[0], png_bytes(Image.new("RGB", (8, 8)))
    for _ in range(2):
        server.answers = [answer, (200, picture)]
        status, _, _ = run("--image", "photo.jpg", "--url", server.url, "--attention", "maps.png")
        assert status == 0 and (key_file.parent / "maps.png").read_bytes() == picture


@pytest.mark.parametrize("option", ["--out", "--attention"])
def test_an_output_that_is_a_folder_is_refused_first(option, server, key_file, run):
    (key_file.parent / "taken").mkdir(exist_ok=True)
    photos = key_file.parent / "some"
    photos.mkdir(exist_ok=True)
    (photos / "a.jpg").write_bytes(b"\xff\xd8\xffPHOTO")
    what = ["--images", "some"] if option == "--out" else ["--image", "some/a.jpg"]
    status, out, error = run(*what, option, "taken")
    assert (status, out) == (2, "") and "taken: this is a folder" in error
