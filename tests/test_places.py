"""The main file where its users sit: notebooks, consoles, a file that is being edited, Ctrl-C."""

import contextlib
import importlib.util
import io
import os
import signal
import sys

import a3c_cartpole as a3c

import keras
import nbclient
import nbformat
import numpy as np
import pytest
from conftest import FOLDERS, PROGRAM, start_python

UNFINISHED = "A3C.unfinished.weights.h5"


def run_main(out, *arguments, program=a3c):
    return program.main(["--no-render", "--out", str(out), *map(str, arguments)])


def run_a_little(out, program=a3c):
    """Run a program in this process for a few episodes."""
    assert run_main(out, "--workers", 2, "--max-episodes", 20, program=program) == 1
    assert {path.name for path in out.iterdir()} == {UNFINISHED, "history.csv"}


def test_file_that_was_edited_after_its_import_learns_as_before_with_any_float_type_of_keras(
        tmp_path):
    copy = tmp_path / "copy.py"
    copy.write_bytes(PROGRAM.read_bytes())
    keras.config.set_floatx("float64")
    spec = importlib.util.spec_from_file_location("copy", copy)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert keras.config.floatx() == "float32"
    lines = PROGRAM.read_text(encoding="utf-8").splitlines(keepends=True)
    copy.write_text("".join(lines[:200] + lines[300:]), encoding="utf-8")
    run_a_little(tmp_path / "out", program)


class Console(io.StringIO):
    """A console like IDLE's, which has neither `reconfigure` nor a file descriptor."""


@pytest.mark.parametrize("stdout", [Console(), None])  # None: closed, or pythonw
def test_program_runs_with_a_stdout_that_cannot_be_reconfigured(tmp_path, monkeypatch, stdout):
    monkeypatch.setattr(sys, "stdout", stdout)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        a3c.run_program(lambda: run_a_little(tmp_path) or 1)
    assert end.value.code == 1
    assert stdout is None or "\nnot learned in " in stdout.getvalue()
    assert signal.getsignal(signal.SIGTERM) is before


def test_reader_that_closes_the_pipe_ends_nothing(tmp_path):
    process = start_python(PROGRAM, "--max-episodes", 60, "--out", "kept", cwd=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1
    assert len((tmp_path / "kept" / "history.csv").read_text().splitlines()) == 61
    assert (tmp_path / "kept" / UNFINISHED).is_file()


def test_terminal_that_cannot_move_its_cursor_gets_a_line_for_each_episode(tmp_path):
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    ours, theirs = pty.openpty()
    process = start_python(PROGRAM, "--max-episodes", 15, cwd=tmp_path, stdout=theirs, TERM="dumb")
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other side has ended
        while part := os.read(ours, 4096):
            printed += part
    os.close(ours)
    assert process.communicate(timeout=60)[1] == ""
    lines = printed.decode().splitlines()
    assert len(lines) == 17 and all("  episode " in line for line in lines[:15])
    assert lines[15].startswith("not learned in ")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="here nobody can choose a core")
@pytest.mark.parametrize("function", ["sched_getaffinity", "sched_setaffinity"])
def test_threads_learn_where_a_core_may_not_be_chosen(tmp_path, monkeypatch, function):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, function, refuse)
    run_a_little(tmp_path)


def test_render_makes_a_window_draws_each_step_and_closes_it(tmp_path, monkeypatch):
    import pygame

    def flip():
        shown.append(pygame.surfarray.array3d(pygame.display.get_surface()))

    shown = []
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(pygame.display, "flip", flip)
    a3c.ParameterServer(seed=1).model.save_weights(tmp_path / "some.weights.h5")
    arguments = "--play", tmp_path / "some.weights.h5", "--test-episodes", 1, "--seed", 1
    assert run_main(tmp_path, *arguments, "--render") == 0
    assert len(shown) > 8
    assert all(np.ptp(picture) == 255 for picture in shown)
    assert (shown[0] != shown[-1]).any()
    assert pygame.display.get_surface() is None


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


def test_ctrl_c_while_results_are_saved_changes_nothing(tmp_path, monkeypatch):
    def press_and_keep(*results):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        keep_results(*results)

    keep_results = a3c.keep_results
    monkeypatch.setattr(a3c, "keep_results", press_and_keep)
    before = handlers()
    try:
        run_a_little(tmp_path)
    except KeyboardInterrupt:
        pytest.fail("it was interrupted")
    assert handlers() == before


NOTEBOOK = [
    f"""import os, signal, sys, threading
sys.path.insert(0, {FOLDERS[0]!r})
def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
before = handlers()""",
    f"""%run "{PROGRAM}" --no-render --max-episodes 12 --out run""",
    """import a3c_cartpole
status = a3c_cartpole.main(["--no-render", "--max-episodes", "12", "--out", "called"])
assert status == 1 and handlers() == before""",
    """threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()    # the stop button
try:
    a3c_cartpole.main(["--no-render", "--env", "CartPole-v1", "--out", "stopped"])
except KeyboardInterrupt:
    assert handlers() == before"""]


def test_notebook_runs_the_program_shows_lines_and_keeps_its_own_signals(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=60, allow_errors=True,
                            resources={"metadata": {"path": str(tmp_path)}}).execute()
    errors = [output["evalue"] for cell in cells for output in cell.outputs
              if output.output_type == "error"]
    assert errors == ["1"]  # the exit status of %run
    for cell, folder in zip(cells[1:], ["run", "called", "stopped"]):
        printed = "".join(output.get("text", "") for output in cell.outputs)
        assert "  episode 1  steps " in printed and "\nnot learned in " in printed
        assert (tmp_path / folder / UNFINISHED).is_file()
