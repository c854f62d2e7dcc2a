"""Starts TorchServe and returns when its workers are ready. TorchServe's own start neither waits
for them nor reports their failure.

`build/serve/server.json` records the running server (process, addresses, certificate), so that
`stop` and the client find it.
"""

import datetime
import errno
import ipaddress
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import requests

from handler.errors import UserError, naming
from handler.files import write_atomic

START_SECONDS = 180
STOP_SECONDS = 30
LOG4J = Path(__file__).with_name("log4j2.xml")
STATE = Path("build/serve/server.json")
KEY_FILE = Path("key_file.json")
# Standard output contains the errors before logging has started.
CONSOLE, LOG = Path("logs/console.log"), Path("logs/torchserve.log")
# TorchServe's defaults for settings that are not in a configuration.
ADDRESSES = {"inference": "8080", "management": "8081", "metrics": "8082"}
GRPC = {"inference": "7070", "management": "7071"}


@dataclass(frozen=True)
class Server:
    """A running TorchServe. `temporary` is its own folder for sockets and unpacked archives, so
    that several servers do not conflict."""

    pid: int
    inference: str
    management: str
    grpc: str
    temporary: str
    certificate: str | None = None
    metrics: str = ""


def running(home: Path) -> Server | None:
    """The server that was started in the folder `home`, if it is still running."""
    try:
        server = Server(**json.loads((home / STATE).read_text(encoding="utf-8")))
        command = psutil.Process(server.pid).cmdline()
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    return server if "org.pytorch.serve.ModelServer" in command else None


def start(ts_config: Path, tls: bool = False, home: Path | None = None) -> Server:
    """Starts TorchServe in `home` (default: the current folder), where it writes its key file and
    logs, and waits until all workers of all models are ready.

    Raises UserError with the reason if they fail to start; no process is left running then.
    """
    home = home or Path.cwd()
    settings = read_properties(ts_config)
    models = initial_models(settings, ts_config, home)
    if unknown := [letter for letter in str(home.resolve()) if ord(letter) > 0xFFFF]:
        # The JDK's ParseUtil treats each half of the surrogate pair as a character.
        raise UserError(
            f"{home.resolve()}: Java cannot start in a folder with {unknown[0]!r} in its path; "
            "move it elsewhere"
        )
    if running(home):
        raise UserError("a server is already running here; run make stop first")
    with naming(ts_config):
        addresses = ports(settings, tls)
    for name, (host, port) in addresses.items():
        if (obstacle := obstacle_to(host, port)) is not None:
            raise UserError(f"{ts_config}: {name} port {port} {obstacle}")
    if tls:
        settings = with_tls(settings, *make_certificate(home / "build" / "tls"))
    folder = (home / STATE).parent
    config = folder / "config.properties"
    write_atomic(config, "".join(f"{name}={escaped(value)}\n" for name, value in settings.items()))
    temporary = tempfile.mkdtemp(prefix="torchserve-")
    (home / LOG).parent.mkdir(exist_ok=True)
    (home / LOG).unlink(missing_ok=True)  # it may contain errors of an earlier run
    (home / KEY_FILE).unlink(missing_ok=True)
    with (home / CONSOLE).open("wb") as console:
        subprocess.run(
            [sys.executable, "-m", "ts.model_server", "--start", "--ncs"]
            + ["--ts-config", str(config.resolve()), "--log-config", str(LOG4J)],
            cwd=home,
            env=environment(temporary),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal must not end the server
            check=False,
        )
    pid_file = Path(temporary) / ".model_server.pid"
    pid = int(pid_file.read_text()) if pid_file.is_file() else 0
    schemes = {
        name: urlsplit(settings.get(f"{name}_address", "http://")).scheme for name in ADDRESSES
    }
    certificate = settings.get("certificate_file") if "https" in schemes.values() else None
    server = Server(
        pid=pid,
        inference="{}://{}:{}".format(schemes["inference"], *addresses["inference"]),
        management="{}://{}:{}".format(schemes["management"], *addresses["management"]),
        grpc="{}:{}".format(*addresses["grpc inference"]),
        temporary=temporary,
        certificate=str(home / certificate) if certificate else None,
        metrics="{}://{}:{}".format(schemes["metrics"], *addresses["metrics"]),
    )
    write_atomic(home / STATE, json.dumps(asdict(server), indent=2) + "\n")
    try:
        wait_until_ready(server, models, home)
    except BaseException:
        end(server)
        (home / STATE).unlink(missing_ok=True)
        raise
    return server


