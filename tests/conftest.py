"""Settings for all tests."""

import os
import random
import signal
import tempfile

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# oneDNN's AMX kernels end the process on CPUs that announce AMX and do not grant it; before torch is imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# No test asks for models or data elsewhere; the libraries read this when they are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
# One list of fonts for all processes and test runs, which takes a second to make.
os.environ.setdefault("MPLCONFIGDIR", f"{tempfile.gettempdir()}/raymuon-matplotlib-{os.getuid()}")


# On a busy machine a time limit is a measure of the machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_addoption(parser):
    parser.addoption("--all-signals", action="store_true", help="every signal at every moment of a run")
    parser.addoption("--chaos-faults", type=int, default=8, help="random faults without Ray")
    parser.addoption("--chaos-ray-faults", type=int, default=2, help="random faults through Ray")
    parser.addoption("--e2e-steps", type=int, default=0, help="least length of the run on the local stack")
    parser.addoption("--screenshot", default="", help="where the picture of MLflow's page of that run goes")
    parser.addoption("--storage-steps", type=int, default=1000, help="random operations on a run's storage")
    parser.addoption("--chaos-seed", type=int, default=None, help="repeat what was printed")


STACK = "tests/e2e/test_stack.py"
LONGEST = (STACK, "tests/e2e/", "tests/orchestrator/", "tests/workers/", "tests/optim/")


class _RayByParts(LoadScopeScheduling):
    """Let one process have all tests through Ray, which share a cluster, but those of the stack, which has its own.

    The rest goes by file.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if file.startswith("tests/e2e/") and file != STACK else file


def pytest_collection_modifyitems(items):
    """Put the files that take longest first, so that none of them is begun when all others are done."""
    items.sort(key=lambda item: next((i for i, room in enumerate(LONGEST) if item.nodeid.startswith(room)), 9))


def pytest_xdist_make_scheduler(config, log):
    return _RayByParts(config, log)


@pytest.fixture(autouse=True)
def signals():
    """Give each test the default handlers: one that runs a command in this process leaves the command's.

    Processes inherit what is ignored, be it by such a test, under nohup or in a shell's background.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in (signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


@pytest.fixture
def seed(request) -> int:
    seed = request.config.getoption("--chaos-seed")
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    print(f"--chaos-seed {seed}")
    return seed
