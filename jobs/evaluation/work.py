"""What a task of Ray's does of an evaluation: some checkpoints, one after another, each with all tasks."""

import contextlib
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.chat import ends_of_turn, template_of
from jobs.evaluation.chat import refuses_system
from jobs.evaluation.folder import TaskFolder
from jobs.evaluation.loading import SEEDS, load_tasks, prepare_environment, told
from jobs.trained import Trained, open_trained
from orchestrator.log.run_log import RunLog, split_step
from workers.common.errors import ClusterError, ConfigError, RaymuonError, StorageError
from workers.common.storage import Store, storage_errors
from workers.data.chat import ChatTemplate

if TYPE_CHECKING:
    from jobs.evaluation.lm import CheckpointLM

TELL_S = 2.0
"""Between two notes of how far it is."""
OFFLINE = ("stdlib", "stdlib_continuation", "stdlib_text", "stdlib_brackets")
"""Tasks that come with raymuon and need no network."""
BOOTSTRAP = 1000
"""Draws for the standard error of a figure that has no formula for one."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked of each checkpoint."""

    tasks: tuple[str, ...]
    """Names of tasks, groups and tags."""
    folder: TaskFolder | None = None
    """Task files of one's own."""
    shots: int | None = None
    """Examples before each question; None: as each task says."""
    limit: int | None = None
    """Documents of each task; None: all."""
    chat: bool = False
    """Tasks are asked as conversations, in the template of the model; examples are turns before the question."""
    system: str = ""
    """What the system says first in each conversation."""
    unsafe_code: bool = False
    """What the model writes may be run."""
    batch_tokens: int = 16384
    """That go through the model at once."""
    s3_endpoint: str = ""
    """Of an S3 store that is not AWS."""

    @property
    def offline(self) -> bool:
        """No task needs the network."""
        return self.folder is None and all(name in OFFLINE for name in self.tasks)


@dataclass(frozen=True)
class Figure:
    """One result."""

    task: str
    metric: str
    """With the name of a filter that the answers went through, if it has one."""
    value: float
    stderr: float | None
    shots: int | None
    documents: int


@dataclass(frozen=True)
class Progress:
    """How far a checkpoint is."""

    where: str
    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Result:
    """What a checkpoint has come to."""

    where: str
    figures: tuple[Figure, ...]
    """Of what was asked for; of a group without a figure of its own, of its members."""
    details: dict[str, dict[str, Any]]
    """Of each task of those, for programs: all that is below it, and how it was made."""
    silent: tuple[str, ...] = ()
    """What was asked for and came to no figure."""


@dataclass(frozen=True)
class Deleted:
    """A checkpoint that its run no longer keeps."""

    where: str


Note = Progress | Result | Deleted


def evaluate_all(evaluation: Evaluation, places: Sequence[str], put: Callable[[Note, str], object]) -> None:
    """Evaluate checkpoints, and tell of each one.

    Args:
        evaluation: what is asked.
        places: of the checkpoints, as `open_trained` takes them.
        put: called with what is told, and the place that is done with it; empty where none is.

    Raises:
        ConfigError: a task cannot be loaded or does not fit the model.
        StorageError: data or a checkpoint cannot be read.
        ClusterError: the memory does not suffice.
    """
    prepare_environment(evaluation.offline, evaluation.unsafe_code)
    with _laid_down(evaluation.folder) as folder:

        def tell(note: Note) -> None:
            put(note, "")

        tell(Progress("", "loading tasks", 0, len(places)))
        tasks = _imported(evaluation, folder)
        for where in places:
            tell(Progress(where, "reading the checkpoint", 0, 0))
            put(_evaluated_or_deleted(evaluation, where, tasks, tell), where)


def check_texts(trained: Trained, chat: bool, system: str) -> ChatTemplate | None:
    """Return the template of conversations, where they are asked for; refuse a checkpoint that cannot have its tasks.

    Raises:
        ConfigError: it has no tokenizer, or one of another vocabulary; no chat template, or one that refuses `system`.
        StorageError: the template is damaged.
    """
    _check_tokenizer(trained)
    if not chat:
        return None
    assert trained.tokenizer is not None
    template = template_of(trained, trained.tokenizer)
    if system and refuses_system(template):
        raise ConfigError(f"{trained.where}: its chat template takes no system message; leave --system out")
    return template


def _check_tokenizer(trained: Trained) -> None:
    if trained.tokenizer is None:
        raise ConfigError(
            f"{trained.where}: it came without a tokenizer, and tasks are text; import the model once more with its "
            "tokenizer.json and tokenizer_config.json beside config.json"
        )
    if (ids := trained.tokenizer.vocab_size) > (known := trained.model_config.vocab_size):
        raise ConfigError(
            f"{trained.where}: its tokenizer has ids up to {ids - 1:,} and the model a vocabulary of {known:,}: they "
            "are not of one another; take the tokenizer that the model was trained with"
        )


@contextlib.contextmanager
def _laid_down(folder: TaskFolder | None) -> Iterator[Path | None]:
    """Work in a copy of the task folder: the names of data in its files are from there."""
    if folder is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="raymuon-tasks-") as place:
        with storage_errors(place):
            folder.lay_down(Path(place))
        with contextlib.chdir(place):
            yield Path(place)


def _imported(evaluation: Evaluation, folder: Path | None) -> Any:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise not_installed(f"on the node {platform.node()}: {error}") from error
    return load_tasks(evaluation.tasks, folder, evaluation.unsafe_code, evaluation.shots)


def not_installed(why: str) -> ConfigError:
    """Return the refusal where lm-eval is missing."""
    return ConfigError(f"raymuon evaluate needs lm-eval, which is not installed ({why}): pip install 'raymuon[eval]'")


