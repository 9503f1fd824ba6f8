"""What the READMEs say: their commands, files and maps exist, and packages are listed once."""

import ast
import re

import a3c_cartpole as a3c

import pytest
from conftest import PROGRAM, ROOT

READMES = ["README.md", "README.ja.md", "companions/README.md"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("readme", READMES)
def test_files_that_commands_and_links_name_are_there(readme):
    text = read(readme)
    linked = [(ROOT / readme).parent / path for path in re.findall(r"\]\(([\w./]+)", text)
              if not path.startswith("http")]
    command = r"(?:-r|python|%run|uv run) ([\w./]+\.(?:txt|py))"
    named = [ROOT / path for path in re.findall(command, text)
             if "NAME" not in path]
    assert linked and named
    assert [path for path in linked + named if not path.exists()] == []


@pytest.mark.parametrize("readme", READMES[:2])
def test_map_names_what_the_file_has(readme):
    names = re.findall(r"`((?:WorkerThread|Environment|Agent|ParameterServer|LocalBrain)\.\w+)`",
                       read(readme))
    assert len(names) > 10
    for name in names:
        class_name, method = name.split(".")
        assert hasattr(getattr(a3c, class_name), method), name


def required(path):
    return [line for line in read(path).splitlines() if line and not line.startswith("#")]


def test_packages_that_uv_installs_are_those_of_requirements_txt():
    block = re.search(r"^# /// script\n(.*?)^# ///$", read(PROGRAM.name), re.M | re.S)[1]
    text = "".join(line[2:] for line in block.splitlines(keepends=True))
    assert ast.literal_eval(text.split("dependencies = ")[1]) == required("requirements.txt")


def test_constants_are_the_articles():
    expected = dict(
        ENV="CartPole-v0", NUM_STATES=4, NUM_ACTIONS=2, MIN_BATCH=5, LOSS_V=.5, LOSS_ENTROPY=.01,
        LEARNING_RATE=5e-3, RMSPROP_DECAY=.99, GAMMA=.99, N_STEP_RETURN=5, GAMMA_N=.99**5,
        N_WORKERS=8, T_MAX=10, EPS_START=.5, EPS_END=0, EPS_STEPS=1600)
    assert {name: getattr(a3c, name) for name in expected} == expected
