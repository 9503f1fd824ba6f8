"""What the tests share: the program as a module, small servers, and the program as a process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PROGRAM = ROOT / "a3c_cartpole.py"
MOVIE = Path("movie", "A3C")  # where a run leaves its files, below the folder it ran in
GIVEN = {**os.environ}  # before the program's import adds to it

import a3c_cartpole as a3c  # noqa: E402


def pytest_configure(config):
    """Leave out the notices that the program itself leaves out."""
    for notice in "CartPole-v0 is out of date", "Overwriting existing videos":
        config.addinivalue_line("filterwarnings", f"ignore:.*{notice}")


@pytest.fixture
def server():
    return a3c.ParameterServer(seed=7)


@pytest.fixture
def brain(server):
    return a3c.LocalBrain("brain", server)


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """A run of eight workers that learned, with two test episodes, and the folder of its files."""
    folder = tmp_path_factory.mktemp("learned")
    run = run_program("--seed", 3, "--test-episodes", 2, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run, folder / MOVIE


@pytest.fixture(scope="session")
def given_up(tmp_path_factory):
    """A run of eight workers that ends at its limit, and the folder of its files."""
    folder = tmp_path_factory.mktemp("given_up")
    return run_program("--seed", 3, "--max-episodes", 40, cwd=folder), folder / MOVIE


@pytest.fixture
def rng():
    return np.random.default_rng(20171115)


@pytest.fixture
def signals():
    """Give back the handlers that a Run, or the test, has taken."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class FakeEnv:
    """An environment that lasts a given number of steps, or fails at one of them."""

    def __init__(self, length, fail_at=None):
        self.length, self.fail_at, self.step_count = length, fail_at, 0

    def reset(self, **_):
        self.step_count = 0
        return np.zeros(4, np.float32), {}

    def step(self, _action):
        self.step_count += 1
        if self.step_count == self.fail_at:
            raise RuntimeError("the pole broke")
        state = np.full(4, self.step_count / 100, np.float32)
        return state, 1.0, self.step_count >= self.length, False, {}

    def close(self):
        pass


def fill_queue(brain, rng, samples, terminal_share=0.3):
    """Queue random samples; return them as arrays s, a, r, s_, mask."""
    s = rng.normal(size=(samples, 4)).astype(np.float32)
    a = np.eye(2, dtype=np.float32)[rng.integers(0, 2, samples)]
    r = rng.normal(size=samples).astype(np.float32)
    s_ = rng.normal(size=(samples, 4)).astype(np.float32)
    mask = (rng.random(samples) >= terminal_share).astype(np.float32)
    for i in range(samples):
        brain.train_push(s[i], a[i], float(r[i]), s_[i] if mask[i] else None)
    return s, a, r, s_ * mask[:, None], mask


def forward(weights, s):
    """The network in plain NumPy, float64: p (B, 2) and V (B,)."""
    *hidden, kernel, bias, v_kernel, v_bias = [np.asarray(w, np.float64) for w in weights]
    for w, b in zip(hidden[::2], hidden[1::2]):
        s = np.maximum(s @ w + b, 0)
    z = s @ kernel + bias
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True), (s @ v_kernel + v_bias)[:, 0]


def frames_of(film):
    """Every frame of a film, decoded, as arrays (height, width, 3)."""
    frames = imageio_ffmpeg.read_frames(str(film))
    width, height = next(frames)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames]


def program_environment(**extra):
    """What this process was given, without a screen unless a test brings one."""
    environment = {k: v for k, v in GIVEN.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    return {**environment, **extra}


def run_program(*arguments, **options):
    """Run the program to its end, as a user would, and return what it printed and its status."""
    return run_python(PROGRAM, *arguments, **options)


def run_python(*arguments, cwd, timeout=120, **environment):
    """Run Python in a process of its own to its end; return what it printed and its status."""
    process = start_python(*arguments, cwd=cwd, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_python(*arguments, cwd, **environment):
    """Start Python in a process of its own, whose lines can be read as they come."""
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-u", *map(str, arguments)], cwd=cwd, text=True,
                            encoding="utf-8", env=program_environment(**environment), **pipes)


def patched(patch):
    """Python's arguments to run the program after some lines that break or look at something.

    When `main` is over, however, the names of the threads that are left go to the file `alive`.
    """
    return "-c", f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import os, signal, threading, time
import a3c_cartpole as a3c
{patch}
try:
    sys.exit(a3c.main(sys.argv[1:]))
finally:
    a3c.Path("alive").write_text(" ".join(thread.name for thread in threading.enumerate()))
"""
