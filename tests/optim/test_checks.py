from dataclasses import dataclass

import pytest

from optim.checks import ConfigProblems, filled, no_password, require, within


@dataclass(frozen=True)
class Section:
    number: float = 0.5
    text: str = "x"


def problems(section, *checks):
    try:
        require(section, *checks)
    except ConfigProblems as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "allowed"),
    [
        ("[0, inf)", (0, 1e300), (-1e-300, -1), "0 or more"),
        ("(0, inf)", (1e-300, 1e300), (0, -1), "greater than 0"),
        ("[0, 1]", (0, 1), (-1e-9, 1 + 1e-9), "between 0 and 1"),
        ("(0, 1]", (1e-300, 1), (0, 1 + 1e-9), "greater than 0 and at most 1"),
        ("[0, 1)", (0, 1 - 1e-9), (-1e-9, 1), "0 or more and less than 1"),
        ("(0, 1)", (1e-300, 1 - 1e-9), (0, 1), "greater than 0 and less than 1"),
        ("(1, 1e15]", (1.5, 1e15), (1, 2e15), "greater than 1 and at most 1e+15"),
        ("[-1, inf)", (-1, 5), (-2,), "-1 or more"),
    ],
)
def test_an_interval_has_its_ends_and_its_words(interval, inside, outside, allowed):
    for value in (*inside, *outside):
        section = Section(value)
        told = [] if value in inside else [f"number must be {allowed}, not {value}"]
        assert problems(section, *within(section, interval, "number")) == told


def test_what_the_lowest_number_stands_for_is_said():
    section = Section(-2)
    assert problems(section, *within(section, "[-1, inf)", "number", lowest="any")) == [
        "number must be -1 (any) or more, not -2"
    ]


def test_every_problem_is_told_and_none_twice():
    section = Section(float("nan"), " ")
    told = problems(section, *within(section, "[0, 1]", "number"), *filled(section, text="a folder"))
    assert told == ["number must be a finite number, not nan", "text must name a folder; it is empty"]


@pytest.mark.parametrize("url", ["https://user:word@host/x", "https://token@host", "s3://key:secret@bucket", "a:b@c"])
def test_a_password_in_a_url_is_refused(url):
    section = Section(text=url)
    assert [problem.split()[0] for problem in problems(section, *no_password(section, "text"))] == ["text"]


@pytest.mark.parametrize("url", ["https://host/a@b", "s3://bucket/x", "/a/b@c", "sqlite:///runs/mlflow.db", ""])
def test_an_address_alone_is_no_password(url):
    section = Section(text=url)
    assert problems(section, *no_password(section, "text")) == []
