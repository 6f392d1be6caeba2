"""infra/ as far as it can be checked without a cloud: schemas, and what must hold between its files and raymuon."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import hcl2
import kubernetes_validate
import pytest
import yaml
from hcl2 import SerializationOptions
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.load import load
from tests.infra.manifests import INFRA, KUBERNETES, NOT_MANIFESTS, manifests, pods

ROOT = INFRA.parent
MANIFESTS, PODS = dict(manifests()), dict(pods())
RAY_PODS = {name: pod for name, pod in PODS.items() if name.startswith("ray")}
FILES = [path for path in sorted(INFRA.rglob("*")) if path.is_file() and ".terraform" not in path.parts]
CLUSTER = yaml.safe_load((INFRA / "aws" / "cluster.yaml").read_text())
DOCKERFILE = (INFRA / "image" / "Dockerfile").read_text()

# The fields of KubeRay's CRDs (v1, release 1.6) that we use. A field that a CRD does not know is dropped by Kubernetes,
# and nobody says so.
FIELDS = {
    "RayJob": {
        "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submissionMode",
        "submitterPodTemplate", "rayClusterSpec",
    },
    "RayCluster": {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
        "workerGroupSpecs",
    },
    "authOptions": {"mode", "secretName"},
    "autoscalerOptions": {"version", "idleTimeoutSeconds", "securityContext", "resources"},
    "headGroupSpec": {"serviceType", "rayStartParams", "template"},
    "workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}  # fmt: skip


def lock() -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())


def ray_clusters() -> dict[str, dict[str, Any]]:
    """Return the spec of each Ray cluster that a manifest makes."""
    found = {}
    for name, document in MANIFESTS.items():
        if document["kind"] == "RayCluster":
            found[name] = document["spec"]
        elif document["kind"] == "RayJob":
            found[name] = document["spec"]["rayClusterSpec"]
    return found


def terraform() -> dict[str, dict[str, dict[str, Any]]]:
    """Return all blocks of kind, type and name as one tree: `["resource"]["aws_s3_bucket"]["this"]`."""
    tree: dict[str, dict[str, dict[str, Any]]] = {}
    options = SerializationOptions(strip_string_quotes=True)
    for path in sorted((INFRA / "aws" / "terraform").glob("*.tf")):
        with path.open() as file:
            parsed = hcl2.load(file, serialization_options=options)
        for kind in ("resource", "data"):
            for block in parsed.get(kind, []):
                for type_, named in block.items():
                    if isinstance(named, dict):
                        tree.setdefault(kind, {}).setdefault(type_, {}).update(named)
    return tree


# ---- Kubernetes


@pytest.mark.parametrize("name", [name for name in MANIFESTS if not name.startswith("ray")])
def test_kubernetes_takes_the_manifest(name: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", PODS)
def test_kubernetes_takes_the_pod(name: str) -> None:
    kubernetes_validate.validate(PODS[name], kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", PODS)
def test_the_pod_keeps_to_the_restricted_standard(name: str) -> None:
    spec = PODS[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert all(volume.keys() & {"emptyDir", "configMap", "secret"} for volume in spec.get("volumes", []))
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", PODS)
def test_images_have_an_exact_tag(name: str) -> None:
    for container in PODS[name]["spec"]["containers"]:
        tag = container["image"].partition(":")[2]
        assert re.search(r"\d+\.\d+", tag), f"{container['image']} may be another image tomorrow"


@pytest.mark.parametrize("name", RAY_PODS)
def test_images_of_ray_are_of_our_version_and_ray_is_that_of_the_lock(name: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for container in RAY_PODS[name]["spec"]["containers"]:
        assert container["image"].endswith(f"/raymuon:{version}-cuda")


@pytest.mark.parametrize("name", ray_clusters())
def test_ray_asks_for_a_token(name: str) -> None:
    spec = ray_clusters()[name]
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert spec["rayVersion"] == lock()["ray"]


@pytest.mark.parametrize("name", [name for name, document in MANIFESTS.items() if document["kind"].startswith("Ray")])
def test_the_operator_knows_the_fields(name: str) -> None:
    document = MANIFESTS[name]
    assert document["apiVersion"] == "ray.io/v1"
    assert document["spec"].keys() <= FIELDS[document["kind"]]
    cluster = ray_clusters()[name]
    assert cluster.keys() <= FIELDS["RayCluster"]
    for part in ("authOptions", "autoscalerOptions", "headGroupSpec"):
        assert cluster[part].keys() <= FIELDS[part]
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= FIELDS["workerGroupSpecs"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_job_and_cluster_are_the_same_cluster() -> None:
    specs = list(ray_clusters().values())
    assert len(specs) == 2
    assert specs[0] == specs[1]


def test_nothing_is_exposed_outside_the_cluster() -> None:
    services = [document["spec"] for document in MANIFESTS.values() if document["kind"] == "Service"]
    types = [spec.get("type", "ClusterIP") for spec in services]
    types += [spec["headGroupSpec"]["serviceType"] for spec in ray_clusters().values()]
    assert set(types) == {"ClusterIP"}
    assert not [name for name, document in MANIFESTS.items() if document["kind"] in ("Ingress", "HTTPRoute")]


def test_every_pod_has_a_network_policy_of_its_own() -> None:
    policies = [document["spec"] for document in MANIFESTS.values() if document["kind"] == "NetworkPolicy"]
    everybody = [policy for policy in policies if policy["podSelector"] == {}]
    assert {"policyTypes": ["Ingress", "Egress"], "podSelector": {}} in everybody
    label = "part"
    selected = {policy["podSelector"]["matchLabels"][label] for policy in policies if policy not in everybody}
    assert selected == {pod["metadata"]["labels"][label] for pod in PODS.values()}
    # The metadata of a node would hand out the node's role.
    targets = [to for policy in policies for rule in policy.get("egress", []) for to in rule["to"]]
    blocks = [to["ipBlock"] for to in targets if "ipBlock" in to]
    assert blocks
    assert all("169.254.0.0/16" in block["except"] for block in blocks)


def test_head_on_demand_workers_on_spot() -> None:
    for spec in ray_clusters().values():
        (group,) = spec["workerGroupSpecs"]
        head, worker = spec["headGroupSpec"]["template"]["spec"], group["template"]["spec"]
        assert head["nodeSelector"] == {"eks.amazonaws.com/capacityType": "ON_DEMAND"}
        assert worker["nodeSelector"] == {"eks.amazonaws.com/capacityType": "SPOT"}
        # Ray has to be done with draining before Kubernetes kills it, and both before the machine is gone.
        (drain,) = [int(e["value"]) for e in worker["containers"][0]["env"] if "DRAIN_TIMEOUT" in e["name"]]
        assert drain < worker["terminationGracePeriodSeconds"] < 120


def test_the_run_fits_the_cluster() -> None:
    config = load(str(KUBERNETES / "run.yaml"), [])
    for spec in ray_clusters().values():
        (group,) = spec["workerGroupSpecs"]
        resources = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = resources["nvidia.com/gpu"]
        assert config.scaling.min_workers == group["minReplicas"] * gpus
        assert config.scaling.max_workers == group["maxReplicas"] * gpus
        assert config.scaling.cpus_per_worker * gpus <= int(resources["cpu"])
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert config.scaling.accelerator == "gpu", "`auto` would take the CPUs of a cluster whose spot nodes are all gone"
    (service,) = [d for d in MANIFESTS.values() if d["kind"] == "Service" and d["metadata"]["name"] == "mlflow"]
    assert config.tracking.uri == f"http://mlflow:{service['spec']['ports'][0]['port']}"


def test_a_retry_goes_on_with_the_run() -> None:
    (job,) = [document["spec"] for document in MANIFESTS.values() if document["kind"] == "RayJob"]
    assert job["entrypoint"] == "raymuon train /etc/raymuon/run.yaml --resume auto --address auto"
    assert job["backoffLimit"] > 0
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mounted,) = [mount for mount in head["containers"][0]["volumeMounts"] if mount["mountPath"] == "/etc/raymuon"]
    (volume,) = [volume for volume in head["volumes"] if volume["name"] == mounted["name"]]
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    assert {"name": volume["configMap"]["name"], "files": ["run.yaml"]} in kustomization["configMapGenerator"]


def test_the_kustomization_names_files_that_are_there() -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    maps = kustomization["configMapGenerator"]
    named = kustomization["resources"] + [file for generated in maps for file in generated["files"]]
    assert all((KUBERNETES / file).is_file() for file in named)
    started_by_hand = {"raycluster.yaml", "rayjob.yaml"}
    assert {path.name for path in KUBERNETES.glob("*.yaml")} - NOT_MANIFESTS - set(named) == started_by_hand


# ---- Secrets


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    for pattern in (r"(AKIA|ASIA)[0-9A-Z]{16}", r"-----BEGIN", r"://[^/\s:]+:[^/\s@]+@", r"^kind: Secret"):
        assert not re.search(pattern, text, re.MULTILINE), pattern
    # Nobody's account but the one of AWS's examples.
    assert set(re.findall(r"\b\d{12}\b", text)) <= {"111122223333"}


@pytest.mark.parametrize("name", PODS)
def test_secrets_reach_a_pod_by_reference_only(name: str) -> None:
    for container in PODS[name]["spec"]["containers"]:
        for variable in container.get("env", []):
            if re.search("PASSWORD|TOKEN|SECRET|KEY", variable["name"]) and not variable["name"].endswith("_FILE"):
                assert variable["valueFrom"].keys() == {"secretKeyRef"}, variable["name"]


def test_pods_have_roles_instead_of_keys() -> None:
    accounts = {d["metadata"]["name"]: d for d in MANIFESTS.values() if d["kind"] == "ServiceAccount"}
    used = {pod["spec"]["serviceAccountName"] for pod in PODS.values()}
    assert used == accounts.keys()
    for name, pod in PODS.items():
        assert pod["spec"].get("automountServiceAccountToken") is False or name.endswith(" head")
        assert not [e for c in pod["spec"]["containers"] for e in c.get("env", []) if e["name"].startswith("AWS_")]
    role = "eks.amazonaws.com/role-arn"
    annotated = {name for name, account in accounts.items() if role in account["metadata"].get("annotations", {})}
    roles = (INFRA / "aws" / "terraform" / "roles.tf").read_text()
    assert annotated == set(re.findall(r'"([a-z-]+)"', " ".join(re.findall(r"accounts = \[(.*?)\]", roles))))


# ---- Image


def test_hadolint_has_nothing_to_say() -> None:
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    hadolint = shutil.which("hadolint", path=places)
    assert hadolint
    said = subprocess.run([hadolint, str(INFRA / "image" / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")


def test_the_image_is_pinned_and_nobody_in_it_is_root() -> None:
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert all(stage.startswith(("${BASE} AS ", "build AS ")) for stage in stages)
    # What is kept has no package manager's work in it, and ends as somebody by number.
    kept = [stage for stage in stages if re.match(r"\S+ AS (mlflow|raymuon)\n", stage)]
    assert len(kept) == 2
    assert stages[-1] is kept[-1], "a build without --target must make the image of raymuon"
    for stage in kept:
        assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["10001:10001"]
        assert "pip" not in stage
    assert len(re.findall(r"pip install --constraint requirements.lock", DOCKERFILE)) == 2
    assert "RAY_AUTH_MODE=token" in kept[-1]
    users = {pod["spec"]["securityContext"]["runAsUser"] for name, pod in PODS.items() if "mlflow-db" not in name}
    assert users == {10001}


def test_what_the_image_adds_to_the_lock_does_not_contradict_it() -> None:
    pins = lock()
    for name in ("cuda.txt", "mlflow.txt"):
        lines = [line for line in (INFRA / "image" / name).read_text().splitlines() if not line.startswith("#")]
        added = dict(line.split("==") for line in lines)
        assert not added.keys() & pins.keys()
    assert pins["botocore"] == pins["boto3"], "they are released together"


def test_only_sources_reach_the_build() -> None:
    lines = (INFRA / "image" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert {re.sub(r"infra/image/\w+\.txt", "infra/image/*.txt", source) for source in sources} == allowed


# ---- AWS


def test_the_bucket_is_closed() -> None:
    resources = terraform()["resource"]
    block = resources["aws_s3_bucket_public_access_block"]["this"]
    names = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    assert all(block[name] is True for name in names)
    assert resources["aws_s3_bucket_versioning"]["this"]["versioning_configuration"][0]["status"] == "Enabled"
    assert "aws_s3_bucket_server_side_encryption_configuration" in resources
    rules = resources["aws_s3_bucket_lifecycle_configuration"]["this"]["rule"]
    assert any("abort_incomplete_multipart_upload" in rule for rule in rules)
    assert not resources.keys() & {"aws_iam_user", "aws_iam_access_key"}


def test_roles_may_do_what_a_run_does_and_no_more() -> None:
    policies = terraform()["data"]["aws_iam_policy_document"]
    for name, policy in policies.items():
        for statement in policy["statement"]:
            if statement.get("effect") == "Deny":
                continue
            assert not [action for action in statement["actions"] if action.endswith("*")], name
            assert isinstance(statement["actions"], list)
            if statement.get("resources") == ["*"]:
                assert all(action.startswith("ec2:Describe") for action in statement["actions"]), name
    by_sid = {statement["sid"]: statement for statement in policies["run"]["statement"]}
    wanted = {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
    assert set(by_sid["OwnFiles"]["actions"]) == wanted
    # Where run.yaml and mlflow.yaml put their files.
    config = load(str(KUBERNETES / "run.yaml"), [])
    bucket, prefix = config.checkpoint.url.removeprefix("s3://").split("/")
    assert by_sid["OwnFiles"]["resources"][0].endswith(f"/{prefix}/*")
    assert config.data.prepared_url.startswith(f"s3://{bucket}/{prefix}/")
    (artifacts,) = [s for s in policies["mlflow"]["statement"] if s["sid"] == "Artifacts"]
    (mlflow,) = [pod for pod in PODS.values() if pod["metadata"]["name"] == "mlflow"]
    assert f"--artifacts-destination=s3://{bucket}/mlflow" in mlflow["spec"]["containers"][0]["args"]
    assert artifacts["resources"][0].endswith("/mlflow/*")


def test_ray_takes_the_cluster_of_the_launcher() -> None:
    validate_config(prepare_config(yaml.safe_load(yaml.safe_dump(CLUSTER))))


def test_the_cluster_of_the_launcher_is_closed_too() -> None:
    types = {name: kind["node_config"] for name, kind in CLUSTER["available_node_types"].items()}
    for name, node in types.items():
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
        # Without it Ray makes a group with SSH open to the world, and a role that may do everything with EC2 and S3.
        assert node["SecurityGroupIds"]
        assert node["IamInstanceProfile"]["Arn"].endswith("-head" if name == "head" else "-worker")
    assert "InstanceMarketOptions" not in types["head"]
    assert types["spot-gpu"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    head, worker = CLUSTER["head_start_ray_commands"][-1], CLUSTER["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert "/home/ubuntu/.ray/auth_token" in CLUSTER["file_mounts"]
    variables = (INFRA / "aws" / "terraform" / "variables.tf").read_text()
    name = re.search(r'variable "name" \{.*?default\s+= "(.*?)"', variables, re.DOTALL)
    assert name
    assert name[1] == CLUSTER["cluster_name"]
