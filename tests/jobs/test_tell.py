"""Results for programs."""

import json

import pytest

from jobs.tell import json_text, tell


def refuse(name):
    raise ValueError(f"{name} is no JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_json_does_not_have_is_null(capsys, value):
    result = {"a": value, "b": [value, 1.5, {"c": (value, 2)}], "d": "NaN", "e": None, "f": True}
    expected = {"a": None, "b": [None, 1.5, {"c": [None, 2]}], "d": "NaN", "e": None, "f": True}
    tell(result)
    line = capsys.readouterr().out
    assert line.endswith("\n") and line.count("\n") == 1
    assert json.loads(line, parse_constant=refuse) == expected
    assert json.loads(json_text(result, indent=2), parse_constant=refuse) == expected
    assert json.loads(json_text(value)) is None
