"""What infra/ holds, parsed; and all of its pods as plain Pods, also those that are inside Ray's own kinds.

`python -m tests.infra.manifests` prints Ray's pods and the network policies as YAML, for checkers that know only
Kubernetes' kinds.
"""

from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).parents[2] / "infra"
KUBERNETES = INFRA / "kubernetes"
NOT_MANIFESTS = {"kustomization.yaml", "run.yaml"}


def manifests() -> list[tuple[str, dict[str, Any]]]:
    """Return all manifests, each with a name to tell it by."""
    return [
        (f"{path.name}:{document['kind']}/{document['metadata']['name']}", document)
        for path in sorted(KUBERNETES.glob("*.yaml"))
        if path.name not in NOT_MANIFESTS
        for document in yaml.safe_load_all(path.read_text())
    ]


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Return all pod templates as Pods, each with a name to tell it by."""
    found = []
    for name, document in manifests():
        spec = document.get("spec", {})
        match document["kind"]:
            case "Deployment" | "StatefulSet":
                templates = {"": spec["template"]}
            case "RayCluster":
                templates = _ray(spec)
            case "RayJob":
                templates = {"submitter": spec["submitterPodTemplate"], **_ray(spec["rayClusterSpec"])}
            case _:
                continue
        for part, template in templates.items():
            full = f"{document['metadata']['name']}{part and '-'}{part}"
            metadata = {**template["metadata"], "name": full, "namespace": document["metadata"]["namespace"]}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
            found.append((f"{name} {part}".strip(), pod))
    return found


def _ray(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}


if __name__ == "__main__":
    policies = [document for _, document in manifests() if document["kind"] == "NetworkPolicy"]
    print(yaml.safe_dump_all([pod for name, pod in pods() if name.startswith("ray")] + policies))
