"""Faults injected for real: nothing is lost, nothing hangs, nothing is silent."""

import csv
import os
import re
import shutil
import signal
import sys
import threading
import time
from unittest import mock

import keras
import numpy as np
import pytest
from conftest import MOVIE, PROGRAM, frames_of, patched, run_python, start_python

import a3c_cartpole as a3c

UNFINISHED = "A3C.unfinished.weights.h5"
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def read_until(process, beginning):
    """Read the program's lines until one begins so; return them all."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith(beginning):
            return lines
    raise AssertionError(f"no line begins with {beginning!r}: {lines[-3:]} {process.stderr.read()}")


def interrupt(process, number):
    """Send a signal; return the exit status, what was still printed, and the errors."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def interrupt_at_mark(folder, patch, number, *arguments):
    """Start the program with a patch, and send the signal when that has made the file `mark`."""
    process = start_python(*patched(patch), *arguments, cwd=folder)
    while not (folder / "mark").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return interrupt(process, number)


def assert_kept_unfinished(folder, episodes):
    """The history of so many episodes, the curve, and weights that can be loaded and are finite."""
    with open(folder / "history.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == episodes
    assert (folder / "learning_curve.png").stat().st_size > 1000
    assert [path.name for path in folder.glob("*.h5")] == [UNFINISHED]
    model = a3c.ParameterServer().model
    model.load_weights(folder / UNFINISHED)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def episodes_said(stdout, cause):
    """The episodes in the one line that says how far a run came that was cut short."""
    (line,) = [line for line in stdout.splitlines() if line.startswith("not learned")]
    found = rf"not learned, {cause} after \d+\.\d s: \d+ steps, (\d+) episodes, 8 workers, \d+ st.*"
    return int(re.fullmatch(found, line)[1])


FAILING_ENVIRONMENT = """
class Failing(a3c.gym.Wrapper):
    count = 0
    def step(self, action):
        Failing.count += 1
        if Failing.count >= 3000:
            raise RuntimeError("the pole broke")
        return super().step(action)
make = a3c.gym.make
a3c.gym.make = lambda *a, **k: Failing(make(*a, **k))
"""
FAILING_AGENT = """
act = a3c.Agent.act
def failing(self, s, **k):
    if threading.current_thread().name == "local_thread1" and self.parameter_server.frames >= {}:
        while threading.active_count() < 9:
            time.sleep(.01)
        time.sleep(.3)  # all others now wait for their turn
        raise RuntimeError("the pole broke")
    return act(self, s, **k)
a3c.Agent.act = failing
"""
FAILING_BRAIN = """
def failing(self, *a):
    raise RuntimeError("the pole broke")
a3c.LocalBrain.update_parameter_server = failing
"""


@pytest.mark.parametrize("patch, arguments", [
    (FAILING_ENVIRONMENT, []), (FAILING_BRAIN, []),
    (FAILING_AGENT.format(5), ["--seed", 1]), (FAILING_AGENT.format(2005), ["--seed", 1]),
], ids=["environment", "brain", "first_turn", "later_turn"])
def test_failing_worker_ends_all_threads_and_is_named_with_its_traceback_once(
        tmp_path, patch, arguments):
    run = run_python(*patched(patch), *arguments, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.count("Traceback") == run.stderr.count("RuntimeError: the pole broke") == 1
    name = re.search(r"Exception in thread (local_thread\d)", run.stderr)[1]
    assert_kept_unfinished(tmp_path / MOVIE, episodes_said(run.stdout, f"{name} failed"))
    assert not [line for line in run.stdout.splitlines() if line.startswith("test")]
    assert (tmp_path / "alive").read_text() == "MainThread"


def test_nan_is_a_failure_that_names_its_step_and_leaves_the_weights_finite(tmp_path):
    patch = """
push = a3c.LocalBrain.train_push
def poisoned(self, s, a, r, s_):
    push(self, s, a, float("nan") if self.parameter_server.frames > 1000 else r, s_)
a3c.LocalBrain.train_push = poisoned"""
    run = run_python(*patched(patch), cwd=tmp_path)
    assert run.returncode == 1 and run.stderr.count("Traceback") == 1
    step = int(re.search(r"FloatingPointError: .*not finite.* step (\d+)", run.stderr)[1])
    assert 1000 < step < 2000
    assert_kept_unfinished(tmp_path / MOVIE, episodes_said(run.stdout, r"local_thread\d failed"))


@pytest.mark.parametrize("seed", [["--seed", 1], []])
@pytest.mark.parametrize("number, status", SIGNALS)
def test_signal_while_learning_ends_all_threads_and_keeps_what_was_reached(
        tmp_path, number, status, seed):
    process = start_python(*patched(""), *seed, cwd=tmp_path)
    read_until(process, "local_thread")
    ended, out, err = interrupt(process, number)
    assert (ended, err) == (status, "")
    assert_kept_unfinished(tmp_path / MOVIE, episodes_said(out, "interrupted"))
    assert (tmp_path / "alive").read_text() == "MainThread"


@pytest.mark.parametrize("number, status", SIGNALS)
def test_signal_before_the_learning_ends_the_program(tmp_path, number, status):
    patch = """
def slow(*a, **k):
    open("mark", "w").close()
    time.sleep(60)
a3c.gym.make = slow"""
    ended = interrupt_at_mark(tmp_path, patch, number)
    assert ended == (status, "", "")
    assert list((tmp_path / MOVIE).iterdir()) == []


def test_threads_that_hang_hold_up_the_end_together_and_not_one_by_one(tmp_path):
    patch = """
barrier = threading.Barrier(8, lambda: open("mark", "w").close())
def hanging(self, s, **k):
    barrier.wait()
    time.sleep(60)
a3c.Agent.act = hanging"""
    ended, out, err = interrupt_at_mark(tmp_path, patch, signal.SIGINT)
    assert (ended, err) == (130, "")
    assert float(re.search(r"after (\S+) s", out)[1]) < 14  # one by one they would take 16
    assert len((tmp_path / "alive").read_text().split()) == 9  # they did hang
    assert episodes_said(out, "interrupted") == 0
    assert_kept_unfinished(tmp_path / MOVIE, 0)


@pytest.mark.parametrize("number, status", SIGNALS)
def test_signal_during_the_test_keeps_the_film_of_the_cut_episode(
        tmp_path, learned, number, status):
    patch = """
act, steps = a3c.Agent.act, []
def slow(self, s, **k):
    steps.append(1)
    if len(steps) == 230:
        open("mark", "w").close()
        time.sleep(60)
    return act(self, s, **k)
a3c.Agent.act = slow"""
    weights = learned[1] / "A3C.weights.h5"
    ended, out, err = interrupt_at_mark(tmp_path, patch, number, "--play", weights)
    assert (ended, err) == (status, "")
    (steps,) = [int(n) for n in re.findall(r"test_thread  episode \d+  steps (\d+)", out)]
    assert f"test: mean of 1 episodes {steps}.0 steps" in out
    for film, frames in ("A3C-episode-0.mp4", steps + 1), ("A3C-episode-1.mp4", 230 - steps):
        assert len(frames_of(tmp_path / MOVIE / film)) in (frames - 1, frames)  # moviepy rounds


def test_ctrl_c_while_files_are_written_waits_until_all_are_there(tmp_path):
    patch = """
import os, signal
save = a3c.save_weights
def interrupted(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    save(*arguments)
a3c.save_weights = interrupted"""
    run = run_python(*patched(patch), "--max-episodes", 2, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (130, "")
    assert_kept_unfinished(tmp_path / MOVIE, 2)


def test_winner_has_two_seconds_to_hand_over_its_weights(tmp_path):
    patch = """
push = a3c.LocalBrain.push_parameter_server
a3c.LocalBrain.push_parameter_server = lambda self: (time.sleep(1), push(self))"""
    run = run_python(*patched(patch), "--test-episodes", 1, cwd=tmp_path)
    assert run.returncode == 0 and "\nlearned in" in run.stdout, run.stdout[-300:]


def test_failing_test_costs_one_line_after_weights_history_and_curve_are_on_disk(tmp_path):
    patch = """
def broken(*a, **k):
    print("there:", *sorted(path.name for path in a3c.Path("movie/A3C").iterdir()))
    raise OSError("no film\\n today")
a3c.gym.wrappers.RecordVideo = broken"""
    run = run_python(*patched(patch), "--workers", 1, "--seed", 1, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (1, "test lost: OSError: no film today\n")
    (there,) = [line.split() for line in run.stdout.splitlines() if line.startswith("there:")]
    products = {"there:", "A3C.weights.h5", "history.csv", "learning_curve.png"}
    assert products <= set(there) <= products | {"A3C.png"}
    assert re.search(r"^learned in .* 1 workers", run.stdout, re.M)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_full_disk_costs_a_line_for_each_file_and_leaves_the_earlier_weights_whole(tmp_path):
    folder = tmp_path / MOVIE
    folder.mkdir(parents=True)
    (folder / UNFINISHED).write_text("earlier weights")
    patch = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
def full(self, path, **k):  # for HDF5 itself, with no space left, may crash at the end
    a3c.Path(path).write_bytes(bytes(3000))
a3c.keras.Model.save_weights = full"""
    run = run_python(*patched(patch), "--seed", 1, "--max-episodes", 100, cwd=tmp_path)
    assert run.returncode == 1 and "not learned within 100 episodes" in run.stdout
    lost = [line.split(" lost: ")[0] for line in run.stderr.splitlines()]
    assert lost[:3] == ["weights", "history.csv", "learning_curve.png"]
    assert lost[3:] in ([], ["A3C.png"])  # without Graphviz there is no picture to lose
    assert (folder / UNFINISHED).read_text() == "earlier weights"


NO_FFMPEG = {"IMAGEIO_FFMPEG_EXE": "/no/ffmpeg", "PATH": "/no"}
FULL_DISK = """
from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter
def full(self, frame):
    raise OSError(28, "No space left on device")
FFMPEG_VideoWriter.write_frame = full
"""


@pytest.mark.parametrize("patch, arguments, environment, cause", [
    (FULL_DISK, [], {}, "No space left on device"),
    ("", [], NO_FFMPEG, "ffmpeg"),
    ("", ["--render"], {"SDL_VIDEODRIVER": "no-such"}, "no-such"),
])
def test_failing_film_or_window_costs_the_rest_of_the_test_and_one_clear_line(
        tmp_path, given_up, patch, arguments, environment, cause):
    play = "--play", given_up[1] / UNFINISHED, "--test-episodes", 3
    run = run_python(*patched(patch), *play, *arguments, cwd=tmp_path, **environment)
    assert run.returncode == 1
    (said,) = run.stderr.splitlines()
    assert said.startswith("test lost: ") and cause in said and "Traceback" not in said
    assert run.stdout.count("test_thread  episode") < 2


@pytest.mark.parametrize("option, driver", [("--render", "dummy"), ("--no-render", "no-such")])
def test_window_that_can_be_drawn_or_is_not_wanted_leaves_the_film(
        tmp_path, given_up, option, driver):
    play = "--play", given_up[1] / UNFINISHED, "--test-episodes", 1
    run = run_python(PROGRAM, *play, option, cwd=tmp_path, SDL_VIDEODRIVER=driver)
    assert (run.returncode, run.stderr) == (0, "")
    steps = int(re.search(r"test: mean of 1 episodes (\d+)", run.stdout)[1])
    assert len(frames_of(tmp_path / MOVIE / "A3C-episode-0.mp4")) in (steps, steps + 1)


@pytest.mark.skipif(not shutil.which("xvfb-run"), reason="no xvfb-run to give a virtual screen")
def test_window_opens_by_itself_where_there_is_an_x_screen(tmp_path, given_up):
    patch = """
show = a3c.gym.wrappers.HumanRendering._render_frame
def looking(self):
    show(self)
    import pygame
    print("driver:", pygame.display.get_driver())
a3c.gym.wrappers.HumanRendering._render_frame = looking"""
    play = "--play", given_up[1] / UNFINISHED, "--test-episodes", 1
    screen = "-c", "import os, sys; os.execvp('xvfb-run', sys.argv)", "-a", sys.executable
    run = run_python(*screen, *patched(patch), *play, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "test: mean of 1 episodes" in run.stdout and "driver: x11" in run.stdout


def test_reader_who_goes_away_does_not_cost_the_run(tmp_path):
    process = start_python(PROGRAM, "--workers", 1, "--seed", 1, "--test-episodes", 1, cwd=tmp_path)
    read_until(process, "local_thread1  episode 3 ")
    process.stdout.close()
    assert process.wait(90) == 0 and process.stderr.read() == ""
    assert (tmp_path / MOVIE / "A3C.weights.h5").exists()
    assert (tmp_path / MOVIE / "A3C-episode-0.mp4").exists()


def assert_refused(status, out, err, *parts):
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert all(part in line for part in parts), line


@pytest.fixture
def assert_main_refuses(tmp_path, monkeypatch, capsys, signals):
    """A function that calls `main` in this process, which must exit with one line and status 2."""

    def call(arguments, *parts):
        monkeypatch.chdir(tmp_path)
        threads = threading.active_count()
        with mock.patch.dict(os.environ), pytest.raises(SystemExit) as end:
            a3c.main([*map(str, arguments)])
        assert_refused(end.value.code, *capsys.readouterr(), *parts)
        assert threading.active_count() == threads

    return call


@pytest.mark.filterwarnings("ignore:.*__array__")
@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "text", "folder"])
def test_play_refuses_what_is_not_its_weights(tmp_path, learned, assert_main_refuses, kind):
    path = tmp_path / "bad.weights.h5"
    whole = (learned[1] / "A3C.weights.h5").read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "foreign":
        keras.Sequential([keras.Input((7,)), keras.layers.Dense(3)]).save_weights(path)
    elif kind == "text":
        path.write_text("no weights at all")
    elif kind == "folder":
        path.mkdir()
    assert_main_refuses(["--play", path], "--play", str(path), "A3C.weights.h5")
    assert list((tmp_path / MOVIE).iterdir()) == []


@pytest.mark.parametrize("arguments, right", [
    ("--env Acrobot-v1", "CartPole-v1"), ("--env NoSuch-v9", "CartPole-v0"),
    ("--workers 0", "whole number from 1"), ("--workers 2.5", "whole number from 1"),
    ("--workers -1", "whole number from 1"), ("--workers", "expected one argument"),
    ("--seed -1", "whole number from 0"), ("--seed x", "whole number from 0"),
    ("--seed 4294967296", "4294967295"), ("--max-episodes 0", "whole number from 1"),
    ("--test-episodes many", "whole number from 0"), ("--no-such 3", "unrecognized"),
])
def test_bad_argument_is_refused_in_one_line_that_names_it_and_says_what_would_be_right(
        tmp_path, assert_main_refuses, arguments, right):
    assert_main_refuses(arguments.split(), *arguments.split(), right)
    assert not (tmp_path / "movie").exists()


def test_seed_that_no_library_takes_ends_the_process_with_one_line_and_status_2(tmp_path):
    seed = "9223372036854775808"
    run = run_python(PROGRAM, "--seed", seed, cwd=tmp_path)
    assert_refused(run.returncode, run.stdout, run.stderr, "--seed", seed, "whole number")


def test_folder_that_cannot_be_made_or_written_is_refused(tmp_path, assert_main_refuses):
    (tmp_path / "taken").write_text("a file")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    bad = ["taken", "taken/below", str(closed)]
    if os.access(closed, os.W_OK):  # root may write anywhere but here
        bad[2:] = ["/proc/1/nowhere", "/proc/1"] if os.path.isdir("/proc/1") else []
    for out in bad:
        assert_main_refuses(["--out", out], "--out", out, "folder", "written")
