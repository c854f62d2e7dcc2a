"""Requests the captions of a photo from a running TorchServe, by REST or gRPC."""

import contextlib
import json
import random
import threading
import time
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import grpc
import requests

from handler.client.stubs import load
from handler.errors import ArgumentParser, UserError
from handler.image_preprocess import MAX_BYTES
from handler.serve.server import KEY_FILE, Server, running

REPOSITORY = Path(__file__).parents[2]
# Seconds before each retry when the server's queue is full (503 without a Retry-After).
BUSY_WAITS = (0.1, 0.3, 1.0, 3.0, 10.0)
# Much longer than the server needs to write its key file of a few hundred bytes.
KEY_WRITING_SECONDS = 0.2
GRPC_ANSWER_BYTES = 24 * 2**20
NO_KEY = "none"
MAX_SECONDS = 86400  # of a request


class ServerError(UserError):
    """The server refused a request; `kind`, `code` and `message` are those of its answer."""

    def __init__(self, kind: str, code: int, message: str) -> None:
        super().__init__(f"{kind} ({code}): {message}")
        self.kind, self.code, self.message = kind, code, message


class Client:
    """A client of the TorchServe at `url` (REST) or `grpc_target`. Threads may share it.

    By default, the addresses and the certificate are those of the server that `make serve` started
    in the current folder or in the repository, or else TorchServe's defaults. `certificate` (PEM)
    verifies an https server. Each request waits at most `timeout` seconds.
    """

    def __init__(
        self,
        url: str | None = None,
        grpc_target: str | None = None,
        key_file: Path | None = None,
        certificate: Path | None = None,
        timeout: float = 60,
        model: str = "captioner",
    ) -> None:
        home, server = find_server()
        if server is None or url or grpc_target:
            server = Server(
                pid=0,
                inference=url or "http://127.0.0.1:8080",
                management="" if url else "http://127.0.0.1:8081",
                grpc=grpc_target or "127.0.0.1:7070",
                temporary="",
            )
        self.url, self.grpc_target = server.inference.rstrip("/"), server.grpc
        self.management = server.management
        if certificate is None and server.certificate:
            certificate = Path(server.certificate)
        if certificate is not None:
            read_file(certificate)  # reports a wrong path now, not as a failed handshake
        self.certificate = certificate
        self.key_file, self.is_key_file_given = key_file or home / KEY_FILE, key_file is not None
        self.timeout, self.model = timeout, model
        self._session = requests.Session()
        # A local server must not be reached through HTTP_PROXY, nor get credentials from .netrc.
        self._session.trust_env = not is_local(self.url)
        self._channel: grpc.Channel | None = None
        self._lock = threading.Lock()

    def caption(self, photo: bytes, **options: Any) -> dict[str, Any]:
        """The JSON answer of a REST request. Raises ServerError if the server refuses the request,
        UserError if no server answers."""
        return _answer(*self._post("predictions", photo, options))

    def picture(self, photo: bytes, **options: Any) -> bytes:
        """The attention maps of the best caption as a PNG: the photo with a heat map per word."""
        status, content = self._post("explanations", photo, options, {"Accept": "image/png"})
        if status != 200:
            _answer(status, content)
        return content

    def model_card(self) -> dict[str, Any]:
        """The model card from the management API; empty if that is not available (the client was
        given another address)."""

        def ask(key: str) -> requests.Response:
            return self._session.get(
                f"{self.management}/models/{self.model}",
                params={"customized": "true"},
                headers={"Authorization": f"Bearer {key}"},
                timeout=self.timeout,
                verify=str(self.certificate) if self.certificate else True,
            )

        try:
            key = self._key("management")
            answer = ask(key)
            if answer.status_code != 200:
                answer = ask(self._renewed(key, "management"))
            return dict(json.loads(answer.json()[0]["customizedMetadata"]))
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def caption_grpc(self, photo: bytes, **options: Any) -> dict[str, Any]:
        """The JSON answer of a gRPC request. Raises the same errors as `caption`."""
        if len(photo) > MAX_BYTES:  # TorchServe would end the call without giving the reason
            raise ServerError(
                "ImageTooLarge", 413, f"the image has more than {MAX_BYTES >> 20} MiB"
            )
        messages, stubs = load()
        form = {name: text.encode() for name, text in as_text(options).items()}
        request = messages.PredictionsRequest(model_name=self.model, input={"image": photo, **form})
        with self._lock:
            self._channel = self._channel or self._connect()
        predictions = stubs.InferenceAPIsServiceStub(self._channel).Predictions

        def ask(key: str) -> tuple[int, bytes]:
            try:
                answer = predictions(
                    request, metadata=[("authorization", f"Bearer {key}")], timeout=self.timeout
                )
            except grpc.RpcError as error:
                return self._grpc_failure(error)
            # The gRPC status of a handler's answer is always OK: its own status is in the body.
            return _code(answer.prediction), answer.prediction

        return _answer(*self._with_retries(ask))

    def _connect(self) -> grpc.Channel:
        options = [
            ("grpc.max_receive_message_length", GRPC_ANSWER_BYTES),
            ("grpc.enable_http_proxy", int(not is_local(self.grpc_target))),
        ]
        if self.certificate is None:
            return grpc.insecure_channel(self.grpc_target, options=options)
        credentials = grpc.ssl_channel_credentials(read_file(self.certificate))
        return grpc.secure_channel(self.grpc_target, credentials, options=options)

    def _grpc_failure(self, error: grpc.RpcError) -> tuple[int, bytes]:
        """The status and body that REST would answer for a failed gRPC call."""
        status, details = error.code(), " ".join(str(error.details()).split())[:300]
        if status == grpc.StatusCode.UNAVAILABLE:
            raise self._no_answer(self.grpc_target, details) from error
        if status == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise self._no_answer(self.grpc_target, f"none within {self.timeout:g} s") from error
        refused = status == grpc.StatusCode.PERMISSION_DENIED
        body = {
            "code": 400 if refused else 503 if status == grpc.StatusCode.INTERNAL else 500,
            "type": "InvalidKeyException" if refused else f"gRPC {status.name}",
            "message": details,
        }
        return int(str(body["code"])), json.dumps(body).encode()

    def _post(
        self,
        verb: str,
        photo: bytes,
        options: dict[str, Any],
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:
        def ask(key: str) -> tuple[int, bytes]:
            try:
                answer = self._session.post(
                    f"{self.url}/{verb}/{self.model}",
                    files={"image": ("photo", photo, "application/octet-stream")},
                    data=as_text(options),
                    headers={"Authorization": f"Bearer {key}", **(headers or {})},
                    timeout=self.timeout,
                    verify=str(self.certificate) if self.certificate else True,
                )
            except requests.Timeout as error:
                raise self._no_answer(self.url, f"none within {self.timeout:g} s") from error
            # requests' own errors, those of a damaged certificate, and urllib3's of a host's name.
            except (OSError, ValueError) as error:
                raise self._no_answer(self.url, type(error).__name__) from error
            return answer.status_code, answer.content

        return self._with_retries(ask)

    def _with_retries(self, ask: Any) -> tuple[int, bytes]:
        """Sends a request with the key in the key file. Repeats it with a new key if that one was
        rotated or has expired, and while the server's queue is full."""

        def ask_once() -> tuple[int, bytes]:
            key = self._key()
            status, content = ask(key)
            if _kind(status, content) == "InvalidKeyException":
                if key == NO_KEY:
                    raise self._no_key_file()
                status, content = ask(self._renewed(key))
            return status, content

        status, content = ask_once()
        for wait in BUSY_WAITS:
            if status != 503:
                break
            time.sleep(wait * random.uniform(0.5, 1.5))
            status, content = ask_once()
        return status, content

    def _key(self, owner: str = "inference") -> str:
        """A key of the server. The file is read for each request, because keys are rotated. NO_KEY
        if there is no file and none was asked for: a server may be configured to need no key."""
        if not self.key_file.exists():
            if self.is_key_file_given:
                raise self._no_key_file()
            return NO_KEY
        try:
            return self._read_key(owner)
        except (OSError, ValueError, KeyError, TypeError):
            # TorchServe writes the file in place, so that it may be empty for a moment.
            time.sleep(KEY_WRITING_SECONDS)
        try:
            return self._read_key(owner)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.key_file}: contains no key; restart the server") from error

    def _read_key(self, owner: str) -> str:
        key = str(json.loads(self.key_file.read_text(encoding="utf-8"))[owner]["key"])
        key.encode("ascii")  # what a header can contain; the error is a ValueError
        return key

    def _renewed(self, refused: str, owner: str = "inference") -> str:
        """A key to use instead of `refused`: the one in the file if it has changed, else a new one,
        requested with the API key. (Keys expire after an hour, and nothing else renews them.)"""
        with self._lock:  # each new key invalidates the previous one
            if self._key(owner) == refused and self.management:
                with contextlib.suppress(requests.RequestException):
                    self._session.get(
                        f"{self.management}/token",
                        params={"type": owner},
                        headers={"Authorization": f"Bearer {self._key('API')}"},
                        timeout=self.timeout,
                        verify=str(self.certificate) if self.certificate else True,
                    )
            return self._key(owner)

    def _no_key_file(self) -> UserError:
        return UserError(
            f"{self.key_file}: missing; TorchServe writes it into the folder where it is started: "
            "run make serve, or set --key-file"
        )

    def _no_answer(self, address: str, reason: str) -> UserError:
        return UserError(f"{address}: no answer ({reason}); is the server running? (make serve)")


