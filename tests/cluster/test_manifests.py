"""The files of cluster/ are valid for Kubernetes, KubeRay and Ray, and what they refer to exists."""

from __future__ import annotations

import json
import os
import re
import shlex
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from clusters import build
from jsonschema import Draft7Validator, Draft202012Validator
from paths import CLUSTER, ROOT, SHARED
from ray.serve.schema import ServeDeploySchema

from jobs import cli
from serve.settings import Settings

OVERLAYS = ["cpu", "single-gpu", "multi-gpu", "spot"]
VERSION = "1.33"


@cache
def built(overlay: str) -> list[dict[str, Any]]:
    """All objects of an overlay, as `kubectl apply -k` would send them."""
    return build(CLUSTER / "kubernetes" / "overlays" / overlay)


def of_kind(overlay: str, kind: str) -> list[dict[str, Any]]:
    return [found for found in built(overlay) if found["kind"] == kind]


def strict(schema: Any) -> Any:
    """The schema, but that objects may have no fields that it does not know."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(part) for name, part in schema.items()}
    known = isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields")
    if known and "type" in schema and "additionalProperties" not in schema:
        found["additionalProperties"] = False
    return found


@cache
def kuberay(kind: str) -> Draft202012Validator:
    path = SHARED / "schemas" / "kuberay" / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip("needs ../shared (real photographs), and KubeRay's schemas in it")
    versions = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]["versions"]  # a megabyte
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    schema["properties"]["metadata"] = {}  # the API server's own business
    return Draft202012Validator(strict(schema))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_objects_match_their_schemas(overlay: str) -> None:
    """Every plain Kubernetes object of an overlay is valid under the strict schema of its kind."""
    own = [found for found in built(overlay) if not found["apiVersion"].startswith("ray.io/")]
    kinds = {"ServiceAccount", "PriorityClass", "NetworkPolicy", "PodDisruptionBudget", "Service", "StatefulSet"}
    assert {found["kind"] for found in own} == kinds
    for found in own:
        kubernetes_validate.validate(found, VERSION, strict=True)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_objects_match_kuberay_schemas(overlay: str, kind: str) -> None:
    """Every Ray object of an overlay is valid under KubeRay's strict schema of its kind."""
    found = of_kind(overlay, kind)
    assert found
    for each in found:
        problems = [f"{'/'.join(map(str, e.path))}: {e.message[:300]}" for e in kuberay(kind).iter_errors(each)]
        assert problems == []


