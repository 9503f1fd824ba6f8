"""What only a process can show: signals, a closed pipe, a terminal. Nothing learned is lost."""

import csv
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import PROGRAM, ROOT, frames_of, start_python

import a3c_cartpole as a3c

UNFINISHED = "A3C.unfinished.weights.h5"


def patched(patch):
    """Python's arguments to run the program after some lines that slow it down or break it."""
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import a3c_cartpole as a3c"
    return "-c", f"{code}\n{patch}\na3c.run_program(lambda: a3c.main(sys.argv[1:]))"


def wait_for_line(process, beginning):
    """Read what the program prints until a line begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"no line begins with {beginning!r}: {process.stderr.read()}")


def assert_kept(folder, episodes):
    """The history of so many episodes, both pictures, and weights that can be loaded."""
    with open(folder / "history.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == episodes
    assert {"learning_curve.png", "three_as.png"} <= {path.name for path in folder.iterdir()}
    model = a3c.ParameterServer().model
    model.load_weights(folder / UNFINISHED)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@pytest.mark.parametrize("number, status, arguments", [
    (signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--seed", "1"])])
def test_signal_while_learning_ends_the_program_and_keeps_what_was_reached(
        tmp_path, number, status, arguments):
    process = start_python(PROGRAM, "--env", "CartPole-v1", *arguments, cwd=tmp_path)
    wait_for_line(process, "local_thread1  episode 5")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (status, "")
    (line,) = [line for line in out.splitlines() if line.startswith("not learned in ")]
    assert_kept(tmp_path / "movie" / "A3C", int(re.search(r"(\d+) episodes", line)[1]))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_the_test_closes_the_film_of_the_episode_that_was_cut(
        tmp_path, learned, number, status):
    patch = """
act, steps = a3c.Agent.act, []
def slow(self, s, greedy=False):
    steps.append(1)
    if len(steps) == 50:
        print("now", flush=True)
        time.sleep(60)
    return act(self, s, greedy)
a3c.Agent.act = slow"""
    process = start_python(
        *patched(patch), "--play", learned[1] / "A3C.weights.h5", cwd=tmp_path)
    wait_for_line(process, "now")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (status, "")
    frames = frames_of(tmp_path / "movie" / "A3C" / "A3C-episode-0.mp4")
    assert 45 <= len(frames) <= 51  # of 49 steps and the first picture; moviepy rounds


def test_reader_who_goes_away_costs_the_rest_of_the_printing_and_nothing_else(tmp_path):
    process = start_python(PROGRAM, "--max-episodes", "60", cwd=tmp_path)
    wait_for_line(process, "local_thread")
    process.stdout.close()  # as `| head` does
    assert process.wait(60) == 1 and process.stderr.read() == ""
    assert_kept(tmp_path / "movie" / "A3C", 60)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no shell that closes stdout so")
def test_closed_stdout_costs_nothing(tmp_path):
    command = f"{sys.executable} {PROGRAM} --max-episodes 20 >&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"")
    assert_kept(tmp_path / "movie" / "A3C", 20)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_terminal_gets_the_table_in_place_of_the_lines(tmp_path):
    import pty

    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen([sys.executable, PROGRAM, "--max-episodes", "60"], cwd=tmp_path,
                               stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            piece = os.read(parent, 4096)
        except OSError:  # the program has ended
            break
        shown += piece
    os.close(parent)
    assert process.wait(60) == 1
    shown = shown.decode()
    assert "mean of last 10" in shown and "━" in shown and " 60 episodes" in shown
    assert "local_thread1  episode" not in shown
