"""cluster/: every file parses, fits its schema, agrees with the pinned versions, and starts what is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import ray.dashboard
import yaml

from raylux.config import Config

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
# First parts of absolute paths that these files may name.
KNOWN = {"dev", "etc", "home", "opt", "proc", "shared", "task", "tmp", "usr"}
SCRIPTS = (CLUSTER / "local.sh", CLUSTER / "slurm" / "raylux.sbatch")
KUBERNETES = "1.33"
PIN = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)

# The fields of KubeRay's v1 API (release 1.5): name -> what its value is. Pod templates are Kubernetes' own, and are
# held against its schema.
GROUP: dict[str, type | tuple[type, ...]] = {
    "labels": dict,
    "resources": dict,
    "rayStartParams": dict,
    "template": dict,
}
HEAD = {**GROUP, "serviceType": str, "headService": dict, "enableIngress": bool}
WORKERS = {
    **GROUP,
    **dict.fromkeys(("replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds"), int),
    "groupName": str,
    "suspend": bool,
    "scaleStrategy": dict,
}
AUTOSCALER = {
    **dict.fromkeys(("resources", "securityContext"), dict),
    **dict.fromkeys(("image", "imagePullPolicy", "upscalingMode", "version"), str),
    **dict.fromkeys(("env", "envFrom", "volumeMounts"), list),
    "idleTimeoutSeconds": int,
}
CLUSTER_SPEC = {
    **dict.fromkeys(("authOptions", "autoscalerOptions", "headServiceAnnotations", "headGroupSpec"), dict),
    "gcsFaultToleranceOptions": dict,
    **dict.fromkeys(("suspend", "enableInTreeAutoscaling"), bool),
    **dict.fromkeys(("managedBy", "rayVersion"), str),
    "workerGroupSpecs": list,
}
JOB_SPEC = {
    **dict.fromkeys(("activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"), int),
    **dict.fromkeys(("rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector", "submitterConfig"), dict),
    "deletionStrategy": dict,
    **dict.fromkeys(
        ("managedBy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode", "entrypointResources"), str
    ),
    **dict.fromkeys(("entrypointNumCpus", "entrypointNumGpus"), (int, float)),
    **dict.fromkeys(("shutdownAfterJobFinishes", "suspend"), bool),
}


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


CLUSTERS = {
    "cluster": _documents("kuberay/cluster.yaml")[0]["spec"],
    "fit": _documents("kuberay/job-fit.yaml")[0]["spec"]["rayClusterSpec"],
    "score": _documents("kuberay/job-score.yaml")[0]["spec"]["rayClusterSpec"],
}


def _fits(found: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    for name, value in found.items():
        assert name in fields, f"{where}: KubeRay knows no {name}"
        kind = fields[name]
        assert isinstance(value, kind) and (kind is not int or not isinstance(value, bool)), (
            f"{where}.{name}: {value!r}"
        )


def _groups(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield spec["headGroupSpec"]
    yield from spec["workerGroupSpecs"]


def _containers(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for group in _groups(spec):
        yield from group["template"]["spec"]["containers"]


# -------------------------------------------------------------------------------------------- all files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_small_and_names_no_place_of_ours(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.suffix == ".json" or len(text.splitlines()) < 400
    assert not re.search(r"https?://(?!127\.0\.0\.1|HOST|HEAD)", text)
    ours = (ROOT, Path.home(), Path(sys.prefix))
    assert not [place for place in ours if f"{place}/" in text]
    # Absolute paths are those of an image, a node or a mount, which these files set up or Ray and Kubernetes have.
    assert set(re.findall(r"(?<![\w.}~/:-])/([a-z]+)/", text)) <= KNOWN


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix in (".yaml", ".json")], ids=lambda path: path.name)
def test_every_yaml_and_json_parses(path: Path) -> None:
    assert all(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_may_be_executed_and_says_how_it_is_called(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    done = subprocess.run([path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


def test_versions_agree_with_the_pins() -> None:
    release = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert release is not None
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"rayproject/ray:([0-9.]+)", text)) <= {PIN["ray"]}, path
        assert set(re.findall(r"RAY_VERSION=([0-9.]+)", text)) <= {PIN["ray"]}, path
        assert set(re.findall(r"torch==([0-9.]+)", text)) <= {PIN["torch"]}, path
        assert set(re.findall(r"raylux:([0-9.]+)", text)) <= {release[1]}, path
    assert {spec["rayVersion"] for spec in CLUSTERS.values()} == {PIN["ray"]}
    assert f"Ray of one version ({PIN['ray']})" in (CLUSTER / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- kuberay


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_ray_cluster_has_the_fields_of_kuberays_api(name: str) -> None:
    spec = CLUSTERS[name]
    _fits(spec, CLUSTER_SPEC, "spec")
    _fits(spec["autoscalerOptions"], AUTOSCALER, "autoscalerOptions")
    _fits(spec["headGroupSpec"], HEAD, "headGroupSpec")
    for group in spec["workerGroupSpecs"]:
        _fits(group, WORKERS, group["groupName"])
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in _groups(spec):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_ray_cluster_has_token_labels_autoscaling_and_spot_nodes(name: str) -> None:
    spec = CLUSTERS[name]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # a worker on it would go with the job
    markets = {group["labels"]["ray.io/market-type"]: group for group in spec["workerGroupSpecs"]}
    assert set(markets) == {"on-demand", "spot"}
    assert all(group["labels"]["raylux/role"] for group in _groups(spec))
    assert "affinity" in markets["spot"]["template"]["spec"]
    assert markets["on-demand"]["minReplicas"] >= 1  # raylux checks demand against what is there
    assert all(group["template"]["spec"]["restartPolicy"] == "Never" for group in _groups(spec))  # autoscaler v2


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_pod_sees_the_same_storage_and_config(name: str) -> None:
    stored = {(item["kind"], item["metadata"]["name"]) for item in _documents("kuberay/storage.yaml")}
    mounts = []
    for group in _groups(CLUSTERS[name]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert ("PersistentVolumeClaim", volumes["shared"]["persistentVolumeClaim"]["claimName"]) in stored
        assert ("ConfigMap", volumes["config"]["configMap"]["name"]) in stored
        mounts += [container["volumeMounts"] for container in pod["containers"]]
    assert all(each == mounts[0] for each in mounts)


def test_jobs_with_gpus_have_one_in_every_pod_and_the_image_for_them() -> None:
    for name, spec in CLUSTERS.items():
        for container in _containers(spec):
            gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert gpu == (name != "cluster") == container["image"].endswith("-gpu")
    assert CLUSTERS["fit"] == CLUSTERS["score"]
    assert CLUSTERS["fit"]["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"


@pytest.mark.parametrize("stage", ["fit", "score"])
def test_a_ray_job_runs_an_entry_point_that_is_in_the_image(stage: str) -> None:
    (job,) = _documents(f"kuberay/job-{stage}.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    _fits(spec, JOB_SPEC, "spec")
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] > 0
    words = spec["entrypoint"].split()
    assert words[:2] == ["python", f"/opt/raylux/jobs/{stage}.py"]
    assert (ROOT / "jobs" / f"{stage}.py").is_file()
    image = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert "WORKDIR /opt/raylux" in image and "COPY jobs jobs" in image
    mounted = {mount["mountPath"] for mount in next(_containers(spec["rayClusterSpec"]))["volumeMounts"]}
    assert str(Path(words[2]).parent) in mounted
    text = next(d for d in _documents("kuberay/storage.yaml") if d["kind"] == "ConfigMap")["data"]["config.yaml"]
    config = Config.parse(yaml.safe_load(text), words[3:])
    assert isinstance(config.engine.workers, int) and config.run.folder.startswith("/shared/")
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAYLUX_GROW": "1"}}


def test_the_storage_is_what_kubernetes_takes() -> None:
    for item in _documents("kuberay/storage.yaml"):
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


# ------------------------------------------------------------------------------- ray up, image, metrics


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_ray_up_file_fits_rays_own_schema(cloud: str) -> None:
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    (config,) = _documents(f"up/{cloud}.yaml")
    jsonschema.validate(config, json.loads(schema.read_text(encoding="utf-8")))
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert {kind["labels"]["ray.io/market-type"] for kind in types.values()} == {"on-demand", "spot"}
    assert re.search(r"spot|preemptible", json.dumps(types["spot"]["node_config"]))
    assert not re.search(r"MarketType|preemptible", json.dumps([types["steady"], types["head"]]))
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)
    assert "~/.ray/auth_token" in config["file_mounts"].values()


def test_the_image_copies_what_there_is() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    extras = re.search(r'"\.\[(.*?)\]"', text)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert extras is not None and all(f"\n{extra} = [" in project for extra in extras[1].split(","))


def test_the_dashboard_draws_metrics_that_ray_has() -> None:
    """Ray's own dashboards of this version are the list of what it exports."""
    panels = Path(ray.dashboard.__file__).parent / "modules" / "metrics" / "dashboards" / "default_dashboard_panels.py"
    known = set(re.findall(r"\b(?:ray|autoscaler)_[a-z_]+", panels.read_text(encoding="utf-8")))
    found = json.loads((CLUSTER / "monitoring" / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in found["panels"] for target in panel["targets"]]
    # Those of raylux are held against what it exports by tests/test_metrics.py.
    used = {
        name for text in expressions for name in re.findall(r"\b(?:ray_(?!raylux_)|autoscaler_)[a-z_]+(?=\{)", text)
    }
    assert len(used) > 10 and used <= known
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])


def test_the_slurm_script_passes_its_arguments_on_and_keeps_its_token_private(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands, which do on this machine what they do on the first node."""
    for name, body in (
        ("scontrol", "echo node-1; echo node-2"),
        ("srun", f'echo "$@" >{tmp_path}/srun; stat -c %a "$RAY_AUTH_TOKEN_PATH" >{tmp_path}/mode; exit 3'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="ascii")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-[1-2]"}
    done = subprocess.run([SCRIPTS[1], "my.yaml", "fit.seed=1"], env=env, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "--address node-1:6379 --min-nodes 2" in (tmp_path / "srun").read_text()
    assert (
        (tmp_path / "srun")
        .read_text()
        .endswith("RAY_ADDRESS=node-1:6379 python -m raylux.cli run my.yaml fit.seed=1\n")
    )
    assert (tmp_path / "mode").read_text() == "600\n"
    assert not list(tmp_path.glob(".raylux-token-*"))
