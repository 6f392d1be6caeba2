"""How a config says what is wrong with it: in the lowest room, for every room has settings.

A config dataclass checks itself when it is made and names *all* its problems at once, so that a person mends a file in
one go. `jobs` prefixes the section's name and gathers the problems of all sections.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Check = tuple[bool, str]
"""Whether something holds, and what is wrong where it does not; the text begins with the key."""
_NAME = re.compile(r"[A-Za-z0-9._-]*[A-Za-z0-9][A-Za-z0-9._-]*")
_PASSWORD = re.compile(r"https?://[^/]*@|(^|://)[^/@]*:[^/@]*@")


class ConfigProblems(ValueError):
    """Everything that is wrong with one config section; each problem starts with the key's name."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def require(config: "DataclassInstance", *checks: Check) -> None:
    """Check a config: every number is finite, and every check holds.

    Args:
        config: a dataclass.
        checks: what has to hold.

    Raises:
        ConfigProblems: with all that is wrong.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    problems = {
        key: f"{key} must be a finite number, not {value}"
        for key, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    found = [*problems.values(), *(text for holds, text in checks if not holds and text.split()[0] not in problems)]
    if found:
        raise ConfigProblems(found)


def within(config: "DataclassInstance", interval: str, *keys: str, lowest: str = "") -> Iterator[Check]:
    """Yield the check of each key that its number lies in an interval.

    Args:
        config: a dataclass.
        interval: as mathematics writes it: `(0, 1]` is without 0 and with 1, `[1, inf)` has no upper end.
        keys: of the config.
        lowest: what the lowest number stands for, if it stands for something else than itself.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    open_low, open_high = interval[0] == "(", interval[-1] == ")"
    meaning = f" ({lowest})" if lowest else ""
    if high == math.inf:
        allowed = f"greater than {low:g}" if open_low else f"{low:g}{meaning} or more"
    elif open_low or open_high:
        bottom = f"greater than {low:g}" if open_low else f"{low:g}{meaning} or more"
        allowed = f"{bottom} and {'less than' if open_high else 'at most'} {high:g}"
    else:
        allowed = f"between {low:g}{meaning} and {high:g}"
    for key in keys:
        value = getattr(config, key)
        above = low < value if open_low else low <= value
        below = value < high if open_high else value <= high
        yield above and below, f"{key} must be {allowed}, not {value}"


def filled(config: "DataclassInstance", **what: str) -> Iterator[Check]:
    """Yield the check of each key that its text is not blank; `what` says what it must name."""
    for key, thing in what.items():
        yield bool(getattr(config, key).strip()), f"{key} must name {thing}; it is empty"


def named(config: "DataclassInstance", *keys: str) -> Iterator[Check]:
    """Yield the check of each key that its text is a name that metrics, tags and files can have."""
    for key in keys:
        value = getattr(config, key)
        yield _NAME.fullmatch(value) is not None, f"{key} must be of letters, digits, -, _ and ., not {value!r}"


def no_password(config: "DataclassInstance", *keys: str) -> Iterator[Check]:
    """Yield the check of each key that its URL has no password in it: a config goes into MLflow, job info, journals."""
    for key in keys:
        text = f"{key} must have no user or password in it; credentials come from a role or the environment "
        text += "(AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_PASSWORD and so on)"
        value = getattr(config, key)
        yield not any(map(_PASSWORD.search, [value] if isinstance(value, str) else value)), text
