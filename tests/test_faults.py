"""Faults injected for real: nothing is lost, nothing hangs, nothing is silent."""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
from conftest import PROGRAM, ROOT, FakeEnv, program_environment, run_program, run_python

import a3c_cartpole as a3c

MOVIE = ("movie", "A3C")
SIGNALS = [
    pytest.param(signal.SIGINT, 130, id="SIGINT"),
    pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
]


def run_patched(patch, *arguments, **options):
    """Run the program in a process of its own after a few lines of Python that break something."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport a3c_cartpole as a3c\n{patch}\n"
        "sys.exit(a3c.main(sys.argv[1:]))"
    )
    return run_python("-c", code, *arguments, timeout=90, **options)


def start(*arguments, cwd, **environment):
    return subprocess.Popen(
        [sys.executable, "-u", str(PROGRAM), *map(str, arguments)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=program_environment(**environment),
    )


def read_until(process, beginning):
    """Read the program's lines until one begins so; return them all."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith(beginning):
            return lines
    raise AssertionError(f"no line begins with {beginning!r}: {lines[-3:]} {process.stderr.read()}")


def interrupt(process, number):
    """Send a signal; return what was still printed, the errors, and the seconds until the end."""
    sent = time.perf_counter()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return out, err, time.perf_counter() - sent


def complaints(stderr):
    return stderr.splitlines()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a policy that balances: learned by this program."""
    folder = tmp_path_factory.mktemp("weights")
    run = run_program("--workers", 1, "--seed", 1, "--test-episodes", 0, cwd=folder)
    assert run.returncode == 0
    return folder.joinpath(*MOVIE, "A3C.weights.h5")


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
    if self.parameter_server.frames > 2000:
        raise RuntimeError("the pole broke")
    return act(self, s, **k)
a3c.Agent.act = failing
"""
FAILING_BRAIN = """
def failing(self, *a):
    raise RuntimeError("the pole broke")
a3c.LocalBrain.update_parameter_server = failing
"""


