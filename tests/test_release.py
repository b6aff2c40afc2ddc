"""What goes with a release agrees: version, Pythons, workflows, what a wheel is made from."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptq4sam.version import __version__
from tests.tiny_runs import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
PROJECT = (REPOSITORY / "pyproject.toml").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
RULES = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))


def read(name: str) -> Any:
    return yaml.safe_load((REPOSITORY / name).read_text())


def test_one_version() -> None:
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == read("CITATION.cff")["version"] == __version__


def test_every_python_of_the_package_is_tested_on_linux() -> None:
    named = re.findall(r"Python :: (3\.\d+)", PROJECT)
    matrix = read(".github/workflows/checks.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == named
    assert f'requires-python = ">={named[0]}"' in PROJECT
    systems = {one["os"].partition("-")[0] for one in matrix["include"]}
    assert systems == {"macos", "windows"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_is_there(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r"\bmake (\w+)", text)) <= RULES
    extras = set(re.findall(r"^(\w+) = \[", PROJECT, re.MULTILINE))
    for asked in re.findall(r'-e "\.\[(.*?)\]"', text):
        assert set(asked.split(",")) <= extras


def test_hooks_are_commands_of_make_lint() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    linted = [line.removeprefix("\t$(bin)/") for line in recipe[1].splitlines()]
    (local,) = read(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].removesuffix(" --fix") for hook in local["hooks"]]
    assert len(hooks) > 2
    for hook in hooks:
        assert any(line.startswith(f"{hook} ") for line in linted), hook


def test_contributing_names_rules_that_are_there_and_the_tests_are_run_as_it_says() -> None:
    said = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^    make (\w+)", said, re.MULTILINE))
    assert {"lint", "test", "docs"} <= named <= RULES
    tests = re.search(r"^\t\$\(bin\)/(pytest\b.*)$", MAKEFILE, re.MULTILINE)
    assert tests is not None
    assert f"python -m {tests[1]}\n" in WORKFLOWS[0].read_text(encoding="utf-8")
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_actionlint_has_nothing_to_say() -> None:
    assert WORKFLOWS
    done = subprocess.run(["actionlint", *WORKFLOWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_docker_has_what_the_wheel_is_made_from() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().split()
    sent = {line[1:] for line in lines if line.startswith("!")}
    shipped = re.search(r"SHIPPED = \((.*?)\)", (REPOSITORY / "setup.py").read_text())
    assert shipped is not None
    needed = {"ptq4sam", "pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt"}
    assert needed | set(re.findall(r'"(\w+)"', shipped[1])) <= sent
    for name in sent:
        assert (REPOSITORY / name).exists(), name