def stop(home: Path | None = None) -> bool:
    """Stops the server that was started in `home`; False if none is running."""
    home = home or Path.cwd()
    server = running(home)
    if server is not None:
        end(server)
        (home / KEY_FILE).unlink(missing_ok=True)
    (home / STATE).unlink(missing_ok=True)
    return server is not None


def end(server: Server) -> None:
    """Ends the server and its workers, and removes its temporary folder."""
    try:
        process = psutil.Process(server.pid)
        family = [process, *process.children(recursive=True)]
        process.terminate()  # its shutdown hook stops the workers
        _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
        for left in alive:
            left.kill()
    except psutil.NoSuchProcess:
        pass
    shutil.rmtree(server.temporary, ignore_errors=True)


def wait_until_ready(server: Server, models: list[str], home: Path) -> None:
    """Polls the management API. `/ping` is not used: it returns Healthy long before a worker is
    ready, and also while a worker fails again and again."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.3)
        failure = failed(server, read_log(home))
        if failure:
            raise UserError(f"{failure}: {reason(settled_log(home))} ({LOG}, {CONSOLE})")
        if all(is_ready(server, model, home) for model in models):
            return
    raise UserError(
        f"no worker was ready within {START_SECONDS} s: {reason(read_log(home))} ({LOG})"
    )


def settled_log(home: Path) -> str:
    """The log when it contains an exception and no longer grows, or after 5 s: a traceback is
    written line by line, beginning with its cause."""
    log = read_log(home)
    for _ in range(10):
        time.sleep(0.5)
        before, log = log, read_log(home)
        if log == before and exceptions(log):
            break
    return log


def failed(server: Server, log: str) -> str | None:
    """What has failed, if the start has failed for good."""
    if not psutil.pid_exists(server.pid) or is_zombie(server.pid):
        return "the server did not start"
    if "Failed to load model" in log:
        return "the archive cannot be loaded"
    # TorchServe retries without end, but loading fails in the same way each time.
    return "the model cannot be loaded" if "Retry worker" in log else None


def is_ready(server: Server, model: str, home: Path) -> bool:
    """Whether the model has all its workers and all of them are READY."""
    try:
        with requests.Session() as session:
            session.trust_env = False  # a local server must not be reached through HTTP_PROXY
            answer = session.get(
                f"{server.management}/models/{model}",
                headers=authorization(home / KEY_FILE),
                timeout=5,
                verify=server.certificate or True,
            )
        [state] = answer.json()
        workers = state["workers"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not yet: no key file, no answer, or an error
    return len(workers) >= max(1, state["minWorkers"]) and all(
        worker["status"] == "READY" for worker in workers
    )


def authorization(key_file: Path) -> dict[str, str]:
    """The header for the management API; none if the server has no keys
    (disable_token_authorization), or not yet."""
    if not key_file.exists():
        return {}
    key = json.loads(key_file.read_text(encoding="utf-8"))["management"]["key"]
    return {"Authorization": f"Bearer {key}"}


def is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def read_log(home: Path) -> str:
    paths = (home / CONSOLE, home / LOG)
    return "".join(p.read_text(encoding="utf-8", errors="replace") for p in paths if p.is_file())


def reason(log: str) -> str:
    """The line of a log with the reason: an exception, or the first line about an error."""
    other = [line for line in messages(log) if "rror" in line or "not found" in line]
    line = (exceptions(log)[:1] or other[:1] or ["the log contains no reason"])[0]
    return line[:300]


def exceptions(log: str) -> list[str]:
    """The first error of this project; then the exception that ended the first attempt of a worker,
    or the last one if the lines of several workers are mixed; then the causes of Java's
    exceptions."""
    # TorchServe writes its own lines between those of a traceback, whose end may be out of order.
    candidates = [line for line in messages(log) if line.startswith("handler.errors.")][:1]
    for text in (log.split("Retry worker", 1)[0], log):
        # The last of Python's chained exceptions has the message for users.
        python = r"[A-Za-z_][\w.]*(Error|Exception)(:|$)"
        candidates += [line for line in messages(text) if re.match(python, line)][-1:]
    java = [line for line in messages(log) if line.startswith("Caused by:")]
    return candidates + [line.removeprefix("Caused by: ") for line in java]


def messages(log: str) -> list[str]:
    """The messages of a log, without time, level and thread."""
    return [line.split(" - ", 1)[-1].strip() for line in log.splitlines()]


def read_properties(path: Path) -> dict[str, str]:
    """The settings of a Java properties file, as TorchServe's launcher reads them."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read; set TS_CONFIG= to a configuration") from error
    pairs = (line.split("=", 1) for line in lines if "=" in line and line.lstrip()[:1] != "#")
    return {name.strip(): value.strip() for name, value in pairs}