@pytest.mark.parametrize("patch", [FAILING_ENVIRONMENT, FAILING_AGENT, FAILING_BRAIN])
def test_failing_worker_stops_the_run_and_is_named_with_its_traceback_once(tmp_path, patch):
    run = run_patched(patch, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.count("Traceback") == run.stderr.count("RuntimeError: the pole broke") == 1
    name = re.search(r"Exception in thread (local_thread\d)", run.stderr)[1]
    assert re.search(rf"not learned, {name} failed after \d+\.\d s: \d+ steps", run.stdout)
    assert not [line for line in run.stdout.splitlines() if line.startswith("test")]


def test_one_failing_worker_ends_all_threads_within_2_seconds():
    server = a3c.ParameterServer(seed=1)
    workers = [a3c.WorkerThread(f"local_thread{i}", "learning", server) for i in range(4)]
    for worker in workers:
        worker.environment.env = FakeEnv(50)
    workers[2].environment.env = FakeEnv(10**6, fail_at=500)
    caught = []
    threads = [threading.Thread(target=worker.run, name=worker.name) for worker in workers]
    hook, threading.excepthook = threading.excepthook, caught.append
    try:
        for thread in threads:
            thread.start()
        assert server.stop.wait(30)
        failed = time.perf_counter()
        for thread in threads:
            thread.join(6)
    finally:
        threading.excepthook = hook
    assert time.perf_counter() - failed < 6 and not any(thread.is_alive() for thread in threads)
    assert [(c.thread.name, str(c.exc_value)) for c in caught] == [
        ("local_thread2", "the pole broke")
    ]
    assert server.failed == "local_thread2" and not server.is_learned.is_set()


def test_threads_that_hang_hold_up_the_end_for_2_seconds_all_together():
    server, release = a3c.ParameterServer(), threading.Event()
    server.interrupted = signal.SIGINT
    hanging = [argparse.Namespace(name=name, run=release.wait) for name in server.names]
    watch = argparse.Namespace(display=contextlib.nullcontext(), look=lambda: None)
    began = time.perf_counter()
    try:
        assert a3c.learn(server, hanging, watch).startswith("not learned, interrupted")
        assert len(hanging) == 8 and time.perf_counter() - began < 6
    finally:
        release.set()


def test_nan_in_the_learning_is_a_failure_that_names_the_step(tmp_path):
    run = run_patched(
        """
push = a3c.LocalBrain.train_push
def poisoned(self, s, a, r, s_):
    push(self, s, a, float("nan") if self.parameter_server.frames > 1000 else r, s_)
a3c.LocalBrain.train_push = poisoned""",
        cwd=tmp_path,
    )
    assert run.returncode == 1
    step = int(re.search(r"FloatingPointError: .*not finite.* step (\d+)", run.stderr)[1])
    assert 1000 < step < 2000 and run.stderr.count("Traceback") == 1
    assert not list(tmp_path.joinpath(*MOVIE).glob("*.weights.h5"))


@pytest.mark.parametrize("number, status", SIGNALS)
def test_signal_while_learning_ends_it_with_one_line(tmp_path, number, status):
    process = start(cwd=tmp_path)
    read_until(process, "local_thread")
    out, err, seconds = interrupt(process, number)
    assert process.returncode == status and complaints(err) == [] and seconds < 6
    said = [line for line in out.splitlines() if line.startswith("not learned, interrupted")]
    assert len(said) == 1 and re.search(r": \d+ steps, \d+ episodes, 8 workers", said[0])
    assert not tmp_path.joinpath(*MOVIE, "A3C.weights.h5").exists()


@pytest.mark.parametrize("number, status", SIGNALS)
def test_signal_before_the_first_episode_ends_the_program(tmp_path, number, status):
    mark = tmp_path / "started"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport a3c_cartpole as a3c\n"
        "build = a3c.LocalBrain._build_graph\n"
        f"def slow(self): open({str(mark)!r}, 'w').close(); return build(self)\n"
        "a3c.LocalBrain._build_graph = slow\nsys.exit(a3c.main([]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        text=True,
        env=program_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.01)
    out, err, seconds = interrupt(process, number)
    assert process.returncode == status and complaints(err) == [] and seconds < 6
    assert "interrupted" in out


@pytest.mark.parametrize("number, status", SIGNALS)
def test_signal_during_the_test_closes_the_film_and_keeps_the_weights(tmp_path, number, status):
    from moviepy import VideoFileClip

    process = start("--workers", 1, "--seed", 1, "--test-episodes", 1000, cwd=tmp_path)
    read_until(process, "test_thread  episode 1 ")
    time.sleep(0.2)  # into the second episode
    out, err, seconds = interrupt(process, number)
    assert process.returncode == status and complaints(err) == [] and seconds < 6
    folder = tmp_path.joinpath(*MOVIE)
    assert (folder / "A3C.weights.h5").stat().st_size and "interrupted by" in out
    films = sorted(folder.glob("*.mp4"))
    assert len(films) >= 2
    for film in films:
        with VideoFileClip(str(film)) as clip:
            assert clip.n_frames >= 1
    assert re.search(r"test: mean of \d+ episodes", out)


def test_weights_are_on_disk_before_the_test_begins(tmp_path):
    run = run_patched(
        """
run = a3c.WorkerThread.run
def checking(self):
    if self.thread_type == "test":
        print("there:", *sorted(p.name for p in a3c.Path("movie/A3C").iterdir()))
        raise RuntimeError("no test today")
    return run(self)
a3c.WorkerThread.run = checking""",
        "--workers",
        1,
        "--seed",
        1,
        cwd=tmp_path,
    )
    (there,) = [line for line in run.stdout.splitlines() if line.startswith("there:")]
    assert "A3C.weights.h5" in there.split() and "part" not in there
    assert run.returncode == 1 and "test lost: RuntimeError: no test today" in run.stderr
    assert "Traceback" not in run.stderr


