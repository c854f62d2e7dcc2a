"""`python -m handler.serve`, behind `make serve` and `make stop`: starts TorchServe and returns
when a worker is ready to answer, which TorchServe's own start does not wait for."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import requests

from handler.errors import ArgumentParser, UserError, run_command

REPOSITORY = Path(__file__).parent.parent
READY_SECONDS = 180
LOG = Path("logs/torchserve.log")


def read_properties(path: Path) -> dict[str, str]:
    """The settings of a TorchServe configuration file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a configuration with TS_CONFIG") from error
    pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
    return {name.strip(): value.strip() for name, value in pairs}


def start(ts_config: Path, tls: bool) -> None:
    """Starts the server in the current folder. Raises UserError with the reason when no worker gets
    ready; nothing is left running then."""
    properties = read_properties(ts_config)
    store = Path(properties.get("model_store", "model_store"))
    if not list(store.glob("*.mar")):
        raise UserError(f"{store}: no .mar there; run make mar first")
    if tls:
        ts_config, properties = _with_tls(ts_config, properties)
    management = properties.get("management_address", "http://127.0.0.1:8081")
    if _answers(management):
        raise UserError(f"{management}: something answers there already; run make stop first")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TS_CONFIG_FILE")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    LOG.parent.mkdir(parents=True, exist_ok=True)
    Path("key_file.json").unlink(missing_ok=True)
    with LOG.open("wb") as log:
        subprocess.run(
            [_torchserve(), "--start", "--ncs", "--ts-config", str(ts_config)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    try:
        _wait(management, tls)
    except UserError:
        stop()
        raise
    print(f"ready: {properties.get('inference_address')} (log: {LOG}; stop: make stop)")


def stop() -> None:
    """Stops the server, if there is one."""
    subprocess.run([_torchserve(), "--stop"], stdout=subprocess.DEVNULL, check=False)


def _torchserve() -> str:
    return str(Path(sys.executable).with_name("torchserve"))


def _answers(address: str) -> bool:
    try:
        requests.get(f"{address}/ping", timeout=2, verify=False)
    except requests.RequestException:
        return False
    return True


def _wait(management: str, tls: bool) -> None:
    verify: str | bool = str(REPOSITORY / "build/tls/certificate.pem") if tls else True
    deadline = time.monotonic() + READY_SECONDS
    seen = "the server did not answer"
    while time.monotonic() < deadline:
        time.sleep(0.5)
        log = LOG.read_text(errors="replace")
        for mark in ("Address already in use", "ModelNotFoundException", "Backend worker error"):
            if mark in log and "Backend worker error" not in mark:
                raise UserError(f"{LOG}: {mark}: {_reason(log)}")
        try:
            key = json.loads(Path("key_file.json").read_text())["management"]["key"]
            answer = requests.get(
                f"{management}/models/captioner",
                headers={"Authorization": f"Bearer {key}"},
                timeout=5,
                verify=verify,
            )
        except (OSError, ValueError, KeyError, requests.RequestException):
            continue
        if answer.status_code != 200:
            seen = f"the model is not loaded ({answer.status_code})"
            continue
        workers = answer.json()[0]["workers"]
        if workers and all(worker["status"] == "READY" for worker in workers):
            return
        seen = "no worker is ready"
        if log.count("Traceback (most recent call last)") >= 2:
            break  # it fails over and over
    raise UserError(f"{LOG}: {seen}: {_reason(LOG.read_text(errors='replace'))}")


def _reason(log: str) -> str:
    """The line of the log that most likely says why."""
    lines = [line for line in log.splitlines() if "Error" in line or "Exception" in line]
    return lines[0][-300:] if lines else "nothing in the log says why"


def _with_tls(ts_config: Path, properties: dict[str, str]) -> tuple[Path, dict[str, str]]:
    """A copy of the configuration that serves https and gRPC over TLS, with a self-signed
    certificate for this machine's loopback names, made once."""
    folder = REPOSITORY / "build" / "tls"
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    if not certificate.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "365"]
        command += [
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ]
        command += ["-keyout", str(key), "-out", str(certificate)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"{folder}: openssl could not make a certificate ({error})") from error
        key.chmod(0o600)
    properties = dict(properties)
    for name in ("inference_address", "management_address", "metrics_address"):
        properties[name] = properties[name].replace("http://", "https://")
    properties |= {
        "enable_grpc_ssl": "true",
        "private_key_file": str(key),
        "certificate_file": str(certificate),
    }
    out = folder / "config.properties"
    out.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
    return out, properties


def main() -> None:
    parser = ArgumentParser(prog="handler.serve", description=__doc__)
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("--ts-config", type=Path, default=Path("config.properties"))
    parser.add_argument("--tls", action="store_true")
    arguments = parser.parse_args()
    if arguments.action == "stop":
        stop()
    else:
        start(arguments.ts_config, arguments.tls)


if __name__ == "__main__":
    run_command(main)
