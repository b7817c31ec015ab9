"""The manifest for Kubernetes, against the models of Kubeflow's API."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML reads the manifest")
models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api has the models")

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"TrainingRuntime": models.TrainerV1alpha1TrainingRuntime, "TrainJob": models.TrainerV1alpha1TrainJob}


def manifests() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((ROOT / "launch/k8s/trainjob.yaml").read_text())
    return {document["kind"]: document for document in documents}


def as_kubeflow_reads(manifest: dict[str, Any]) -> Any:
    """What is left of a manifest: the models leave out fields that the API does not have."""
    return KINDS[manifest["kind"]].from_dict(copy.deepcopy(manifest)).to_dict()


def test_every_field_is_one_of_the_api() -> None:
    found = manifests()
    assert set(found) == set(KINDS)
    for manifest in found.values():
        assert as_kubeflow_reads(manifest) == manifest


def test_a_wrong_field_or_value_is_found() -> None:
    job = manifests()["TrainJob"]
    job["spec"]["trainer"]["numNode"] = 2
    assert as_kubeflow_reads(job) != job
    job = manifests()["TrainJob"]
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        as_kubeflow_reads(job)


def test_the_parts_name_each_other() -> None:
    runtime, job = manifests()["TrainingRuntime"], manifests()["TrainJob"]
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    (part,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = part["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert part["name"] == container["name"] == "node"  # the name by which Kubeflow finds the trainer
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
    config, out = (job["spec"]["trainer"]["args"][i] for i in (1, 3))
    assert config.startswith(f"{mounted['config']}/")
    assert out.startswith(f"{mounted['runs']}/")