def initial_models(settings: dict[str, str], ts_config: Path, home: Path) -> list[str]:
    """The names of the models that are loaded at the start; their archives must exist."""
    store = home / settings.get("model_store", "")
    if "model_store" not in settings or not store.is_dir():
        raise UserError(f"{ts_config}: model_store is not a folder; set it, and run make mar")
    wanted = settings.get("load_models", "")
    if wanted.lower() == "all":
        files = {path.stem: path for path in store.glob("*.mar")}
    else:
        pairs = [item.strip().rpartition("=") for item in wanted.split(",") if item.strip()]
        files = {name or Path(file).stem: store / file for name, _, file in pairs}
    if not files:
        raise UserError(f"{ts_config}: no model to load; set load_models, and run make mar")
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path}: missing; run make mar")
    return sorted(files)


def ports(settings: dict[str, str], tls: bool) -> dict[str, tuple[str, int]]:
    """The addresses of the server by name, for connections from this machine."""
    addresses = {}
    for name, default in ADDRESSES.items():
        try:
            address = urlsplit(settings.get(f"{name}_address", f"http://127.0.0.1:{default}"))
            port = address.port or (443 if tls or address.scheme == "https" else 80)
        except ValueError as error:
            raise UserError(f"{name}_address: {error}; set a port of 1 to 65535") from error
        addresses[name] = (address.hostname or "127.0.0.1", port)
    for name, default in GRPC.items():
        host = settings.get(f"grpc_{name}_address", "127.0.0.1")
        text = str(settings.get(f"grpc_{name}_port", default))
        if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
            raise UserError(f"grpc_{name}_port is {text!r}; set a port of 1 to 65535")
        addresses[f"grpc {name}"] = (host, int(text))
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}
    return {name: (anywhere.get(host, host), port) for name, (host, port) in addresses.items()}


def obstacle_to(host: str, port: int) -> str | None:
    """Why no server can listen on a port, and what to do; None if one can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is in use; free it or set another one"
            return f"cannot be opened on {host} ({error.strerror}); set another address or port"
    return None


def environment(temporary: str) -> dict[str, str]:
    """The server's environment: temporary files in `temporary`, the Java beside this Python if
    there is no other, a locale in which Java can open file names of all characters, and none of
    the variables that would override the configuration."""
    # PYTHONPATH precedes the archive's own folder: other code than the archive's would run.
    unwanted = ("PYTHONPATH", "TS_CONFIG_FILE", "LOG_LOCATION", "METRICS_LOCATION")
    inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
    if inherited.get("LC_ALL") in ("C", "POSIX"):
        inherited["LC_ALL"] = "C.UTF-8"  # as Python itself does for LANG (PEP 538)
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")])
    return {**inherited, "PATH": path, "TMPDIR": temporary, "TEMP": temporary}


def escaped(value: str) -> str:
    """A value for a Java properties file, which Java reads as Latin-1: characters outside ASCII are
    written as UTF-16 escapes."""
    data = value.encode("utf-16-be")
    units = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
    return "".join(chr(unit) if unit < 128 else f"\\u{unit:04x}" for unit in units)


def with_tls(settings: dict[str, str], certificate: Path, key: Path) -> dict[str, str]:
    """The settings with https for all three HTTP addresses and TLS for gRPC."""
    changed = dict(settings)
    for name, default in ADDRESSES.items():
        address = settings.get(f"{name}_address", f"http://127.0.0.1:{default}")
        changed[f"{name}_address"] = address.replace("http://", "https://")
    files = {"certificate_file": str(certificate), "private_key_file": str(key)}
    return {**changed, **files, "enable_grpc_ssl": "true"}


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for the loopback names of this machine, and its key (mode 0600). It
    is created if it is missing or expires within a day."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    try:
        known = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        if key_file.is_file() and known.not_valid_after_utc > now + day:
            return certificate_file, key_file
    except (OSError, ValueError):
        pass  # none yet, or damaged
    key = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ("127.0.0.1", "::1")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + 365 * day)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    key_file.unlink(missing_ok=True)
    with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        # Java can only read PKCS #8.
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
    write_atomic(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate_file, key_file
