"""The list of rooms stands in one place; whatever has to name them again names the same ones."""

import re
import tomllib

from workers.common.source import ROOMS, ROOT, TRAINING_ROOMS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_ours_is_a_room():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} == set(ROOMS)


def test_every_list_of_packages_is_that_of_the_rooms():
    rooms = set(ROOMS)
    assert set(TRAINING_ROOMS) < rooms
    assert {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]} == rooms
    assert set(PROJECT["tool"]["pyright"]["include"]) == rooms
    imports = PROJECT["tool"]["importlinter"]
    assert set(imports["root_packages"]) == set(imports["contracts"][0]["layers"]) == rooms
    copied = re.findall(r"^COPY (\w+) \1$", (ROOT / "infra" / "image" / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied) == rooms


def test_every_folder_with_code_is_a_package():
    folders = {file.parent for room in (*ROOMS, "tests") for file in (ROOT / room).rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []
