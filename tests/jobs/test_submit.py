"""What is refused before a run exists, and what a job takes with it."""

import pytest
from ray.runtime_env import RuntimeEnv

from jobs.load import load
from jobs.submit import Target, check_places, image_env
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
