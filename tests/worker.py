"""TorchServe's own worker code without its Java: loads an unpacked archive as the worker does, and
answers requests given as they come over the socket."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ts
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory


@dataclass
class Answer:
    """One request's part of a worker's response."""

    request: str
    status: int
    phrase: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def rest(fields: dict[str, Any], content_type: str = "", **headers: str) -> dict[str, Any]:
    """A REST request of these fields; a dict under "body" is sent as JSON."""
    given = {"content-type": content_type, "authorization": "Bearer secret-key", **headers}
    return {
        "headers": [
            {"name": name.encode(), "value": value.encode()} for name, value in given.items()
        ],
        "parameters": parameters(fields, content_type),
    }


def by_grpc(fields: dict[str, bytes]) -> dict[str, Any]:
    """A gRPC request: no headers at all."""
    return {"headers": [], "parameters": parameters(fields, "")}


def parameters(fields: dict[str, Any], content_type: str) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "contentType": content_type,
            "value": bytearray(json.dumps(value).encode() if isinstance(value, dict) else value),
        }
        for name, value in fields.items()
    ]


class Worker:
    """A loaded model; `sent` holds what was streamed before the answer of the last `predict`."""

    def __init__(self, folder: Path, batch: int = 8) -> None:
        manifest = json.loads((folder / "MAR-INF/MANIFEST.json").read_text())["model"]
        metrics = MetricsCacheYamlImpl(
            config_file_path=str(Path(ts.__file__).parent / "configs/metrics.yaml")
        )
        self.service = ModelLoaderFactory.get_model_loader().load(
            manifest["modelName"],
            str(folder),
            manifest["handler"],
            None,
            batch,
            None,
            True,
            metrics,
        )
        self.service.set_cl_socket(self)
        self.sent: list[Answer] = []

    def sendall(self, message: bytes) -> None:
        """The socket's part, for streams."""
        self.sent += parse_response(message)

    def predict(self, *requests: dict[str, Any]) -> list[Answer]:
        """A batch of requests, answered in order."""
        self.sent = []
        numbered = [{"requestId": f"r{i}".encode(), **r} for i, r in enumerate(requests)]
        answers = parse_response(self.service.predict(numbered))
        assert [answer.request for answer in answers] == [f"r{i}" for i in range(len(requests))]
        return answers


def parse_response(message: bytes) -> list[Answer]:
    """The worker's wire format, as the front end reads it."""
    position = 0

    def integer() -> int:
        nonlocal position
        position += 4
        return int(struct.unpack("!i", message[position - 4 : position])[0])

    def data() -> bytes:
        nonlocal position
        length = integer()
        position += length
        return bytes(message[position - length : position])

    integer()  # the status of the whole response
    data()
    answers = []
    while (length := integer()) != -1:
        request = bytes(message[position : position + length]).decode()
        position += length
        data()  # content type, again among the headers
        status = integer()
        phrase = data().decode("ascii")
        headers = {}
        for _ in range(integer()):
            name = data().decode()
            headers[name] = data().decode()
        answers.append(Answer(request, status, phrase, headers, data()))
    return answers
