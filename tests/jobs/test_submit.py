"""What is refused before a run exists, and what a job takes with it."""

import os
import subprocess

import pytest
from ray.runtime_env import RuntimeEnv

from jobs.load import load
from jobs.submit import FROM_IMAGE, WITH_OUR_CODE, Target, check_places, image_env
from workers.common.errors import ConfigError

SHARED = [
    *("checkpoint.url=s3://bucket/runs", "data.prepared_url=s3://bucket/data", "tracking.uri=http://mlflow:5000"),
]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("checkpoint.url=runs", "checkpoint.url=runs"),
        ("tracking.uri=sqlite:///runs/mlflow.db", "tracking.uri=runs/mlflow.db"),
        ("data.source='s3://bucket/*.txt,docs/*.md'", "data.source=docs/*.md"),
    ],
)
def test_a_place_that_goes_with_the_job_is_named(override, told):
    with pytest.raises(ConfigError, match="working directory goes with the job") as refusal:
        check_places(load("demo", [*SHARED, override]))
    assert told in str(refusal.value)


def test_shared_places_are_taken():
    check_places(load("demo", SHARED))
    check_places(load("demo", [*SHARED, "data.source=/mnt/text/*.txt"]))


def test_ray_takes_what_goes_with_an_image():
    RuntimeEnv(**image_env("registry/raymuon:1", {"RAYMUON_CONFIG": "seed: 0"}))
    with pytest.raises(ConfigError, match="give one of the two"):
        Target(address="http://head:8265", image="registry/raymuon:1", pin=True)


@pytest.mark.parametrize("begin", [WITH_OUR_CODE, FROM_IMAGE])
def test_a_job_is_the_very_process_that_ray_has_started(tmp_path, begin):
    """Ray reaps its own child alone: a driver that a shell leaves behind is a zombie for it where nobody else does."""
    for program in ("python", "raymuon"):
        (tmp_path / program).write_text("#!/bin/sh\necho $$ $*\n")
        (tmp_path / program).chmod(0o700)
    places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "RAYMUON_CONFIG": "seed: 0"}
    job = subprocess.Popen(f"{begin}train config.yaml", shell=True, env=places, stdout=subprocess.PIPE, text=True)
    told, *words = job.communicate()[0].split()
    assert int(told) == job.pid and words[-2:] == ["train", "config.yaml"]
