"""Faults through Ray: workers and keepers killed or stopped, in a run as a person starts it."""

import json
import random
import signal

import psutil

from tests.e2e.test_resume import wait_for_step, workers_of

STEPS = 120
PER_RUN = 3


def keepers_of(workers: list[psutil.Process]) -> list[psutil.Process]:
    """Find the keepers by the titles that Ray gives its processes; those of other tests have other parents."""
    parents = {worker.ppid() for worker in workers}
    found = []
    for process in psutil.process_iter():
        try:
            if "ray::Keeper" in " ".join(process.cmdline()) and process.ppid() in parents:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_run_survives_random_faults(uninterrupted, make_place, request, seed):
    """At a fixed world size the weights are bitwise those of an undisturbed run, and each step is on record once."""
    faults = request.config.getoption("--chaos-ray-faults")
    options = [
        "recovery.hang_s=4",
        "recovery.free_retries=100",
        "recovery.poison_after=9",
        "checkpoint.snapshot_every=1",
    ]
    calm_place, calm = uninterrupted
    dice = random.Random(seed)
    for first in range(0, faults, PER_RUN):
        place = make_place(f"chaos-{first}")
        driver = place.start("data.ledger=ledger", *options, "--json")
        for number in range(min(PER_RUN, faults - first)):
            wait_for_step(place, 15 + 30 * number, attempt=1)
            alive = [p for p in workers_of(place) if p.status() != psutil.STATUS_ZOMBIE]
            kind = dice.choice(("kill", "kill", "kill", "stop", "terminate", "keeper"))
            victims = keepers_of(alive) if kind == "keeper" else alive
            victim = dice.choice(victims)
            print(f"step {15 + 30 * number}: {kind} {victim.pid} of {[p.pid for p in victims]}", flush=True)
            signals = {"stop": signal.SIGSTOP, "terminate": signal.SIGTERM}
            victim.send_signal(signals.get(kind, signal.SIGKILL))
        out, err = driver.communicate(timeout=300)
        print(err[-3000:])
        assert driver.returncode == 0 and "Traceback" not in err + out
        result = json.loads(out.splitlines()[-1])
        assert result["status"] == "finished" and result["world_size"] == 2
        place.assert_every_sample_once()
        assert place.checkpoints("diff", calm["checkpoint"], result["checkpoint"])["bitwise_equal"]
        assert place.history(result["run_id"], "loss") == calm_place.history(calm["run_id"], "loss")
