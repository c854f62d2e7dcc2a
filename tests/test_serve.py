"""Starting and stopping TorchServe: what is checked before, and what is said when it fails."""

import json
import os
import re
import shutil
import socket
import ssl
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import REPOSITORY, run_program

from export.archive import build_archive
from handler.errors import UserError
from handler.serve import server as serve


def config_in(folder, **settings: str):
    path = folder / "config.properties"
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return path


@pytest.fixture
def home(tmp_path):
    (tmp_path / "model_store").mkdir()
    (tmp_path / "model_store/captioner.mar").write_bytes(b"no archive")
    return tmp_path


# --- before anything is started


def test_the_projects_configuration_is_secure():
    """What docs and archives promise: nothing but this machine, nothing without a key."""
    settings = serve.read_properties(REPOSITORY / "config.properties")
    for host, _ in serve.ports(settings, tls=False).values():
        assert host == "127.0.0.1"
    for name, value in {
        "disable_token_authorization": "false",
        "enable_model_api": "false",
        "install_py_dep_per_model": "false",
        "enable_envvars_config": "false",
        "max_request_size": "25165824",
        "load_models": "captioner.mar",
    }.items():
        assert settings[name] == value


def test_properties_are_read_as_torchserve_reads_them(tmp_path):
    path = tmp_path / "x.properties"
    path.write_text("# comment=1\n  # indented=1\n\na = b=c \nno pair\n")
    assert serve.read_properties(path) == {"a": "b=c"}


def test_addresses_that_one_can_connect_to():
    settings = {
        "inference_address": "http://0.0.0.0:9000",
        "management_address": "https://localhost",
        "grpc_inference_port": "9001",
    }
    ports = serve.ports(settings, tls=True)
    assert ports["inference"] == ("127.0.0.1", 9000)
    assert ports["management"] == ("localhost", 443)
    assert ports["metrics"] == ("127.0.0.1", 8082)
    assert (ports["grpc inference"], ports["grpc management"]) == (
        ("127.0.0.1", 9001),
        ("127.0.0.1", 7071),
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inference_address", "http://127.0.0.1:abc"),
        ("metrics_address", "http://127.0.0.1:99999"),
        ("grpc_inference_port", "x"),
        ("grpc_inference_port", "70700"),
    ],
)
def test_a_port_that_is_none_is_named(name, value, home):
    settings = {"model_store": "model_store", "load_models": "captioner.mar", name: value}
    with pytest.raises(UserError, match=f"config.properties: {name}.*a port of 1 to 65535"):
        serve.start(config_in(home, **settings), home=home)


def test_the_server_is_not_asked_through_a_proxy(tmp_path, monkeypatch):
    """It was not ready then, and was ended after three minutes."""

    class Management(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'[{"minWorkers": 1, "workers": [{"status": "READY"}]}]'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Management) as management:
        threading.Thread(target=management.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{management.server_address[1]}"
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        server = serve.Server(
            pid=0, inference="", management=address, grpc="", temporary="", metrics=""
        )
        assert serve.is_ready(server, "captioner", tmp_path)
        management.shutdown()


def test_a_server_without_keys_is_asked_without_one(tmp_path):
    """With disable_token_authorization there is no key file, and the start was given up."""
    assert serve.authorization(tmp_path / "absent.json") == {}
    (tmp_path / "key_file.json").write_text('{"management": {"key": "abc"}}')
    assert serve.authorization(tmp_path / "key_file.json") == {"Authorization": "Bearer abc"}


@pytest.mark.parametrize(
    ("settings", "models"),
    [
        ({"load_models": "captioner.mar"}, ["captioner"]),
        ({"load_models": "all"}, ["captioner"]),
        ({"load_models": "mine=captioner.mar"}, ["mine"]),
    ],
)
def test_models_to_wait_for(home, settings, models):
    settings["model_store"] = "model_store"
    assert serve.initial_models(settings, home / "config.properties", home) == models


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "model_store"),
        ({"model_store": "nowhere"}, "model_store"),
        ({"model_store": "model_store"}, "load_models"),
        ({"model_store": "model_store", "load_models": "other.mar"}, r"other.mar: missing.*mar"),
    ],
)
def test_a_configuration_without_a_model(home, settings, says):
    with pytest.raises(UserError, match=says):
        serve.start(config_in(home, **settings), home=home)
    assert not (home / "build").exists()


