"""deploy/ray: the RayJob's pods against the schemas of Kubernetes, its parts against each other."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import REPOSITORY

from handler.batch.__main__ import parse

RAY = REPOSITORY / "deploy" / "ray"
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
    assert f"USER {user}" in (RAY / "Dockerfile").read_text()


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
    pinned = (REPOSITORY / "requirements-batch.txt").read_text()
    assert re.search(rf"^ray=={re.escape(CLUSTER['rayVersion'])}$", pinned, re.MULTILINE)


def test_the_dockerfile_passes_hadolint():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    done = subprocess.run([hadolint, RAY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