def test_strict_schema_rejects_unknown_fields() -> None:
    """The strict schema reports a field that KubeRay does not know."""
    (found,) = of_kind("cpu", "RayCluster")
    wrong = yaml.safe_load(yaml.safe_dump(found))
    wrong["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    assert list(kuberay("RayCluster").iter_errors(wrong))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_jobs_and_service_share_the_cluster_spec(overlay: str) -> None:
    """Jobs and the service of an overlay have the same cluster spec as its RayCluster."""
    (cluster,) = of_kind(overlay, "RayCluster")
    jobs = of_kind(overlay, "RayJob")
    assert len(jobs) == 2
    for job in jobs:
        assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    (service,) = of_kind(overlay, "RayService")
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == [g["groupName"] for g in cluster["spec"]["workerGroupSpecs"]]
    assert {group["template"]["spec"]["priorityClassName"] for group in groups} == {"alit-online"}


def build_with(overlay: str, component: str, folder: Path) -> list[dict[str, Any]]:
    """An overlay's objects, with one more component before its others."""
    given = CLUSTER / "kubernetes" / "overlays" / overlay
    found = yaml.safe_load((given / "kustomization.yaml").read_text())
    made = {
        key: [os.path.relpath((given / place).resolve(), folder.resolve()) for place in places]  # it takes no others
        for key, places in (
            ("resources", found["resources"]),
            ("components", [f"../../components/{component}", *found["components"]]),
        )
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(made))
    return build(folder)


@pytest.mark.parametrize(
    ("queue", "label"), [("kueue", "kueue.x-k8s.io/queue-name"), ("volcano", "volcano.sh/queue-name")]
)
def test_queue_components_label_jobs(queue: str, label: str, tmp_path: Path) -> None:
    """The queue components put queue labels on RayJobs and on nothing else, and the jobs stay valid."""
    for each in build_with("spot", queue, tmp_path):
        queued = each["metadata"].get("labels", {}).get(label)
        assert queued == ("alit" if each["kind"] == "RayJob" else None)
        if queued:
            assert each["spec"]["suspend"] == (queue == "kueue")
            assert list(kuberay("RayJob").iter_errors(each)) == []


def test_tls_component_enables_tls_everywhere(tmp_path: Path) -> None:
    """The TLS component enables encryption between Ray's processes in every Ray object."""
    names = {"RayCluster": ["spec"], "RayJob": ["spec", "rayClusterSpec"], "RayService": ["spec", "rayClusterConfig"]}
    found = [each for each in build_with("cpu", "tls", tmp_path) if each["kind"] in names]
    assert len(found) == 4
    for each in found:
        spec = each
        for name in names[each["kind"]]:
            spec = spec[name]
        assert spec["tlsOptions"] == {"enabled": True}
        assert list(kuberay(each["kind"]).iter_errors(each)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_entrypoints_are_valid_commands(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job's entrypoint is a command that the CLI accepts, with labels and GPUs that the cluster has."""
    (cluster,) = of_kind(overlay, "RayCluster")
    tiers = {group["labels"]["tier"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    seen: list[Any] = []
    monkeypatch.setattr("jobs.tokenization.job.tokenize", lambda *given: seen.append(given))
    monkeypatch.setattr("jobs.tokenization.job.print_summary", lambda *given: None)
    monkeypatch.setattr("jobs.training.job.train_stage", lambda *given: seen.append(given))
    for job in of_kind(overlay, "RayJob"):
        words = shlex.split(job["spec"]["entrypoint"])
        assert words[0] == "alit"
        cli.main(words[1:])
        given = seen.pop()
        options = given[2] if words[1] == "tokenize" else given[4]
        asked = [*getattr(options, "worker_labels", ()), *getattr(options, "labels", ())]
        asked += getattr(options, "decode_labels", ())
        assert asked
        assert {label.removeprefix("tier=") for label in asked} <= set(tiers)
        wants_gpu = bool(getattr(options, "gpus_per_worker", 0)) or getattr(options, "gpus", "off") == "on"
        assert wants_gpu == ("gpu" in tiers)
        if words[1] == "train":  # every number of workers shares the batch
            low, _, high = options.workers.partition(":")
            counts = range(int(low), int(high or low) + 1)
            assert all(given[3].batch_size % count == 0 for count in counts)


def test_runbook_commands_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the runbook is accepted by the CLI and runs exactly one job."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    found = [line.split("#")[0] for line in re.findall(r"^alit .*$|(?<=`)alit [^`]* [^`]*(?=`)", text, re.MULTILINE)]
    found = [words for words in map(str.split, found) if len(words) > 2]
    assert {tuple(words[1:3]) for words in found} >= {("submit", "tokenize"), ("estimate", "tokenize")}
    seen: list[str] = []
    for name in (
        "jobs.submission.client.submit",
        "jobs.submission.client.follow",
        "jobs.submission.client.stop",
        "jobs.tokenization.job.tokenize",
    ):
        monkeypatch.setattr(name, lambda *given, name=name: seen.append(name) or 0)
    monkeypatch.setattr("jobs.tokenization.job.print_summary", lambda *given: None)
    monkeypatch.setattr("jobs.tokenization.capacity.Rates.read", lambda *given: None)
    monkeypatch.setattr("jobs.tokenization.capacity.print_estimate", lambda *given: seen.append("estimate"))
    monkeypatch.setattr(
        "jobs.benchmarks.tokenization.benchmark_tokenize", lambda *given, **more: seen.append("benchmark")
    )
    for words in found:
        for command in (words[1:], words[2:] if words[1] == "submit" and not words[2].startswith("--") else None):
            if command is None:
                continue
            before = len(seen)
            with suppress(SystemExit):
                cli.main(command)
            assert len(seen) == before + 1, command


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_service_configs_are_valid(overlay: str) -> None:
    """Every RayService has a configuration that Ray Serve and our settings accept, with enough GPUs."""
    (service,) = of_kind(overlay, "RayService")
    found = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(found).applications
    settings = Settings(**application.args)
    assert found["http_options"]["request_timeout_s"] > settings.deadline_seconds
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > found["http_options"]["request_timeout_s"]
    gpus = sum(
        g["maxReplicas"] for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if g["groupName"] == "gpu"
    )
    assert settings.gpus_per_replica * settings.max_replicas <= gpus


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_fit_their_limits(overlay: str) -> None:
    """Object stores and shared memory of the pods fit their memory limits, and the pods are unprivileged."""
    (cluster,) = of_kind(overlay, "RayCluster")
    spec = cluster["spec"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        store = int(group["rayStartParams"]["object-store-memory"])
        shm = next(v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "shm")
        memory = container["resources"]["limits"]["memory"]
        assert store < int(shm.removesuffix("Gi")) << 30 <= int(memory.removesuffix("Gi")) << 29
        assert container["resources"]["requests"]["memory"] == memory
        assert pod["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        for volume in container["volumeMounts"]:
            assert volume["name"] in {each["name"] for each in pod["volumes"]}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_between_objects_resolve(overlay: str) -> None:
    """Labels, selectors, priority classes and image tags that objects refer to exist."""
    (cluster,) = of_kind(overlay, "RayCluster")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    assert all(group["template"]["metadata"]["labels"]["alit"] == "ray" for group in groups)
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(overlay, "NetworkPolicy")}
    assert policies["alit"]["podSelector"] == {"matchLabels": {"alit": "ray"}}
    assert policies["alit-redis"]["ingress"][0]["from"] == [{"podSelector": {"matchLabels": {"alit": "ray"}}}]
    asking = [each["podSelector"] for each in policies["alit"]["ingress"][0]["from"] if "podSelector" in each]
    (submitters,) = [each["matchExpressions"][0] for each in asking if "matchExpressions" in each]
    assert set(submitters["values"]) == {job["metadata"]["name"] for job in of_kind(overlay, "RayJob")}
    classes = {each["metadata"]["name"]: each["value"] for each in of_kind(overlay, "PriorityClass")}
    (redis,) = of_kind(overlay, "StatefulSet")
    assert classes[redis["spec"]["template"]["spec"]["priorityClassName"]] == max(classes.values())
    assert {group["template"]["spec"]["priorityClassName"] for group in groups} == {"alit-batch"}
    tags = {
        group.get("groupName", "head"): group["template"]["spec"]["containers"][0]["image"].split(":")[1]
        for group in groups
    }
    assert tags.pop("gpu", "0.1.0-cuda") == "0.1.0-cuda"
    assert set(tags.values()) == {"0.1.0-cpu"}
    (budget,) = of_kind(overlay, "PodDisruptionBudget")
    assert "maxUnavailable" not in budget["spec"]  # refuses every eviction where the pods' owner has no scale


def test_environment_variables_are_read_by_the_code() -> None:
    """Every ALIT_ variable that the cluster's files set is read by the code."""
    code = "".join(
        path.read_text() for room in ("alit", "jobs", "serve") for path in (CLUSTER.parent / room).rglob("*.py")
    )
    text = "".join(path.read_text() for path in CLUSTER.rglob("*") if path.is_file())
    names = set(re.findall(r"\bALIT_[A-Z_]+\b", text))
    assert names
    assert {name for name in names if f'"{name}"' not in code} == set()


@pytest.mark.parametrize("where", ["aws", "local"])
def test_ray_up_configs_match_the_schema(where: str) -> None:
    """The configurations for `ray up` match Ray's schema and enable token authentication on every node."""
    found = yaml.safe_load((CLUSTER / f"ray-up-{where}.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    assert [error.message for error in Draft7Validator(schema).iter_errors(found)] == []
    starts = found["head_start_ray_commands"] + found["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