def test_a_folder_in_which_java_cannot_start_is_named(home):
    """It was "Error: A JNI error has occurred, please check your installation"."""
    settings = {"model_store": "model_store", "load_models": "captioner.mar"}
    dog = home / "🐕"
    shutil.copytree(home, dog)
    config_in(dog, **settings)
    with pytest.raises(UserError, match="🐕: Java cannot start in a folder with '🐕' in its path"):
        serve.start(dog / "config.properties", home=dog)
    assert not (dog / "build").exists()


def test_a_port_in_use_is_named(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = {"model_store": "model_store", "load_models": "captioner.mar"}
        settings["grpc_inference_port"] = str(port)
        settings |= {f"{name}_address": "http://127.0.0.1:0" for name in serve.ADDRESSES}
        settings["grpc_management_port"] = "0"
        with pytest.raises(UserError, match=f"grpc inference port {port} is in use"):
            serve.start(config_in(home, **settings), home=home)


def test_an_address_of_another_machine_is_not_called_in_use(home):
    settings = {"model_store": "model_store", "load_models": "captioner.mar"}
    settings["inference_address"] = "http://192.0.2.7:18080"
    said = "inference port 18080 cannot be opened on 192.0.2.7"
    with pytest.raises(UserError, match=said):
        serve.start(config_in(home, **settings), home=home)


def test_mistakes_are_one_line_and_status_2(tmp_path):
    done = run_program("handler.serve", "start", "--ts-config", "none.properties", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "none.properties" in done.stderr


def test_the_environment_of_the_server(monkeypatch):
    """PYTHONPATH would serve the repository's code instead of the archive's; TS_CONFIG_FILE wins
    over the configuration that was asked for."""
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("TS_CONFIG_FILE", "/else")
    environment = serve.environment("/temporary")
    assert not {"PYTHONPATH", "TS_CONFIG_FILE"} & set(environment)
    assert environment["TMPDIR"] == environment["TEMP"] == "/temporary"


# --- the state


def test_nothing_runs_here(home):
    assert serve.running(home) is None
    assert serve.stop(home) is False


@pytest.mark.parametrize("content", ["", "{}", '{"pid": 1}', "[]"])
def test_a_damaged_state_is_no_server(home, content):
    (home / serve.STATE).parent.mkdir(parents=True)
    (home / serve.STATE).write_text(content)
    assert serve.running(home) is None


def test_another_process_of_the_same_number_is_left_alone(home):
    """After a restart of the machine the number may be anybody's."""
    (home / serve.STATE).parent.mkdir(parents=True)
    state = {"pid": os.getpid(), "inference": "", "management": "", "grpc": "", "temporary": "x"}
    (home / serve.STATE).write_text(json.dumps(state))
    assert serve.stop(home) is False
    assert not (home / serve.STATE).exists()


# --- TLS


def test_the_certificate_is_made_once_and_fits_its_key(tmp_path):
    certificate, key = serve.make_certificate(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    before = certificate.read_bytes()
    assert serve.make_certificate(tmp_path / "tls") == (certificate, key)
    assert certificate.read_bytes() == before
    key.unlink()
    serve.make_certificate(tmp_path / "tls")
    context.load_cert_chain(certificate, key)
    certificate.write_text("damaged")
    serve.make_certificate(tmp_path / "tls")
    context.load_cert_chain(certificate, key)


def test_tls_settings(tmp_path):
    settings = serve.with_tls({"inference_address": "http://127.0.0.1:9000"}, tmp_path, tmp_path)
    assert settings["inference_address"] == "https://127.0.0.1:9000"
    assert settings["metrics_address"] == "https://127.0.0.1:8082"
    assert settings["enable_grpc_ssl"] == "true"


# --- the reason


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "the log contains no reason"),
        (
            "x [INFO ] MODEL_LOG - Traceback (most recent call last):\n"
            "x [INFO ] MODEL_LOG -   File a, line 1, in initialize\n"
            "x [INFO ] MODEL_LOG -     raise UserError('x')\n"
            "x [INFO ] MODEL_LOG - handler.errors.UserError: decoder.pt: damaged\n"
            "x [INFO ] Retry worker: 9000 in 1 seconds.\n"
            "x [INFO ] MODEL_LOG - Traceback (most recent call last):\n"
            "x [INFO ] MODEL_LOG - ValueError: of the second try\n",
            "handler.errors.UserError: decoder.pt: damaged",
        ),
        (
            "x [INFO ] MODEL_LOG - RuntimeError: not a ZIP archive\n"
            "x [INFO ] Retry worker: 9000 in 1 seconds.\n"
            "x [INFO ] MODEL_LOG - handler.errors.UserError: decoder.pt: damaged\n"
            "x [INFO ] MODEL_LOG - RuntimeError: of the second try\n",
            "handler.errors.UserError: decoder.pt: damaged",
        ),
        (
            "Exception in thread main\nCaused by: java.io.IOException: Address already in use\n",
            "java.io.IOException: Address already in use",
        ),
        ("java not found, please make sure JAVA_HOME is set properly.\n", "java not found"),
    ],
)
def test_the_line_that_says_why(log, reason):
    assert serve.reason(log).startswith(reason)


