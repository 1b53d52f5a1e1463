"""The Makefile, by a stand-in for Python that writes down what it is asked for; and what the habits' files agree on."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
STAND_IN = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in
    -c*) exit {old} ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/ruff ;;
    *"pip install"*) exit {broken} ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """(words of the command line, old=, broken=) -> (what Python was asked for, line by line, exit code, output)."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    log = tmp_path / "log"

    def run(*words, old=0, broken=0):
        python = tmp_path / "python"
        python.write_text(STAND_IN.format(log=log, old=old, broken=broken))
        python.chmod(0o755)
        if (tmp_path / ".venv").exists():
            shutil.copy(python, tmp_path / ".venv/bin/python")
        log.write_text("")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", f"PYTHON={python}", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return log.read_text().splitlines(), done.returncode, done.stdout

    return run


def installed(asked):
    """Return the pip commands among what Python was asked for."""
    return [line for line in asked if "pip install" in line]


def test_demo_installs_the_constraints_once(make, tmp_path):
    asked, code, _ = make("demo")
    (pip,) = installed(asked)
    assert code == 0
    assert pip.endswith("-c constraints.txt -r requirements.txt")
    assert asked[-1] == "TrainISICLE.py --resume auto"
    assert installed(make("demo")[0]) == []

    later = (tmp_path / ".venv/.installed").stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert len(installed(make("demo")[0])) == 1


def test_test_installs_both_and_runs_ruff_and_pytest(make):
    asked, code, _ = make("test")
    assert code == 0
    assert [line.split()[-1] for line in installed(asked)] == ["requirements.txt", "requirements-dev.txt"]
    assert all("-c constraints.txt" in line for line in installed(asked))
    assert asked[-3:] == ["check .", "format --check .", "-m pytest -n 2 --dist worksteal"]
    assert installed(make("test")[0]) == []


def test_latest_installs_the_newest_every_time(make):
    make("test")
    for _ in range(2):
        asked = installed(make("test", "LATEST=1")[0])
        assert [line.split()[-1] for line in asked] == ["requirements.txt", "requirements-dev.txt"]
        assert all("--upgrade --upgrade-strategy eager" in line and "constraints" not in line for line in asked)
    asked = installed(make("test")[0])
    assert [line.split()[-1] for line in asked] == ["requirements.txt", "requirements-dev.txt"]
    assert all("-c constraints.txt" in line for line in asked)


def test_latest_demo_leaves_no_mixture_to_the_tests(make):
    make("test")
    make("demo", "LATEST=1")
    assert len(installed(make("test")[0])) == 2


def test_pip_flags(make):
    asked, _, _ = make("test", "PIP_FLAGS=--extra-index-url https://download.pytorch.org/whl/cpu")
    assert len(installed(asked)) == 2
    assert all("--extra-index-url https://download.pytorch.org/whl/cpu" in line for line in installed(asked))


def test_a_failed_installation_is_repeated(make):
    asked, code, out = make("demo", broken=1)
    assert code == 2
    assert "the installation failed" in out
    assert "TrainISICLE.py --resume auto" not in asked
    assert len(installed(make("demo")[0])) == 1


def test_an_old_python_is_refused(make, tmp_path):
    _, code, out = make("demo", old=1)
    assert code == 2
    assert "older than Python 3.11" in out
    assert not (tmp_path / ".venv").exists()


def test_every_requirement_is_pinned_to_a_version_it_allows():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower()] = version
    lines = [*(ROOT / "requirements.txt").open(), *(ROOT / "requirements-dev.txt").open()]
    requirements = [Requirement(line.strip()) for line in lines if line[0] not in "#-"]
    assert len(requirements) > 10
    for requirement in requirements:
        assert pins[requirement.name.lower()] in requirement.specifier, requirement
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]
    for name in ("torch", "torchvision"):  # the wheels for CPUs have a local version, which the pin must take
        assert f"{pins[name]}+cpu" in Requirement(f"{name}=={pins[name]}").specifier


def test_the_oldest_python_and_the_ruff_are_the_same_everywhere():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    oldest = re.findall(r'"(3\.\d+)"', workflow)[0]
    assert config["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"(3, {oldest.split('.')[1]})" in (ROOT / "Makefile").read_text()
    ruff = re.search(r"^ruff==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"rev: v{ruff}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
