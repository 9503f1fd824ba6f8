"""What the README says of the file is true, and the file can be used as it stands."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import PROGRAM, ROOT

import a3c_cartpole as a3c

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = PROGRAM.read_text(encoding="utf-8")


def section(heading):
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def named(text):
    """What stands in backticks and looks like a class, a method, or a constant."""
    return [name.removesuffix("()") for name in re.findall(r"`([A-Za-z_.]+(?:\(\))?)`", text)]


def exists(name):
    """Whether the file has this module attribute, or attribute of one of its classes."""
    owner, _, member = name.partition(".")
    if not hasattr(a3c, owner):
        return False
    return not member or hasattr(getattr(a3c, owner), member)


@pytest.mark.parametrize("heading", ["From the article to the file", "日本語"])
def test_every_entry_of_the_map_exists(heading):
    rows = [line for line in section(heading).splitlines() if line.startswith("|")][2:]
    names = [name for row in rows for name in named(row.split("|")[2])]
    assert len(names) >= 9
    assert [name for name in names if name != "a3c_cartpole.py" and not exists(name)] == []


def test_every_class_of_the_article_is_in_the_map():
    for name in "ParameterServer", "LocalBrain", "Agent", "Environment", "WorkerThread":
        assert f"`{name}." in section("From the article to the file")


def test_table_of_differences_names_what_exists_and_not_what_was_renamed():
    rows = [line.split("|") for line in section("Where it differs from the article").splitlines()]
    rows = [row for row in rows if len(row) > 4][2:]
    assert len(rows) >= 12
    code = {name for row in rows for name in named(row[2])}
    for name in code:
        assert re.search(rf"\b{name.split('.')[-1]}\b", SOURCE), name
    for old, new in (
        ("Worker_thread", "WorkerThread"),
        ("Tmax", "T_MAX"),
        ("RMSPropDecaly", "RMSPROP_DECAY"),
    ):
        assert any(old in row[1] and new in row[2] for row in rows)
        assert hasattr(a3c, new) and not hasattr(a3c, old)


def test_constants_are_the_articles():
    expected = dict(
        ENV="CartPole-v0", NUM_STATES=4, NUM_ACTIONS=2, MIN_BATCH=5, LOSS_V=.5, LOSS_ENTROPY=.01,
        LEARNING_RATE=5e-3, RMSPROP_DECAY=.99, GAMMA=.99, N_STEP_RETURN=5, GAMMA_N=.99**5,
        N_WORKERS=8, T_MAX=10, EPS_START=.5, EPS_END=0, EPS_STEPS=1600,
    )  # fmt: skip
    assert {name: getattr(a3c, name) for name in expected} == expected
    assert a3c.NONE_STATE.tolist() == [0, 0, 0, 0]


def test_classes_stand_in_the_articles_order():
    tree = ast.parse(SOURCE)
    names = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    classes = ["ParameterServer", "LocalBrain", "Agent", "Environment", "WorkerThread", "main"]
    assert names[: len(classes)] == classes


def test_public_classes_and_methods_have_docstrings():
    tree = ast.parse(SOURCE)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), node.name
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    assert ast.get_docstring(method), f"{node.name}.{method.name}"


def test_setup_commands_of_the_readme_install_requirements_and_run_what_exists():
    blocks = re.findall(r"```(?:sh|bat)\n(.*?)```", README, re.S)
    assert len(blocks) >= 5
    for file in re.findall(r"(?:-r|python|pytest -q) (\S*(?:\.txt|\.py|tests))", "".join(blocks)):
        assert (ROOT / file).exists(), file
    assert section("Run it").count("requirements.txt") == 2


def test_ci_runs_the_command_that_the_readme_gives():
    command = re.search(r"```sh\n(.*?)\n```", section("Test it"))[1]
    if sys.platform == "win32":
        pytest.skip("Windows has no awk to read the README as CI does")
    script = (ROOT / ".ci" / "run").read_text().replace("bash -euo pipefail -c", "echo")
    done = subprocess.run(
        ["bash", "-c", script.replace('"$(dirname "$0")/.."', f'"{ROOT}"')],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"+ {command}", command]


def test_inline_metadata_lists_what_requirements_lists_for_a_run():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.M | re.S)[1]
    text = "".join(line[2:] for line in block.splitlines(keepends=True))
    inline = ast.literal_eval(text.split("dependencies = ")[1])
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    for tests_only in "pytest", "ruff":
        required = [line for line in required if not line.startswith(tests_only)]
    assert inline == required and len(inline) >= 7
    assert 'requires-python = ">=3.10,<3.14"' in text


def test_ruff_finds_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_file_raises_no_syntax_or_deprecation_warning_of_its_own():
    code = (
        "import sys, warnings; warnings.simplefilter('error', SyntaxWarning);"
        "source = open(sys.argv[1], encoding='utf-8').read();"
        "compile(source, sys.argv[1], 'exec')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code, str(PROGRAM)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_gif_is_there_animated_and_small():
    path = ROOT / "movie" / "A3C.gif"
    from PIL import Image

    assert path.stat().st_size < 1_000_000 and "movie/A3C.gif" in README.split("##")[0]
    with Image.open(path) as gif:
        assert gif.n_frames > 50 and gif.width >= 200
