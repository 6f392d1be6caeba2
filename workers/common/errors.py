"""Errors for people: one clear message and the exit code that goes with it."""


class RaymuonError(Exception):
    """Something that a person has to mend; the message says what, where and how."""

    exit_code = 1


class ConfigError(RaymuonError):
    """The config, the data or the checkpoint do not fit what was asked for."""

    exit_code = 2


class ClusterError(RaymuonError):
    """The Ray cluster cannot be reached or cannot hold the workers."""

    exit_code = 3


class TrainingError(RaymuonError):
    """Training itself went wrong: a worker died, a loss is not finite."""

    exit_code = 4


class StorageError(RaymuonError):
    """Storage or tracking cannot be reached, refuses, or holds something damaged."""

    exit_code = 5


class NotFoundError(StorageError):
    """A file is not there."""


class DamagedError(StorageError):
    """A file of a checkpoint is missing, or is not what was written."""


class Interrupted(RaymuonError):
    """A person or the cluster asked the run to stop."""

    exit_code = 130


BY_EXIT_CODE: dict[int | None, type[RaymuonError]] = {
    error.exit_code: error for error in (ConfigError, ClusterError, TrainingError, StorageError, Interrupted)
}