def _evaluated_or_deleted(evaluation: Evaluation, where: str, tasks: Any, tell: Callable[[Note], object]) -> Note:
    """A run that still trains deletes checkpoints as its retention says, also those that wait here."""
    try:
        return _evaluated(evaluation, where, tasks, tell)
    except (ConfigError, StorageError):
        if not _deleted(where, evaluation.s3_endpoint):
            raise
        return Deleted(where)


def _deleted(where: str, s3_endpoint: str) -> bool:
    """Tell whether a run has checkpoints, and this one no longer."""
    base, step = split_step(where)
    commits = [] if step is None else RunLog(Store(base, s3_endpoint)).commits
    return bool(commits) and all(commit.step != step for commit in commits)


def _evaluated(evaluation: Evaluation, where: str, tasks: Any, tell: Callable[[Note], object]) -> Result:
    import torch

    trained = open_trained(where, "", evaluation.s3_endpoint)
    lm = _model(trained, evaluation, tasks, tell)
    try:
        found = run_lm(lm, tasks, evaluation)
    except RaymuonError:
        raise
    except torch.OutOfMemoryError as error:
        raise ClusterError(
            f"{where}: out of the GPU's memory; lower --batch-tokens (now {evaluation.batch_tokens})"
        ) from error
    except Exception as error:  # A task's own Python may raise anything.
        raise ConfigError(f"{where}: lm-eval has ended: {told(error)}") from error
    names = on_record(evaluation.tasks, found)
    details = {name: _details(name, found, trained, evaluation, lm) for name in names}
    silent = tuple(name for name in evaluation.tasks if not on_record([name], found))
    return Result(where, tuple(figure for name in names for figure in figures_of(name, found)), details, silent)


def _model(trained: Trained, evaluation: Evaluation, tasks: Any, tell: Callable[[Note], object]) -> "CheckpointLM":
    """Return what lm-eval asks.

    Raises:
        ConfigError: a task does not fit the model, which shows before hours are spent with the others.
    """
    from jobs.evaluation.chat import Conversations
    from jobs.evaluation.lm import CheckpointLM, writing_of

    template = check_texts(trained, evaluation.chat, evaluation.system)
    assert trained.tokenizer is not None
    for name, task in tasks["tasks"].items():
        if task.get_config("output_type") == "generate_until":
            writing_of(task.get_config("generation_kwargs") or {}, trained.seq_len, f"task {name}")
    ends = trained.ends if template is None else trained.ends | ends_of_turn(template, trained.tokenizer)
    chat = None if template is None else Conversations(template)
    slowly = _Slowly(trained.where, tell)
    return CheckpointLM(
        trained.model(), trained.tokenizer, trained.seq_len, evaluation.batch_tokens, slowly, ends=ends, chat=chat
    )


class _Slowly:
    """Tells how far a checkpoint is, now and then."""

    def __init__(self, where: str, tell: Callable[[Note], object]) -> None:
        self._where, self._tell, self._said = where, tell, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._said > TELL_S:
            self._said = time.monotonic()
            self._tell(Progress(self._where, what, done, total))


def run_lm(lm: Any, tasks: Any, evaluation: Evaluation) -> Any:
    """Return what lm-eval finds of a model, from the same seeds each time: examples are drawn by them."""
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["others"])
    torch.manual_seed(SEEDS["others"])
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS["others"])
    return evaluate(
        lm,
        tasks,
        limit=evaluation.limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
        apply_chat_template=evaluation.chat,
        fewshot_as_multiturn=evaluation.chat,
        system_instruction=evaluation.system or None,
        confirm_run_unsafe_code=evaluation.unsafe_code,
    )


def on_record(asked: Sequence[str], found: Any) -> list[str]:
    """Return the tasks and groups that have figures for what was asked for, from the top down."""
    names: dict[str, None] = {}
    for name in asked:
        if name in found["results"] and figures_of(name, found):
            names[name] = None
        elif name in found["group_subtasks"]:
            names |= dict.fromkeys(on_record(found["group_subtasks"][name], found))
        else:  # A tag: its tasks stand for themselves.
            names |= dict.fromkeys(task for task in found["results"] if _has_tag(task, name, found))
    return list(names)


def figures_of(name: str, found: Any) -> list[Figure]:
    """Return the figures of a task or group out of lm-eval's results."""
    values: Mapping[str, Any] = found["results"][name]
    figures = []
    for key, value in values.items():
        metric, comma, made_by = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        stderr = values.get(f"{metric}_stderr,{made_by}")
        named = metric if made_by == "none" else f"{metric}.{made_by}"
        shots, documents = found["n-shot"].get(name), int(values.get("sample_len", 0))
        figures.append(
            Figure(name, named, float(value), float(stderr) if isinstance(stderr, Real) else None, shots, documents)
        )
    return figures


def _has_tag(task: str, tag: str, found: Any) -> bool:
    tags = found["configs"].get(task, {}).get("tag") or []
    return tag == tags or tag in tags


def _details(name: str, found: Any, trained: Trained, evaluation: Evaluation, lm: "CheckpointLM") -> dict[str, Any]:
    below = [name, *_below(name, found["group_subtasks"])]
    parts = ("results", "versions", "n-shot", "n-samples", "higher_is_better")
    return {
        "checkpoint": trained.where,
        "step": trained.step,
        **{part: {one: found[part][one] for one in below if one in found.get(part, {})} for part in parts},
        "shots": evaluation.shots,
        "chat": lm.chat and {"system": evaluation.system, **lm.chat.about},
        "python": platform.python_version(),
        **{package: version(package) for package in ("raymuon", "lm_eval", "torch")},
    }


def _below(name: str, members: Mapping[str, list[str]]) -> Iterator[str]:
    for child in members.get(name, []):
        yield child
        yield from _below(child, members)
