"""deploy/ray: the RayJob's pods against the schemas of Kubernetes, its parts against each other."""

import argparse
import ast
import re
import shlex
import sys
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import REPOSITORY

from handler.batch.__main__ import parse

RAY = REPOSITORY / "deploy" / "ray"
HANDLER = REPOSITORY / "handler"
DOCKERFILE = (REPOSITORY / "deploy" / "Dockerfile").read_text(encoding="utf-8")
JOB: dict[str, Any] = yaml.safe_load((RAY / "job.yaml").read_text(encoding="utf-8"))
CLUSTER = JOB["spec"]["rayClusterSpec"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
VERSIONS = ("1.29", "1.35")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("group", GROUPS, ids=["head", "workers"])
def test_every_pod_keeps_to_the_schemas_and_is_locked(group, version):
    template = group["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"] = {"name": "x", **template["metadata"]}
    kubernetes_validate.validate(pod, version, strict=True)
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    [container] = pod["spec"]["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"]
    user = pod["spec"]["securityContext"]["runAsUser"]
    assert f"USER {user}" in DOCKERFILE


@pytest.mark.parametrize("version", VERSIONS)
def test_the_network_policy_selects_the_pods(version):
    policy = yaml.safe_load((RAY / "network-policy.yaml").read_text())
    kubernetes_validate.validate(policy, version, strict=True)
    wanted = policy["spec"]["podSelector"]["matchLabels"].items()
    assert all(wanted <= group["template"]["metadata"]["labels"].items() for group in GROUPS)


def test_the_job_runs_the_command_that_there_is(monkeypatch):
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(JOB["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "handler.batch"]
    monkeypatch.setattr(sys, "argv", words[2:])
    arguments: argparse.Namespace = parse()
    mounts = [
        m["mountPath"] for m in GROUPS[1]["template"]["spec"]["containers"][0]["volumeMounts"]
    ]
    for path in (arguments.source, arguments.out, str(arguments.export)):
        assert any(path.startswith(mount + "/") for mount in mounts)
    assert CLUSTER["authOptions"] == {"mode": "token"}
    # The policy admits no submitter in a pod of its own. KubeRay asks for this beside it.
    assert JOB["spec"]["submissionMode"] == "SidecarMode"
    assert CLUSTER["headGroupSpec"]["template"]["spec"]["restartPolicy"] == "Never"
    pinned = (REPOSITORY / "requirements-batch.txt").read_text()
    assert re.search(rf"^ray=={re.escape(CLUSTER['rayVersion'])}$", pinned, re.MULTILINE)


def test_the_pods_run_the_servers_image_with_the_package_and_what_it_needs():
    """The image once lacked pi_heif, which every photo out of the ordinary needs, and all that a
    RayJob is submitted by."""
    deployment = yaml.safe_load((RAY.parent / "kubernetes/deployment.yaml").read_text())
    [server] = deployment["spec"]["template"]["spec"]["containers"]
    for group in GROUPS:
        [container] = group["template"]["spec"]["containers"]
        assert container["image"] == server["image"]
        variables = {one["name"]: one["value"] for one in container["env"]}
        folder = variables["PYTHONPATH"].removeprefix("/srv/")
        assert f"COPY handler {folder}/handler" in DOCKERFILE
    for name in ("requirements-batch.txt", "deploy/ray/requirements.txt"):
        assert name in DOCKERFILE and (REPOSITORY / name).exists()
    chosen = re.search(r"grep -E '\^\(([^)]*)\)==' requirements.txt > all.txt", DOCKERFILE)[1]
    installed = {"torch", "torchvision", *chosen.split("|")}
    for file in (REPOSITORY / "requirements-batch.txt", RAY / "requirements.txt"):
        installed |= set(re.findall(r"^([\w-]+)==", file.read_text(), re.MULTILINE))
    assert third_party() - {"yaml", "PIL"} <= installed


def third_party() -> set[str]:
    """Packages that a batch imports: all of `handler` but for what TorchServe alone runs."""
    found = set()
    for path in [*HANDLER.glob("*.py"), *(HANDLER / "batch").glob("*.py")]:
        if path.name in ("caption_handler.py", "server_metrics.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    return found - sys.stdlib_module_names - {"handler", "ts"}  # ts: within TorchServe alone
