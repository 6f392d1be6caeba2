"""Who may use a Ray head: whether it is reached over loopback alone, asks for a token, and takes ours.

Whoever reaches a head that asks for no token runs code on all its nodes. So a job is submitted, and a cluster trusted,
only after one look at its dashboard. Nothing here needs Ray: the answer is there before Ray could be imported.
"""

import ipaddress
import json
import os
import socket
import stat
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workers.common.errors import ClusterError, ConfigError

TIMEOUT_S = 5.0
"""How long a dashboard may take to answer whoever waits for it."""
VERSION = "/api/version"
"""Of the dashboard; it answers 401 without a token, and 403 with a wrong one, where a token is asked for."""


@dataclass(frozen=True)
class Access:
    """What a look at a head's dashboard has told."""

    url: str
    loopback: bool
    """It is reached over this machine's loopback: directly, or through a tunnel that ends here."""
    asks_for_token: bool
    accepts_ours: bool | None
    """None where it asks for no token, or where we have none."""
    ray_version: str
    """Empty where it did not let us in."""

    @property
    def exposed(self) -> bool:
        """Tell whether others than this machine's users may reach it, and need no token."""
        return not self.loopback and not self.asks_for_token


@dataclass(frozen=True)
class Token:
    """A token, and the file that it was read from; None where it is from the environment."""

    secret: str
    file: Path | None

    def __repr__(self) -> str:  # It must not get into a log by accident.
        return f"Token(secret=..., file={str(self.file) if self.file else None!r})"

    @property
    def readable_by_others(self) -> bool:
        """Tell whether other users of this machine can read or change it."""
        return self.file is not None and bool(self.file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def home() -> Path:
    """Return the home of whoever runs this.

    Raises:
        ConfigError: there is none, as of a container's user whom /etc/passwd does not know.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise ConfigError(
            f"HOME is not set, and user {os.getuid()} has no home: Ray's token lies there; set HOME to a folder that "
            "can be written"
        ) from error


def auth_token() -> Token | None:
    """Return the token that Ray would send: of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, in this order.

    Raises:
        ConfigError: a file is named that cannot be read, or what is there is no token.
    """
    if secret := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(_one_word(secret, "RAY_AUTH_TOKEN"), None)
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else home() / ".ray" / "auth_token"
    try:
        secret = file.read_text().strip()
    except FileNotFoundError as error:
        if named:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH={named}: no such file; name the file of the token") from error
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the token cannot be read ({error}); mend the file's owner and mode") from error
    return Token(_one_word(secret, str(file)), file) if secret else None


def _one_word(secret: str, where: str) -> str:
    """Refuse what could not even be sent in a header, without repeating it."""
    if len(words := secret.split()) > 1:
        raise ConfigError(
            f"{where}: a token is one word, there are {len(words)}; keep the token alone, or make one with "
            "`ray get-auth-token --generate`"
        )
    return secret


def head_access(dashboard_url: str, timeout_s: float = TIMEOUT_S) -> Access:
    """Ask a head's dashboard, first without a token and then, where it wants one, with ours.

    Args:
        dashboard_url: for instance http://127.0.0.1:8265.
        timeout_s: how long it may take to answer.

    Raises:
        ConfigError: that is no URL of a dashboard, or our token's file cannot be read.
        ClusterError: nobody answers there within seconds, or somebody else than Ray.
    """
    url = dashboard_url.rstrip("/")
    loopback = _is_loopback(url)
    status, version = _ask(url, None, timeout_s)
    accepts_ours = None
    asks = status in (401, 403)
    if asks and (token := auth_token()):
        status, version = _ask(url, token, timeout_s)
        accepts_ours = status == 200
    if (status == 200 and not version) or status not in (200, 401, 403):
        raise ClusterError(
            f"{url}: what answers there is not a Ray dashboard (HTTP status {status}); check the address, 8265 is the "
            "usual port"
        )
    return Access(url, loopback, asks, accepts_ours, version)


def _is_loopback(url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r}: not the URL of a dashboard; write it like http://127.0.0.1:8265")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except ValueError as error:  # A port that is none.
        raise ConfigError(f"{url!r}: {error}; write it like http://127.0.0.1:8265") from error
    except OSError as error:
        raise ClusterError(f"{url}: the host's name is not known ({error}); check the address") from error
    return all(ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback for *_, address in found)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token with it, to whatever host it names."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _ask(url: str, token: Token | None, timeout_s: float) -> tuple[int, str]:
    """Return the status of an answer and, of a dashboard that lets us in, Ray's version."""
    headers = {"Authorization": f"Bearer {token.secret}"} if token else {}
    # No proxy of the environment either: the dashboard is asked as Ray's own processes reach it.
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url + VERSION, headers=headers), timeout=timeout_s) as answer:
            return answer.status, str(json.loads(answer.read(1 << 16)).get("ray_version", ""))
    except urllib.error.HTTPError as error:
        return error.code, ""
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ClusterError(
            f"{url}: no Ray dashboard answers there ({reason}); start the head, open the tunnel to it, or check the "
            "address"
        ) from error
    except (ValueError, AttributeError):
        return 200, ""
