"""What was trained, opened by the name that a person has for it: a checkpoint, a run, or a Hugging Face folder.

Whoever looks at a model (generation, evaluation, spectra) opens it here and gets the same weights, buffers and
tokenizer. A Hugging Face folder is read where it lies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jobs.config_json import model_folder
from jobs.folder_model import FolderModel
from jobs.runs import TrackedRun, find
from optim.checks import ConfigProblems
from optim.config import precision_on
from orchestrator.log.run_log import Entry, RunLog, split_step
from workers.checkpoint.manifest import BUFFER, WEIGHT, Manifest
from workers.checkpoint.shards import CheckpointReader
from workers.common.errors import ConfigError, DamagedError, StorageError
from workers.common.storage import Store, absolute_url, is_remote, local_path
from workers.config import ModelConfig, model_config_of
from workers.data.json_tokenizer import read_tokenizer
from workers.data.tokenizer import BYTES, Tokenizer

if TYPE_CHECKING:
    from workers.models import LanguageModel

Dtype = Literal["auto", "float32", "bfloat16"]
"""Of a model's weights; `auto` as in training: bfloat16 on a GPU, float32 on a CPU."""


@dataclass(frozen=True)
class Trained:
    """A trained model: a checkpoint of a run, or what was imported from a folder."""

    where: str
    """What names it in messages and tables: `URL@STEP`, or the folder."""
    reader: CheckpointReader | FolderModel
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    """None of an import that came without."""
    log: RunLog | None
    """Of the run; None of a folder that was none."""
    commit: Entry | None
    """In the log."""
    tracking_uri: str = ""
    found: TrackedRun | None = None
    """The run, as it was named."""

    @property
    def manifest(self) -> Manifest:
        """The checkpoint's."""
        return self.reader.manifest

    @property
    def run_id(self) -> str:
        """The run's id; of an import the name of its folder."""
        return self.manifest.run_id

    @property
    def step(self) -> int:
        """The step after which it was saved; 0 of an import."""
        return self.manifest.step

    @property
    def seq_len(self) -> int:
        """Tokens that it was trained to look at; of an import as many as it has positions."""
        identity = self.manifest.identity
        if trained_here(self.manifest):
            return identity["train.seq_len"]
        return identity.get("hugging_face", {}).get("max_position_embeddings", 2048)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens with which a text ends; of an import also those that it ended its own with."""
        about = self.manifest.identity.get("hugging_face", {})
        ids: list[Any] = [self.tokenizer and self.tokenizer.end]
        for one in (about, about.get("generation_config", {})):
            known = one.get("eos_token_id")
            ids += known if isinstance(known, list) else [known]
        return frozenset(one for one in ids if one is not None)

    @property
    def s3_endpoint(self) -> str:
        """Of the store that it is in; empty for AWS, and for a folder."""
        return "" if self.log is None else self.log.store.s3_endpoint

    @cached_property
    def tracked(self) -> TrackedRun | None:
        """The run in MLflow; None where MLflow has none of its id.

        Raises:
            StorageError: MLflow does not answer.
        """
        if self.log is None or self.found is None or self.found.tracking_uri:
            return self.found
        try:
            tracked = find(self.run_id, self.tracking_uri, self.found.s3_endpoint)
        except ConfigError:
            return None
        return tracked if tracked.run_id == self.run_id else None  # Else another run has this one's id for a name.

    def model(self, dtype: Dtype = "auto", device: str = "") -> "LanguageModel":
        """Return the model, its weights and buffers filled in, ready to be asked and not to be trained.

        Args:
            dtype: of the weights; the routers' biases stay float32.
            device: torch's name of one; empty for a GPU where there is one, else the CPU.

        Raises:
            StorageError: something is damaged, missing or not finite.
        """
        import torch

        from workers.models import build

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "bfloat16" if precision_on(torch.device(device).type) == "bf16" else "float32"
        model = build(self.model_config, initialize=False).to(getattr(torch, dtype))
        buffers = set(self.reader.names(BUFFER))
        with undeleted((self.log, self.commit)):
            for name, target in model.state_dict().items():
                kind = BUFFER if name in buffers else WEIGHT
                target.copy_(torch.from_numpy(finite_tensor(self.reader, kind, name)))
        return model.to(device).eval()


@contextmanager
def undeleted(*read: tuple[RunLog | None, Entry | None]) -> Iterator[None]:
    """Have a checkpoint that is gone when it is read told as deleted, where its run's log says so by now.

    Args:
        read: the logs and commits of the checkpoints.

    Raises:
        StorageError: it was deleted.
    """
    try:
        yield
    except DamagedError as error:
        for log, commit in read:
            if log is not None and commit is not None and _deleted(log, commit):
                raise StorageError(
                    f"{log.store.url}@{commit.step}: deleted while it was read, by its run's retention or by a person; "
                    f"take another (raymuon checkpoints ls {log.store.url}), and pin it first (raymuon checkpoints pin)"
                ) from error
        raise


def _deleted(log: RunLog, commit: Entry) -> bool:
    log.refresh()
    return all(one.manifest != commit.manifest for one in log.commits)


def open_trained(what: str, tracking_uri: str, s3_endpoint: str = "") -> Trained:
    """Open what a person has named.

    Args:
        what: the URL of a run's folder, a run's id or name in MLflow, each with `@STEP` where its newest checkpoint is
            not meant; or a local folder with a Hugging Face model.
        tracking_uri: of MLflow.
        s3_endpoint: of an S3 store that is not AWS; empty for what the run itself has used.

    Raises:
        ConfigError: nothing is there, or no checkpoint of this step.
        StorageError: the checkpoint is damaged, or storage or MLflow do not answer.
    """
    base, step = split_step(what)
    if (folder := model_folder(base)) is not None:
        if step is not None:
            raise ConfigError(f"{what}: {base} is a Hugging Face folder, which has no steps; name it without @{step}")
        return _of_folder(folder)
    found, log = _run_of(base, tracking_uri, s3_endpoint)
    return _of_commit(log, log.commit_of(step), found, tracking_uri)


def series(what: str, tracking_uri: str, s3_endpoint: str = "") -> list[Trained]:
    """Open all checkpoints of a run, oldest first; of a Hugging Face folder, the one model in it.

    Raises:
        ConfigError: nothing is there, or one step alone was named.
        StorageError: a checkpoint is damaged, or storage or MLflow do not answer.
    """
    base, step = split_step(what)
    if step is not None:
        raise ConfigError(f"{what}: a series is of all checkpoints of a run; name it without @{step}")
    if (folder := model_folder(base)) is not None:
        return [_of_folder(folder)]
    found, log = _run_of(base, tracking_uri, s3_endpoint)
    log.commit_of()
    return [_of_commit(log, commit, found, tracking_uri) for commit in log.commits]


def _of_folder(folder: Path) -> Trained:
    model = FolderModel(folder)
    return Trained(str(folder), model, model.described.model, model.tokenizer, None, None)


def _run_of(base: str, tracking_uri: str, s3_endpoint: str) -> tuple[TrackedRun, RunLog]:
    # What lies here is meant, even without a slash in its name.
    near = not is_remote(base) and (local_path(base) / "log").is_dir()
    try:
        found = find(absolute_url(base) if near else base, tracking_uri, s3_endpoint)
    except ConfigError as error:
        if "/" in base:
            raise ConfigError(f"{error}, and no Hugging Face model (no config.json)") from error
        raise
    return found, RunLog(found.store)


def _of_commit(log: RunLog, commit: Entry, found: TrackedRun, tracking_uri: str) -> Trained:
    with undeleted((log, commit)):
        manifest = Manifest.read(log.store, commit.manifest, commit.sha256)
        tokenizer = tokenizer_of(log.store, manifest)
    reader, where = CheckpointReader(log.store, manifest), f"{log.store.url}@{commit.step}"
    return Trained(where, reader, model_of(manifest), tokenizer, log, commit, tracking_uri, found)


def model_of(manifest: Manifest) -> ModelConfig:
    """Return the architecture and sizes of the model in a checkpoint.

    Raises:
        ConfigError: they are no longer allowed.
    """
    fields = manifest.identity["model"]
    try:
        return model_config_of(fields)
    except ConfigProblems as error:
        raise ConfigError(f"the model of {manifest.run_id} at step {manifest.step}: {error}") from error


def trained_here(manifest: Manifest) -> bool:
    """Tell whether a checkpoint is of a run, and neither of an import nor of a conversion."""
    return "data" in manifest.identity


def tokenizer_of(store: Store, manifest: Manifest) -> Tokenizer | None:
    """Return what has made the tokens; None for an import that came without."""
    known = manifest.identity.get("data.tokenizer", "" if trained_here(manifest) else None)
    return read_tokenizer(store, known) if known else None if known is None else BYTES


def finite_tensor(reader: CheckpointReader | FolderModel, kind: str, name: str) -> np.ndarray:
    """Return a whole tensor of a checkpoint.

    Raises:
        StorageError: it is damaged or missing, or something in it is not finite.
    """
    tensor = reader.tensor(kind, name)
    if not np.isfinite(tensor).all():
        raise StorageError(
            f"step {reader.manifest.step}: {name} has elements that are NaN or infinite; take an earlier checkpoint"
        )
    return tensor
