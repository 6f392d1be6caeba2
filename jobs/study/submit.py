"""`raymuon submit FILE --study`: a study as a job on a Ray cluster."""

import shlex
from contextlib import suppress

from jobs.environment import CONFIG
from jobs.ray_jobs import ENDED, Jobs
from jobs.screen import Screen
from jobs.study.command import beforehand, find_or_make
from jobs.study.file import load_study
from jobs.study.record import files_of
from jobs.study.state import StudyState
from jobs.submit import Target, Work, check_places, new_job, start_job, tell_job, tracking_of, watch
from workers.common.errors import ClusterError, ConfigError


def submit_study(source: str, overrides: list[str], target: Target, follow: bool, as_json: bool) -> None:
    """Submit a study, or what is left of it, and say where everything is.

    Its file and its base go with the job, and its run is made before: whoever starts the job again goes on with it.

    Raises:
        ConfigError: a trial, the head or a place is refused, or a job leads the study.
        ClusterError: the cluster cannot be reached, or refuses the job.
        StorageError: the tracking server does not answer.
    """
    if target.image:
        raise ConfigError("--image: a study takes two files along, and a container takes a config alone; leave it out")
    found = load_study(source, overrides)
    configs = beforehand(found, {})
    first = next(iter(configs.values()))
    for trial in found.study.question.trials(found.study, {}):
        check_places(found.config(trial, {}))  # As it is written: the job makes its paths absolute where it runs.
    jobs = Jobs(target.address, target.allow_open)
    tracking = tracking_of(target.tracking_uri or first.tracking.uri, first)
    record, is_new = find_or_make(found, tracking, configs.values())
    running = [job for job in jobs.of_run(record.run_id) if jobs.info(job)["status"] not in ENDED]
    if running:
        raise ConfigError(f"study {found.study.name}: job {running[-1]} leads it; first: raymuon stop {record.run_id}")
    job = new_job(record.run_id)
    work = Work(
        run_id=record.run_id,
        name=found.study.name,
        # Its own, whatever the nodes' environment names: the study's run is there.
        command=shlex.join(["study", "run", CONFIG, "--address", "auto", "--tracking-uri", first.tracking.uri]),
        files=files_of(found, CONFIG),
    )
    try:
        StudyState(found, record, {}).go_on()
        start_job(jobs, job, target, work, tracking)
    except BaseException:
        with suppress(ClusterError):
            jobs.stop(job)  # It may be there, and only the answer lost.
        if is_new:
            tracking.discard(record.run_id)  # No study without a job.
        raise
    tell_job(jobs, job, record.run_id, first.checkpoint.url, tracking, as_json)
    if not as_json:
        told = f"raymuon logs {record.run_id} --follow, how far it is: raymuon study status {record.run_id}"
        Screen().print(f"\nwatch it with: {told}")
    if follow:
        watch(jobs, job, record.run_id)
