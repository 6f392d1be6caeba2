import subprocess
import sys


def test_the_driver_starts_without_torch():
    """Torch takes seconds to import, and the driver does nothing with it."""
    code = (
        "import sys, orchestrator.driver, jobs.train, jobs.cli;"
        "print({'torch', 'deepspeed', 'mlflow', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_ray_is_told_what_to_leave_out_before_anything_imports_it():
    """It reads its environment once; without, a paragraph of its own stands among our lines when a worker dies."""
    code = "import orchestrator.evaluation; from ray._private import ray_constants as ray_has;"
    code += "print(ray_has.RAY_DEDUP_LOGS_SKIP_REGEX)"
    told = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "worker died or was killed" in told and "retries remaining" in told
