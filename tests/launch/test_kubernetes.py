"""launch/k8s.yaml is valid and consistent, and the command of its pods trains on two hosts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
import yaml

from tests.launch.hosts import Host
from tests.launch.training import CUT_DOWN, environment, outcome
from tests.recipe_runs import ROOT

FILE = ROOT / "launch/k8s.yaml"
VERSIONS = ("1.29", "1.30", "1.32", "1.34", "1.37")
README = ROOT / "launch/README.md"
RUN_NAME = "pods; $HOME"


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    return documents()["Service"]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return documents()["Job"]


def documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(FILE.read_text())}


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(job)["containers"]
    return only


def variables(job: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(job)["env"] if "value" in entry}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["Service", "Job"])
def test_every_key_is_in_the_schema_of_kubernetes(kind: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    document = documents()[kind]
    assert validate(document, version, strict=True) == version
    document["spec"]["backofLimit"] = 1
    with pytest.raises(Exception, match="backofLimit"):
        validate(document, version, strict=True)


def test_the_job_mounts_the_volume_that_the_readme_creates(job: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    (text,) = re.findall(
        r"<<'END'\n(apiVersion: v1\nkind: PersistentVolumeClaim.*?)\nEND", README.read_text(), re.DOTALL
    )
    claim = yaml.safe_load(text)
    validate(claim, VERSIONS[-1], strict=True)
    (volume,) = [volume for volume in pod(job)["volumes"] if "persistentVolumeClaim" in volume]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "pods on several nodes write to it"
    (mount,) = [mount for mount in container(job)["volumeMounts"] if mount["name"] == volume["name"]]
    assert f"run.out={mount['mountPath']}" in container(job)["args"]


def test_pods_reach_each_other_through_the_service(service: dict[str, Any], job: dict[str, Any]) -> None:
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod(job)["subdomain"] == service["metadata"]["name"]
    # The label that the job controller sets on pods.
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert job["spec"]["completionMode"] == "Indexed"
    assert variables(job)["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    ports = {str(port["containerPort"]) for port in container(job)["ports"]}
    assert ports == {variables(job)["MASTER_PORT"]} == {str(port["port"]) for port in service["spec"]["ports"]}


def test_the_number_of_nodes_is_the_same_everywhere(job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert spec["completions"] == spec["parallelism"] == int(variables(job)["NUM_NODES"])
    assert variables(job)["RANKS_PER_NODE"] == str(container(job)["resources"]["limits"]["nvidia.com/gpu"])
    spread = pod(job)["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert [rule["topologyKey"] for rule in spread] == ["kubernetes.io/hostname"]


def test_every_variable_that_is_set_is_read(job: dict[str, Any]) -> None:
    script = (ROOT / "launch/torchrun.sh").read_text()
    read_by_torch = Path(torch.distributed.__file__).with_name("launcher").joinpath("api.py").read_text()
    words = " ".join(container(job)["args"])
    for entry in container(job)["env"]:
        name = entry["name"]
        is_knob = re.search(rf"^{name}=\$\{{{name}:-", script, re.MULTILINE)
        assert is_knob or f"$({name})" in words or name in read_by_torch, name


def test_ranks_can_write_a_checkpoint_before_the_pod_is_killed(job: dict[str, Any]) -> None:
    assert pod(job)["terminationGracePeriodSeconds"] > int(variables(job)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert "--resume" in container(job)["args"]
    ignore, fail = job["spec"]["podFailurePolicy"]["rules"]
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (fail["action"], fail["onExitCodes"]["containerName"]) == ("FailJob", container(job)["name"])
    assert pod(job)["restartPolicy"] == "Never", "required by podFailurePolicy"
    assert "backoffLimit" not in job["spec"], "it would count the failures of all pods together"


@pytest.mark.distributed
def test_the_command_of_its_pods_trains_on_two_hosts_as_on_one(
    two_hosts: list[Host], job: dict[str, Any], tmp_path: Path, one_node: dict[str, Any]
) -> None:
    pods = [f"{job['metadata']['name']}-{index}.{pod(job)['subdomain']}" for index in range(len(two_hosts))]
    lines = [f"{host.address} {host.name} {name}" for host, name in zip(two_hosts, pods, strict=True)]
    names = tmp_path / "hosts"
    names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    enter = ["unshare", "--mount", "sh", "-c", f'mount --bind {names} /etc/hosts && exec "$@"', "sh"]
    started = [
        host.popen([*enter, *command(job, tmp_path)], {**variables(job), **given_to_pod(index)}, cwd=ROOT)
        for index, host in enumerate(two_hosts)
    ]
    assert [one.wait(90) for one in started] == [0, 0]
    assert outcome(tmp_path / RUN_NAME) == one_node


def command(job: dict[str, Any], folder: Path) -> list[str]:
    """Return the command of a pod, with a reduced run in a folder of the test."""
    only = container(job)
    words = [word.replace("$(RUN_NAME)", RUN_NAME) for word in [*only["command"], *only["args"]]]
    words[words.index("run.out=/runs")] = f"run.out={folder}"
    return [*words, *CUT_DOWN]


def given_to_pod(index: int) -> dict[str, str]:
    """Return the variables set by Kubernetes (the pod's index), and those that differ without GPUs."""
    here = environment(RANKS_PER_NODE=1, NODE_RANK=index, JOB_COMPLETION_INDEX=index, RUN_NAME=RUN_NAME)
    assert here.pop("PYTHONPATH")  # must be unnecessary in the working directory of the image
    return here