def is_local(address: str) -> bool:
    return "127.0.0.1" in address or "localhost" in address


def find_server() -> tuple[Path, Server | None]:
    """The folder of the server to use (the current folder is preferred to the repository), and the
    server itself if `make serve` started it."""
    homes = [Path.cwd(), REPOSITORY]
    for home in homes:
        server = running(home)
        if server is not None:
            return home, server
    return next((home for home in homes if (home / KEY_FILE).is_file()), homes[0]), None


def as_text(options: dict[str, Any]) -> dict[str, str]:
    """Options as form fields; options that are None are left out."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in options.items()
        if value is not None
    }


def _answer(status: int, content: bytes) -> dict[str, Any]:
    """The body of a successful answer. Raises ServerError for any other."""
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {}
    if status == 200 and "caption" in body:
        return body
    if status == 413 and not body:
        body = {"type": "ImageTooLarge", "message": "the request is above the server's limit"}
    message = " ".join(str(body.get("message", "no reason given")).split())
    if status == 404:
        message += "; load it with make mar serve, or give the address of another server"
    raise ServerError(str(body.get("type", "the server failed")), status, message)


def _kind(status: int, content: bytes) -> str | None:
    with contextlib.suppress(ValueError, AttributeError):
        return None if status == 200 else str(json.loads(content).get("type"))
    return None


def _code(content: bytes) -> int:
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        return int(json.loads(content).get("code", 200))
    return 500


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a file") from error


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= MAX_SECONDS:
        raise ArgumentTypeError(f"must be above 0 and at most {MAX_SECONDS}, but is {text}")
    return value


def add_server_options(parser: ArgumentParser) -> None:
    """Adds the addresses of the server and the files for authentication."""
    parser.add_argument("--url", help="REST address (default: the server of make serve)")
    parser.add_argument("--grpc-target", metavar="HOST:PORT", help="gRPC address (same default)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="TorchServe's key_file.json")
    parser.add_argument(
        "--certificate", type=Path, metavar="PEM", help="certificate that verifies an https server"
    )
    parser.add_argument("--timeout", type=seconds, default=60, metavar="SECONDS", help="default 60")


def client_of(arguments: Any) -> Client:
    """The client that these options describe."""
    return Client(
        url=arguments.url,
        grpc_target=arguments.grpc_target,
        key_file=arguments.key_file,
        certificate=arguments.certificate,
        timeout=arguments.timeout,
    )
