"""Live servers for the tests: the project's own configuration on free ports, in other folders."""

import json
import re
import socket
import zipfile
from pathlib import Path

import psutil
import requests
import yaml

from handler.client.connection import Client
from handler.serve import server as serve

REPOSITORY = Path(__file__).parent.parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def configure(folder, **changed: str):
    """The project's own configuration in another folder, on free ports."""
    rest, management, metrics, grpc_port, grpc_management = free_ports(5)
    settings = serve.read_properties(REPOSITORY / "config.properties") | {
        "inference_address": f"http://127.0.0.1:{rest}",
        "management_address": f"http://127.0.0.1:{management}",
        "metrics_address": f"http://127.0.0.1:{metrics}",
        "grpc_inference_port": str(grpc_port),
        "grpc_management_port": str(grpc_management),
        **changed,
    }
    path = folder / "config.properties"
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return path


def change_settings(archive: Path, **changed: object) -> None:
    """Writes other values into the `model-config.yaml` of an archive."""
    with zipfile.ZipFile(archive) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    name = "handler/model-config.yaml"
    files[name] = yaml.safe_dump(yaml.safe_load(files[name]) | changed).encode()
    with zipfile.ZipFile(archive, "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)


def client_of(server: serve.Server, folder) -> Client:
    return Client(
        server.inference,
        server.grpc,
        key_file=folder / "key_file.json",
        certificate=server.certificate and folder / server.certificate,
    )


def key(client) -> str:
    return json.loads(client.key_file.read_text())["inference"]["key"]


def serve_instead(server: serve.Server, folder: Path, archive: str) -> None:
    """Unregisters the captioner and registers an archive of the model store in its place; returns
    once its worker is ready. The server needs `enable_model_api=true`."""
    held = json.loads((folder / "key_file.json").read_text())["management"]["key"]
    headers, url = {"Authorization": f"Bearer {held}"}, f"{server.management}/models"
    gone = requests.delete(f"{url}/captioner", headers=headers, timeout=60)
    assert gone.status_code == 200, gone.text
    chosen = {
        "url": archive,
        "model_name": "captioner",
        "initial_workers": 1,
        "synchronous": "true",
    }
    made = requests.post(url, headers=headers, params=chosen, timeout=120)
    assert made.status_code == 200, made.text


def post(client, path="predictions/captioner", headers=None, **content):
    headers = {"Authorization": f"Bearer {key(client)}", **(headers or {})}
    return requests.post(f"{client.url}/{path}", headers=headers, timeout=60, **content)


def metrics_of(server) -> dict[str, float]:
    """The captioner's lines of /metrics, summed over the hosts: name and type -> value."""
    found: dict[str, float] = {}
    for line in requests.get(f"{server.metrics}/metrics", timeout=30).text.splitlines():
        if line.startswith("captioner_") and "le=" not in line:
            labels, value = line.rsplit(" ", 1)
            name, kind = labels.split("{")[0], re.search(r'Type="(\w+)"', labels)
            name += f" {kind[1]}" if kind else ""
            found[name] = found.get(name, 0) + float(value)
    return found


def worker_processes(server: serve.Server) -> list[psutil.Process]:
    """The Python processes behind the server."""
    return [
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if any("model_service_worker" in part for part in process.cmdline())
    ]