def test_saved_weights_are_the_winners(tmp_path):
    run = run_patched(
        """
push = a3c.LocalBrain.push_parameter_server
def keeping(self):
    push(self)
    a3c.np.save("winner.npy", self._weights)
a3c.LocalBrain.push_parameter_server = keeping""",
        "--seed",
        2,
        "--test-episodes",
        0,
        cwd=tmp_path,
    )
    assert run.returncode == 0
    server = a3c.ParameterServer()
    server.model.load_weights(tmp_path.joinpath(*MOVIE, "A3C.weights.h5"))
    np.testing.assert_array_equal(
        server.pack(server.model.get_weights()), np.load(tmp_path / "winner.npy")
    )


def test_disk_full_while_saving_leaves_the_earlier_weights_whole(tmp_path, weights):
    folder = tmp_path.joinpath(*MOVIE)
    folder.mkdir(parents=True)
    kept = folder / "A3C.weights.h5"
    kept.write_bytes(weights.read_bytes())
    run = run_patched(
        """
import errno
def full(self, path, **k):
    open(path, "wb").write(b"half a file")
    raise OSError(errno.ENOSPC, "No space left on device")
a3c.keras.Model.save_weights = full""",
        "--workers",
        1,
        "--seed",
        1,
        "--test-episodes",
        1,
        cwd=tmp_path,
    )
    assert run.returncode == 1
    assert kept.read_bytes() == weights.read_bytes()
    assert not list(folder.glob("part*"))
    assert len([line for line in complaints(run.stderr) if "No space left" in line]) == 1
    assert "test: mean of 1 episodes" in run.stdout and (folder / "A3C-episode-0.mp4").exists()


FULL_DISK = """
import errno
from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter as Writer
def full(self, frame):
    raise OSError(errno.ENOSPC, "No space left on device")
Writer.write_frame = full
"""
FILES_OF_4_KB_AT_MOST = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
"""
CUT_SHORT_ON_ITS_WAY_TO_DISK = """
import subprocess
communicate = subprocess.Popen.communicate
def cut(self, *a, **k):
    said = communicate(self, *a, **k)
    for film in a3c.Path("movie", "A3C").glob("*.mp4"):
        a3c.os.truncate(film, 1000)
    return said
subprocess.Popen.communicate = cut
"""
A_FRAME_SHORT = """
from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter as Writer
write, seen = Writer.write_frame, []
def skipping(self, frame):
    seen.append(1)
    if len(seen) != 10:
        write(self, frame)
