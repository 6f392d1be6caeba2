import subprocess
import sys


def test_the_driver_starts_without_torch():
    """Torch takes seconds to import, and the driver does nothing with it."""
    code = (
        "import sys, orchestrator.driver, jobs.train, jobs.cli;"
        "print({'torch', 'deepspeed', 'mlflow', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