@pytest.mark.live
def test_a_model_that_cannot_be_loaded_is_told_and_nothing_is_left(tiny_export, tmp_path):
    """TorchServe itself says Healthy and tries again for ever."""
    from test_live_server import configure

    store = tmp_path / "model_store"
    build_archive(tiny_export, store / "sound.mar", "1.0")
    with (
        zipfile.ZipFile(store / "sound.mar") as sound,
        zipfile.ZipFile(store / "captioner.mar", "w") as broken,
    ):
        for name in sound.namelist():
            content = b"damaged" if name == "decoder.pt" else sound.read(name)
            broken.writestr(name, content)
    (store / "sound.mar").unlink()
    config = configure(tmp_path)
    with pytest.raises(UserError, match=r"the model cannot be loaded: .*decoder.pt: damaged"):
        serve.start(config, home=tmp_path)
    assert serve.running(tmp_path) is None
    assert not (tmp_path / serve.STATE).exists()
    (store / "captioner.mar").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"the (archive|model) cannot be loaded|did not start"):
        serve.start(config, home=tmp_path)
    assert serve.running(tmp_path) is None


@pytest.mark.parametrize("path", ["/plain/key.pem", "/büro/犬/key.pem", "/🐕/é.pem"])
def test_paths_in_a_properties_file_are_read_by_java(path):
    """TLS=1 under a path with other letters than ASCII: Java looked for another file."""
    written = serve.escaped(path)
    assert written.isascii()
    read = re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), written)
    assert read.encode("utf-16", "surrogatepass").decode("utf-16") == path


@pytest.mark.parametrize(
    ("given", "served"), [("C", "C.UTF-8"), ("POSIX", "C.UTF-8"), ("fr", "fr")]
)
def test_java_finds_names_of_all_letters_in_any_locale(given, served, monkeypatch):
    """Under LC_ALL=C TorchServe did not start in a folder whose name is not ASCII."""
    monkeypatch.setenv("LC_ALL", given)
    assert serve.environment("/tmp")["LC_ALL"] == served
