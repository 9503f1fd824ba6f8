"""What README.md says: its commands, its map, its snippet; and the lists of packages."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import PROGRAM, ROOT, run_python

import a3c_cartpole as a3c

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = PROGRAM.read_text(encoding="utf-8")


def tables_with(heading):
    """The rows of the tables below a heading, as lists of cells."""
    level = re.escape(heading)
    section = re.search(rf"^#+ {level}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]
    return [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]


def exists(name):
    """Whether the file has this class, method, function or constant."""
    found = a3c
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None


@pytest.mark.parametrize("heading", ["Reading article and file side by side", "日本語"])
def test_every_entry_of_the_map_exists(heading):
    cells = [row[1] for row in tables_with(heading) if len(row) >= 2]
    names = [name for cell in cells for name in re.findall(r"`([A-Za-z_]+(?:\.\w+)?)`", cell)]
    names = [name for name in names if name[0].isupper() or name in ("main", "learn")]
    assert {"ParameterServer", "LocalBrain", "Agent", "Environment", "WorkerThread"} <= {
        name.split(".")[0] for name in names}
    assert [name for name in names if not exists(name)] == []


def test_snippet_prints_the_table_of_the_readme():
    part = README.split("## One episode under the microscope")[1]
    snippet = re.search(r"```python\n(.*?)```", part, re.S)[1]
    printed = re.search(r"```text\n(.*?)```", part, re.S)[1]
    done = run_python("-W", "ignore", "-c", snippet, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 13
    words = [line.split() for line in done.stdout.splitlines()]
    expected = [line.split() for line in printed.splitlines()]
    assert words[0] == expected[0]
    for row, wanted in zip(words[1:], expected[1:], strict=True):
        # another processor may round the last digit in another way
        assert [float(x) for x in row] == pytest.approx([float(x) for x in wanted], abs=0.011)


def test_files_that_commands_and_pictures_of_the_readme_name_are_there():
    commands = re.findall(r"(?:-r|python|pytest -q) (\S*(?:\.txt|\.py|tests))", README)
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(commands) >= 4 and len(pictures) >= 4
    for path in commands + pictures:
        assert (ROOT / path).exists(), path


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no awk to read the README")
def test_ci_runs_the_command_that_the_readme_gives():
    command = re.search(r"```sh\n([^`]*?pytest -q tests)\n```", README)[1]
    script = (ROOT / ".ci" / "run").read_text().replace("bash -euo pipefail -c", "echo")
    done = subprocess.run(
        ["bash", "-c", script.replace('"$(dirname "$0")/.."', f'"{ROOT}"')],
        capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"+ {command}", command]


def required(path):
    lines = (ROOT / path).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_packages_that_uv_installs_are_those_of_requirements_txt():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.M | re.S)[1]
    text = "".join(line[2:] for line in block.splitlines(keepends=True))
    assert ast.literal_eval(text.split("dependencies = ")[1]) == required("requirements.txt")
    assert 'requires-python = ">=3.10,<3.14"' in text


def test_every_package_that_the_program_imports_is_required():
    names = {re.match(r"[\w-]+", line)[0] for line in required("requirements.txt")}
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", SOURCE, re.M))
    assert imported - set(sys.stdlib_module_names) <= names
    assert required("tests/requirements.txt")[0] == "-r ../requirements.txt"


def test_constants_are_the_articles():
    expected = dict(
        ENV="CartPole-v0", NUM_STATES=4, NUM_ACTIONS=2, MIN_BATCH=5, LOSS_V=.5, LOSS_ENTROPY=.01,
        LEARNING_RATE=5e-3, RMSPROP_DECAY=.99, GAMMA=.99, N_STEP_RETURN=5, GAMMA_N=.99**5,
        N_WORKERS=8, T_MAX=10, EPS_START=.5, EPS_END=0, EPS_STEPS=1600)
    assert {name: getattr(a3c, name) for name in expected} == expected
    assert a3c.NONE_STATE.tolist() == [0, 0, 0, 0]


def test_ruff_finds_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