Writer.write_frame = skipping
"""


@pytest.mark.parametrize(
    "patch, cause",
    [
        (FULL_DISK, "OSError: [Errno 28] No space left on device"),
        (FILES_OF_4_KB_AT_MOST, "OSError: ffmpeg ended with status"),
        (CUT_SHORT_ON_ITS_WAY_TO_DISK, "RuntimeError: FFMPEG call failed"),
        (A_FRAME_SHORT, "OSError: movie/A3C/A3C-episode-0.mp4 is not complete"),
    ],
    ids=["full disk", "files of 4 KB", "cut short", "a frame short"],
)
def test_film_that_cannot_be_written_costs_the_film_only(tmp_path, weights, patch, cause):
    if sys.platform == "win32" and patch is FILES_OF_4_KB_AT_MOST:
        pytest.skip("Windows has no limit on the size of a file")
    run = run_patched(patch, "--play", weights, "--test-episodes", 3, cwd=tmp_path)
    assert run.returncode == 1
    (said,) = complaints(run.stderr)
    assert said.replace("\\", "/").startswith(f"video lost: {cause}")
    assert "test: mean of 3 episodes" in run.stdout
    assert list(tmp_path.joinpath(*MOVIE).iterdir()) == []


def test_without_ffmpeg_the_test_is_played_and_the_film_is_missed(tmp_path, weights):
    run = run_program(
        "--play",
        weights,
        "--test-episodes",
        2,
        cwd=tmp_path,
        PATH=str(tmp_path),
        IMAGEIO_FFMPEG_EXE=str(tmp_path / "no-ffmpeg"),
    )
    assert run.returncode == 1
    (said,) = complaints(run.stderr)
    assert "lost" in said and "ffmpeg" in said
    assert "test: mean of 2 episodes" in run.stdout


def test_window_is_shown_at_its_real_speed(tmp_path, weights):
    run = run_program(
        "--play", weights, "--test-episodes", 1, "--render", cwd=tmp_path, SDL_VIDEODRIVER="dummy"
    )
    assert run.returncode == 0 and complaints(run.stderr) == []
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import a3c_cartpole as a3c;"
        "env = a3c.Window(a3c.gym.make('CartPole-v0', render_mode='rgb_array'));"
        "env.reset(seed=1); env.step(0);"
        "t = time.perf_counter();"
        "[env.unwrapped.__setattr__('state', (0, 0, 0, 0)) or env.step(i % 2) for i in range(100)];"
        "print(time.perf_counter() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        capture_output=True,
        text=True,
        timeout=60,
        env=program_environment(SDL_VIDEODRIVER="dummy"),
    )
    assert float(done.stdout) >= 1.8  # 100 steps at 50 a second are 2 s


def test_window_opens_on_an_x_screen(tmp_path, weights):
    if shutil.which("xvfb-run") is None:
        pytest.skip("this machine has no xvfb-run to give a virtual screen")
    command = ["xvfb-run", "-a", sys.executable, str(PROGRAM), "--play", str(weights), "--render"]
    run = subprocess.run(
        [*command, "--test-episodes", "1"], cwd=tmp_path, text=True, capture_output=True, timeout=90
    )
    assert run.returncode == 0, run.stderr
    assert "test: mean of 1 episodes" in run.stdout and "window" not in run.stderr


def test_broken_screen_costs_the_window_only(tmp_path, weights):
    run = run_program(
        "--play",
        weights,
        "--test-episodes",
        2,
        "--render",
        cwd=tmp_path,
        SDL_VIDEODRIVER="no-such-driver",
    )
    assert run.returncode == 1
    (said,) = complaints(run.stderr)
    assert said.startswith("window lost:") and "Traceback" not in run.stderr
    assert "test: mean of 2 episodes" in run.stdout
    assert len(list(tmp_path.joinpath(*MOVIE).glob("*.mp4"))) == 2


def test_closing_the_window_leaves_the_test_and_its_films(tmp_path, weights):
    run = run_patched(
        """
show = a3c.gym.wrappers.HumanRendering._render_frame
shown = []
def closing(self):
    import pygame
    show(self)
    shown.append(1)
    if len(shown) == 20:
        pygame.event.post(pygame.event.Event(pygame.QUIT))
    assert len(shown) <= 20
