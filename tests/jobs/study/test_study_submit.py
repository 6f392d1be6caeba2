"""What is refused of a study before there is a job; that one comes to its end is a cluster's affair (tests/e2e)."""

import pytest
import yaml

from jobs.environment import working_directory
from jobs.study.submit import submit_study
from jobs.submit import Target
from tests.jobs.study.test_study_file import STUDY
from workers.common.errors import ConfigError

HEAD = "http://127.0.0.1:1"
SHARED = {"checkpoint.url": "s3://b/runs", "data.prepared_url": "s3://b/data", "tracking.uri": "http://mlflow:5000"}


@pytest.fixture
def refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def submit(settings: dict, axes: dict | None = None, **target: str) -> str:
        study = {**STUDY, "settings": settings, **({"axes": axes} if axes else {})}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        with pytest.raises(ConfigError) as raised:
            submit_study("study.yaml", [], Target(address=HEAD, **target), follow=False, as_json=False)
        assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]
        return str(raised.value)

    return submit


def test_places_that_go_with_the_job_are_refused_of_every_trial(refused):
    assert "checkpoint.url=runs/checkpoints" in refused({})
    here = {"place": {"there": {}, "here": {"data.ledger": "ledger"}}}
    assert "data.ledger=ledger" in refused(SHARED, here)


def test_a_study_does_not_go_into_an_image(refused):
    assert "--image: a study takes two files along" in refused(SHARED, image="registry/raymuon:1")


def test_both_files_lie_in_the_jobs_folder():
    with working_directory({"config.yaml": "a: 1", "base.yaml": "b: 2"}) as folder:
        assert (folder / "config.yaml").read_text() == "a: 1" and (folder / "base.yaml").read_text() == "b: 2"
        assert (folder / "jobs" / "study" / "engine.py").exists()
