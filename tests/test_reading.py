"""What the README says of the file is true, and the file can be used as it stands."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import PROGRAM, ROOT

import a3c_cartpole as a3c

MARKER = "# -- all that is not A3C"
ARTICLE = ["ParameterServer", "LocalBrain", "Agent", "Environment", "WorkerThread"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = PROGRAM.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def section(heading):
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def named(text):
    """What stands in backticks and looks like a class, a method, or a constant."""
    return [name.removesuffix("()") for name in re.findall(r"`([A-Za-z_.]+(?:\(\))?)`", text)]


def exists(name):
    """Whether the file has this module attribute, or attribute of one of its classes."""
    owner, _, member = name.partition(".")
    return hasattr(a3c, owner) and (not member or hasattr(getattr(a3c, owner), member))


@pytest.mark.parametrize("heading", ["From the article to the file", "日本語"])
def test_every_entry_of_the_map_exists(heading):
    rows = [line for line in section(heading).splitlines() if line.startswith("|")][2:]
    names = [name for row in rows for name in named(row.split("|")[2])]
    assert len(names) >= 9
    assert [name for name in names if name != "a3c_cartpole.py" and not exists(name)] == []
    assert {*ARTICLE} <= {name.split(".")[0] for name in names}


def test_table_of_differences_names_what_exists_and_not_what_was_renamed():
    rows = [line.split("|") for line in section("Where it differs from the article").splitlines()]
    rows = [row for row in rows if len(row) > 4][2:]
    assert len(rows) >= 12
    words = {word for node in ast.walk(TREE) for word in (
        getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None))}
    for name in {name for row in rows for name in named(row[2])}:
        assert name.split(".")[-1] in words or exists(name), name
    renamed = "Worker_thread WorkerThread", "Tmax T_MAX", "RMSPropDecaly RMSPROP_DECAY"
    for old, new in map(str.split, renamed):
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
    names = [n.name for n in TREE.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert names[:6] == [*ARTICLE, "main"]


def test_public_classes_methods_and_functions_have_docstrings():
    assert ast.get_docstring(TREE)
    classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
    members = [node for owner in [TREE, *classes] for node in owner.body]
    public = [node for node in members
              if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert len(public) > 30
    assert [node.name for node in [*classes, *public] if not ast.get_docstring(node)] == []


def test_no_function_is_longer_than_40_lines():
    assert [f.name for f in FUNCTIONS if f.end_lineno - f.lineno + 1 > 40] == []


def test_nothing_private_of_another_package_is_used():
    attributes = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    own = {f.name for f in FUNCTIONS} | {*a3c.Episode._fields, "_fields"}
    own |= {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)}
    private = {name for name in attributes if name.startswith("_") and not name.endswith("__")}
    assert private - own == set()
    assert attributes & {"call_flat", "inference_fn", "experimental", "captured_inputs"} == set()
    imported = [node for node in ast.walk(TREE) if isinstance(node, ast.Import | ast.ImportFrom)]
    for text in map(ast.unparse, imported):
        assert "tensorflow.python" not in text and "keras.src" not in text and "._" not in text


def test_second_half_knows_nothing_of_the_first():
    (marker,) = [i for i, line in enumerate(SOURCE.splitlines(), 1) if line.startswith(MARKER)]
    first = {name for node in TREE.body if node.lineno < marker for name in [
        getattr(node, "name", None), *(getattr(t, "id", None) for t in getattr(node, "targets", []))
    ]} - {None, "main"}
    assert {*ARTICLE, "T_MAX", "learn"} <= first
    nodes = [node for node in ast.walk(TREE) if getattr(node, "lineno", 0) > marker]
    assert len(nodes) > 1000
    assert {node.id for node in nodes if isinstance(node, ast.Name)} & first == set()
    text = SOURCE.split(MARKER)[1]
    assert not re.search(rf"\b({'|'.join(ARTICLE)}|parameter_server)\b", text)


def test_setup_commands_of_the_readme_install_requirements_and_run_what_exists():
    files = re.findall(r"(?:-r|python|pytest -q) (\S*(?:\.txt|\.py|tests))", README)
    assert len(files) >= 5
    for file in files:
        assert (ROOT / file).exists(), file
    assert section("Run it").count("requirements.txt") == 2
    assert "tests/requirements.txt" in section("Test it")


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


def required(path):
    lines = (ROOT / path).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_inline_metadata_lists_what_requirements_lists():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.M | re.S)[1]
    text = "".join(line[2:] for line in block.splitlines(keepends=True))
    assert ast.literal_eval(text.split("dependencies = ")[1]) == required("requirements.txt")
    assert 'requires-python = ">=3.10,<3.14"' in text


def test_every_package_that_is_imported_is_required_and_those_of_the_tests_apart():
    names = [re.match(r"[\w-]+", line)[0] for line in required("requirements.txt")]
    imported = {*re.findall(r"^ *(?:import|from) (\w+)", SOURCE, re.M)}
    assert imported - {*sys.stdlib_module_names} <= {*names}
    runs, *tests = required("tests/requirements.txt")
    assert runs == "-r ../requirements.txt"
    tests = {re.match(r"[\w-]+", line)[0] for line in tests}
    assert {"pytest", "ruff"} <= tests and not tests & {*names}


def test_ruff_finds_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_gif_is_there_animated_and_small():
    path = ROOT / "movie" / "A3C.gif"
    from PIL import Image

    assert path.stat().st_size < 1_000_000 and "movie/A3C.gif" in README.split("##")[0]
    with Image.open(path) as gif:
        assert gif.n_frames > 50 and gif.width >= 200