a3c.gym.wrappers.HumanRendering._render_frame = closing""",
        "--play",
        weights,
        "--test-episodes",
        2,
        "--render",
        cwd=tmp_path,
        SDL_VIDEODRIVER="dummy",
    )
    assert run.returncode == 0
    assert complaints(run.stderr) == ["window closed, the test goes on"]
    assert "test: mean of 2 episodes" in run.stdout
    assert len(list(tmp_path.joinpath(*MOVIE).glob("*.mp4"))) == 2


def test_play_tests_saved_weights_without_learning(tmp_path, weights):
    before = weights.read_bytes()
    run = run_program("--play", weights, "--test-episodes", 3, cwd=tmp_path)
    assert run.returncode == 0
    assert not [
        line for line in run.stdout.splitlines() if line.startswith(("local_thread", "learned"))
    ]
    steps = [int(n) for n in re.findall(r"test_thread  episode \d+  steps (\d+)", run.stdout)]
    assert len(steps) == 3 and min(steps) > 100  # an untrained policy falls within 60
    assert weights.read_bytes() == before


@pytest.fixture
def broken_weights(tmp_path, weights):
    """A function that makes a bad weights file of the kind named."""

    def make(kind):
        path = tmp_path / "bad.weights.h5"
        if kind == "truncated":
            path.write_bytes(weights.read_bytes()[: len(weights.read_bytes()) // 2])
        elif kind == "foreign":
            keras.Sequential([keras.Input((7,)), keras.layers.Dense(3)]).save_weights(path)
        elif kind == "text":
            path.write_text("no weights at all")
        elif kind == "folder":
            path.mkdir()
        return path

    return make


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "text", "folder"])
def test_play_refuses_what_is_not_its_weights(tmp_path, broken_weights, kind):
    path = broken_weights(kind)
    run = run_program("--play", path, cwd=tmp_path)
    assert_refused(run, "--play", str(path), "A3C.weights.h5")


def assert_refused(run, *parts):
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (
            ["--env", "Acrobot-v1"],
            ["--env", "'Acrobot-v1'", "CartPole-v0", "CartPole-v1", "reward"],
        ),
        (["--env", "NoSuch-v9"], ["--env", "'NoSuch-v9'", "CartPole-v0"]),
        (["--workers", "0"], ["--workers", "'0'", "whole number from 1"]),
        (["--workers", "2.5"], ["--workers", "'2.5'", "whole number"]),
        (["--workers", "-1"], ["--workers", "'-1'", "whole number"]),
        (["--seed", "-1"], ["--seed", "'-1'", "whole number from 0"]),
        (["--seed", "x"], ["--seed", "'x'", "whole number"]),
        (["--max-episodes", "0"], ["--max-episodes", "'0'", "whole number from 1"]),
        (["--test-episodes", "many"], ["--test-episodes", "'many'", "whole number"]),
        (["--episodes", "3"], ["--episodes"]),
        (["--workers"], ["--workers", "expected one argument"]),
    ],
)
def test_bad_argument_is_refused_in_one_line_that_names_it(
    tmp_path, monkeypatch, capsys, arguments, parts
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        a3c.main(arguments)
    printed = capsys.readouterr()
    assert_refused(
        subprocess.CompletedProcess(arguments, exit.value.code, printed.out, printed.err), *parts
    )
    assert threading.active_count() == 1 and not (tmp_path / "movie").exists()


def test_bad_argument_ends_the_process_with_status_2_before_any_work(tmp_path):
    started = time.perf_counter()
    assert_refused(run_program("--env", "Acrobot-v1", cwd=tmp_path), "--env", "CartPole-v0")
    assert time.perf_counter() - started < 30


def test_file_where_the_output_folder_should_be_is_refused(tmp_path):
    (tmp_path / "taken").write_text("a file")
    assert_refused(run_program("--out", "taken", cwd=tmp_path), "--out", "'taken'", "folder")
    assert_refused(run_program("--out", "taken/below", cwd=tmp_path), "--out", "taken", "folder")


def test_read_only_output_folder_is_refused(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere but here
        locked = "/proc/1/nowhere"
        if not os.path.isdir("/proc/1"):
            pytest.skip("no folder on this machine is closed to this user")
    assert_refused(run_program("--out", locked, cwd=tmp_path), "--out", str(locked), "written")


@pytest.mark.parametrize("package", ["tensorflow", "gymnasium", "moviepy", "pygame"])
def test_missing_package_is_named_with_the_command_that_installs_it(tmp_path, package):
    (tmp_path / "sitecustomize.py").write_text(f"""
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {package!r} else find(name, *a)
""")
    run = run_program(cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert_refused(run, package, "pip install -r requirements.txt")


def test_reader_who_goes_away_does_not_cost_the_run(tmp_path):
    process = start("--workers", 1, "--seed", 1, "--test-episodes", 1, cwd=tmp_path)
    read_until(process, "local_thread1  episode 3 ")
    process.stdout.close()
    assert process.wait(90) == 0 and complaints(process.stderr.read()) == []
    assert tmp_path.joinpath(*MOVIE, "A3C.weights.h5").exists()


def test_64_workers_start_stop_and_end_cleanly(tmp_path):
    run = run_program("--workers", 64, "--max-episodes", 640, "--seed", 1, cwd=tmp_path)
    assert run.returncode == 1 and complaints(run.stderr) == []
    threads = set(re.findall(r"^(local_thread\d+) ", run.stdout, re.MULTILINE))
    assert len(threads) == 64 and "640 episodes, 64 workers" in run.stdout
