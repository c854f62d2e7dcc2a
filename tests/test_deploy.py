"""deploy/: manifests against the schemas of Kubernetes, the Dockerfile against hadolint, all of
them against each other; and TorchServe as the image starts it."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import psutil
import pytest
import requests
import yaml
from conftest import REPOSITORY
from live import configure

from export.archive import build_archive
from handler.serve.server import environment, read_properties

DEPLOY = REPOSITORY / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
# The oldest and the newest Kubernetes that they are checked for.
VERSIONS = ("1.29", "1.35")
READY = ["python", "/srv/ready.py"]


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def pods() -> list[dict[str, Any]]:
    """The pod that each way of deployment makes."""
    deployment = read("kubernetes/deployment.yaml")["spec"]["template"]["spec"]
    predictor = dict(read("inference-service.yaml")["spec"]["predictor"])
    for name in ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout"):
        predictor.pop(name)  # KServe's own: see ComponentExtensionSpec in its v1beta1 API
    return [deployment, predictor]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_keep_to_the_schemas(path, version):
    kubernetes_validate.validate(yaml.safe_load(path.read_text()), version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_inference_service_is_a_pod_and_what_kserve_adds(version):
    service = read("inference-service.yaml")
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert set(service) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(service["spec"]) == {"predictor"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pods()[1]}
    kubernetes_validate.validate(pod, version, strict=True)
    assert service["spec"]["predictor"]["scaleMetric"] in ("concurrency", "rps", "cpu", "memory")
    assert service["spec"]["predictor"]["containers"][0]["name"] == "kserve-container"


def test_the_schemas_do_refuse():
    manifest = read("kubernetes/deployment.yaml")
    manifest["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[0], strict=True)


def test_the_dockerfile_passes_hadolint():
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=places)
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_copies_and_installs_what_there_is():
    text = (DEPLOY / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (REPOSITORY / source).exists() or source == "model_store/captioner.mar"
    pinned = (REPOSITORY / "requirements.txt").read_text()
    for names in re.findall(r"grep -E '\^\(([^)]*)\)=='", text):
        for name in names.split("|"):
            assert re.search(rf"^{name}==", pinned, re.MULTILINE), name


def test_labels_ports_and_names_agree():
    deployment, service = read("kubernetes/deployment.yaml"), read("kubernetes/service.yaml")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        read("kubernetes/network-policy.yaml")["spec"]["podSelector"]["matchLabels"],
        read("kubernetes/disruption-budget.yaml")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    ports = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
    settings = read_properties(DEPLOY / "config.properties")
    assert settings["inference_address"].endswith(f":{ports['http']}")
    assert settings["metrics_address"].endswith(f":{ports['metrics']}")
    assert settings["grpc_inference_port"] == str(ports["grpc"])
    assert {p["targetPort"] for p in service["spec"]["ports"]} == {"http", "grpc"}
    policy = read("kubernetes/network-policy.yaml")["spec"]
    assert [[p["port"] for p in rule["ports"]] for rule in policy["ingress"]] == [
        ["http", "grpc"],
        ["metrics"],
    ]
    assert all(rule["from"] for rule in policy["ingress"])
    assert policy["egress"] == []
    scaler = read("kubernetes/autoscaler.yaml")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    [rule] = read("prometheus-adapter-values.yaml")["rules"]["custom"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]


@pytest.mark.parametrize("pod", pods(), ids=["Deployment", "InferenceService"])
def test_pods_are_locked_and_probed(pod):
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]
    probes = {name: probe for name, probe in container.items() if name.endswith("Probe")}
    assert "readinessProbe" in probes
    assert all(probe["exec"]["command"] == READY for probe in probes.values())
    assert f"USER {pod['securityContext']['runAsUser']}" in (DEPLOY / "Dockerfile").read_text()


def test_the_configuration_differs_where_it_says_so():
    """Everything else is as safe as on a machine of one's own."""
    ours = read_properties(REPOSITORY / "config.properties")
    deployed = read_properties(DEPLOY / "config.properties")
    changed = {name for name in ours | deployed if ours.get(name) != deployed.get(name)}
    assert changed == {
        "inference_address",
        "metrics_address",
        "grpc_inference_address",
        "disable_token_authorization",
        "model_store",
        "vmargs",
    }
    assert deployed["management_address"].startswith("http://127.0.0.1:")
    assert deployed["grpc_management_address"] == "127.0.0.1"


# --- the probe


def ready(address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEPLOY / "ready.py", address], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, [{"minWorkers": 1, "workers": [{"status": "READY"}]}], 0),
        (200, [{"minWorkers": 2, "workers": [{"status": "READY"}]}], 1),
        (200, [{"minWorkers": 1, "workers": [{"status": "READY"}, {"status": "UNLOADING"}]}], 1),
        (200, [{"minWorkers": 1, "workers": []}], 1),
        (200, [{"minWorkers": 0, "workers": []}], 1),
        (200, {"code": 1}, 1),
        (404, {"code": 404, "type": "ModelNotFoundException"}, 1),
    ],
)
def test_ready_is_what_has_all_its_workers(status, body, expected):
    class Management(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/models/captioner"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Management) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = ready(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == expected
    assert len(done.stderr.splitlines()) == expected


@pytest.mark.live
def test_the_image_starts_torchserve_so(tiny_export, tiny_data, tmp_path):
    """The Dockerfile's own command and configuration, but for the ports and the folder: not ready
    at first, then ready, and asked without a key."""
    (tmp_path / "run").mkdir()
    build_archive(tiny_export, tmp_path / "model_store/captioner.mar", "1.0")
    settings = read_properties(DEPLOY / "config.properties")
    free = {  # on loopback: this is no container
        name: value
        for name, value in read_properties(configure(tmp_path)).items()
        if "address" in name or "port" in name
    }
    config = tmp_path / "config.properties"
    settings |= {**free, "model_store": str(tmp_path / "model_store")}
    config.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    text = (DEPLOY / "Dockerfile").read_text()
    command = json.loads(re.search(r"ENTRYPOINT (\[.*\])", text, re.DOTALL)[1].replace("\\\n", ""))
    places = {
        "/srv/start.py": DEPLOY / "start.py",
        "/srv/config.properties": config,
        "/srv/log4j2.xml": REPOSITORY / "handler/serve/log4j2.xml",
    }
    assert command[0] == "python"
    command = [sys.executable, *(places.get(word, word) for word in command[1:])]
    server = subprocess.Popen(
        command,
        cwd=tmp_path / "run",
        env=environment(str(tmp_path / "run")) | {"LOG_LOCATION": str(tmp_path / "run/logs")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert ready(settings["management_address"]).returncode == 1
        deadline = time.monotonic() + 200
        while ready(settings["management_address"]).returncode and time.monotonic() < deadline:
            assert server.poll() is None
            time.sleep(0.5)
        photo = (tiny_data / "images/18.png").read_bytes()
        answer = requests.post(
            f"{settings['inference_address']}/predictions/captioner",
            files={"image": photo},
            timeout=60,
        )
        assert answer.json()["caption"]
        assert os.listdir(tmp_path / "model_store") == ["captioner.mar"]
        metrics = requests.get(f"{settings['metrics_address']}/metrics", timeout=30).text
        assert "captioner_photos_total" in metrics
    finally:
        family = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
        server.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
    assert not alive  # the launcher ends on SIGTERM when Java has ended
    assert server.wait(5) >= 0
