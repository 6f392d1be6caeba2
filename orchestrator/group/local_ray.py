"""What a Ray needs that is started on this machine for one run: a token of its own, and room for its sockets."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path

from ray._private import parameter, services

from orchestrator.group.access import auth_token, home
from workers.common.disk import publish, temporary_beside
from workers.common.errors import ConfigError

SOCKET_BYTES = 107
"""The longest name that Linux allows a socket."""


def ready_for_local_ray() -> None:
    """See to it that a Ray can start on this machine, with a token that only its owner can read.

    Ray would make ~/.ray/auth_token itself, for every user of the machine to read.

    Raises:
        ConfigError: the environment names a place that cannot be used; with the variable that mends it.
    """
    _check_temporary()
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN", "").strip() or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        auth_token()
        return
    file = home() / ".ray" / "auth_token"
    if (token := auth_token()) is None:
        try:
            with temporary_beside(file) as temporary:
                temporary.touch(0o600)
                temporary.write_text(secrets.token_hex(16))
                with suppress(FileExistsError):  # Another driver was faster.
                    publish(temporary, file)
        except OSError as error:
            raise ConfigError(
                f"HOME={home()}: a local Ray keeps its token in {file}, which cannot be written ({error}); set "
                "HOME to a folder that can be, or give a token in RAY_AUTH_TOKEN (one word that nobody can guess)"
            ) from error
    elif token.readable_by_others:
        with suppress(OSError):  # It is somebody else's.
            file.chmod(0o600)


@contextmanager
def bare() -> Iterator[None]:
    """Have Ray start without what nobody looks at in one that is ours alone: autoscaler, log monitor, API server.

    That is three processes and 3 s of a processor, and `ray.init` waits for the last one, which runs without a
    dashboard, too. It cannot be told so by what is public of Ray.
    """
    parameters, api_server = parameter.RayParams, services.start_api_server
    parameter.RayParams = partial(parameters, include_log_monitor=False, no_monitor=True)  # type: ignore[misc]
    services.start_api_server = lambda *_, **__: (None, None)  # As where it could not be started.
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server = parameters, api_server  # type: ignore[misc]


def _check_temporary() -> None:
    """Refuse a folder in which Ray could not make its sockets: it says so later, and not what mends it."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    folder = Path(os.environ[variable] if variable else "/tmp").absolute()
    named = f"{variable or 'the temporary folder'}={folder}"
    mend = "set RAY_TMPDIR to a short path that can be written, for instance RAY_TMPDIR=/tmp"
    session = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    if (size := len(os.fsencode(folder / "ray" / session / "sockets" / "plasma_store"))) > SOCKET_BYTES:
        raise ConfigError(f"{named}: Ray's sockets there would have names of {size} bytes, {SOCKET_BYTES} go; {mend}")
    try:
        (folder / "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "ray"):
            pass
    except OSError as error:
        raise ConfigError(f"{named}: Ray cannot write there ({error}); {mend}") from error
