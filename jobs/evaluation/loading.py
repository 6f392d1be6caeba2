"""lm-eval's tasks by name, loaded with their data; what keeps one from that is one message.

lm-eval and the libraries under it read the environment when they are imported: `prepare_environment` comes first.
"""

import difflib
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from requests.utils import get_environ_proxies

from jobs.evaluation.folder import SHIPPED
from jobs.evaluation.index import below, lm_evals_names, task_manager
from orchestrator.reach import reach
from workers.common.errors import ConfigError, RaymuonError, StorageError

HUB = "https://huggingface.co"
"""Where data sets come from, unless HF_ENDPOINT says otherwise."""
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
SEEDS = {"python": 0, "others": 1234}
"""lm-eval's own."""
ALLOW_CODE = "HF_ALLOW_CODE_EVAL"


def prepare_environment(offline: bool, unsafe_code: bool) -> None:
    """Set what the libraries under lm-eval read.

    Args:
        offline: no task needs the network; otherwise it is used where there is one, else what was kept of it before.
        unsafe_code: what the model writes may be run.
    """
    os.environ |= {"DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ[ALLOW_CODE] = "1" if unsafe_code else "0"
    if offline or not _hub_is_there():
        os.environ |= dict.fromkeys(OFFLINE, "1")


def load_tasks(names: Sequence[str], folder: Path | None, unsafe_code: bool, shots: int | None) -> Any:
    """Return the tasks and groups of these names, as lm-eval's `evaluate` takes them.

    Args:
        names: of tasks, groups and tags.
        folder: with task files of one's own, which go before those of the same name.
        unsafe_code: what the model writes may be run.
        shots: examples before each question, for tasks whose own files do not say none; None: as the files say.

    Raises:
        ConfigError: a name that is none, code that may not be run, a task that cannot be loaded.
        StorageError: data that cannot be reached.
    """
    manager = task_manager(names, [SHIPPED, *([folder] if folder else [])])
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name, [*manager.all_tasks, *lm_evals_names()])
    if not unsafe_code:
        _refuse_code(names, manager.task_index)
    everything = [one for name in names for one in _loaded(manager, name)]
    try:
        loaded = manager.load(everything)
    except ValueError as error:
        raise ConfigError(f"--tasks {','.join(names)}: {error}; name a task once, alone or by its group") from error
    for name, task in loaded["tasks"].items():
        _check_metrics(name, task)
        own = task.get_config("num_fewshot")
        task.set_config("num_fewshot", shots if shots is not None and own != 0 else own or 0)
    return loaded


def _check_metrics(name: str, task: Any) -> None:
    """Refuse a task that lm-eval can ask and not score: it would end when all is asked, or come to no figure.

    Raises:
        ConfigError: a metric or an aggregation has a name that is none.
    """
    own = task.get_config("process_results") is not None
    for metric, function in getattr(task, "_metric_fn_list", {}).items():
        if function is None and not own:
            raise ConfigError(
                f"task {name}: its metric {metric!r} is known neither to lm-eval nor, here, to `evaluate`"
            )
        if task._aggregation_list.get(metric) is None:
            raise ConfigError(f"task {name}: the aggregation of its metric {metric!r} is none that lm-eval knows")


def _unknown(name: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, 3)
    mean = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(f"--tasks {name}: no task, group or tag of that name; {mean}`lm-eval ls tasks` lists lm-eval's")


def _loaded(manager: Any, name: str) -> list[Any]:
    try:
        found = manager.load([name])
    except RaymuonError:
        raise
    except OSError as error:
        raise _out_of_reach(name, error) from error
    except Exception as error:  # Whatever a task's file or its Python raises.
        raise ConfigError(f"task {name} cannot be loaded: {told(error)}") from error
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _out_of_reach(name: str, error: OSError) -> StorageError:
    return StorageError(
        f"task {name}: its data cannot be reached: {told(error)}. Run it once where there is a network and take "
        "the folder HF_HOME from there along, or write a task file over data of your own (--task-folder); without a "
        "network there is --tasks stdlib"
    )


def told(error: BaseException) -> str:
    """Return what an error of somebody's Python says, in a line, and where it was raised if that is not clear."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, OSError | ImportError) and first:
        return first
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first} (in {Path(last.filename).name}, line {last.lineno}: {last.line})"


def _refuse_code(names: Sequence[str], index: Mapping[str, Any]) -> None:
    """Refuse tasks that run what a model writes; before they are loaded, for their own modules run code then."""
    everything = dict.fromkeys(one for name in names for one in below(name, index))
    if found := [one for one in everything if one in index and (index[one].cfg or {}).get("unsafe_code")]:
        raise ConfigError(
            f"--tasks {','.join(names)}: {', '.join(found)} would run code that the model has written, on this machine "
            "and with your rights; --confirm-run-unsafe-code lets it, in a container for instance, or name tasks that "
            "run none (moonlight_text)"
        )


def _hub_is_there() -> bool:
    """Tell whether the hub may answer: its own library would try for half a minute for each file."""
    place = urlparse(os.environ.get("HF_ENDPOINT") or HUB)
    if get_environ_proxies(place.geturl()):
        return True  # A proxy reaches what this machine does not.
    try:
        reach(place.hostname or "", place.port or (80 if place.scheme == "http" else 443))
    except OSError:
        return False
    return True
