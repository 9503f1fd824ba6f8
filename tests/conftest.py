"""What the tests share: a parameter server, samples, a network in NumPy, and Python processes."""

import os
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROGRAM = ROOT / "a3c_cartpole.py"
GIVEN = dict(os.environ)  # before the program's import adds to it

import a3c_cartpole as a3c  # noqa: E402


def pytest_configure(config):
    """Leave out notices: two that the program leaves out, too, and one of Keras about NumPy."""
    for notice in "CartPole-v0 is out of date", "Overwriting existing videos", "__array__":
        config.addinivalue_line("filterwarnings", f"ignore:.*{notice}")


@pytest.fixture(scope="session")
def only_server():
    """The one server of all tests, because making one and compiling for it takes a second."""
    return a3c.ParameterServer(seed=7)


@pytest.fixture
def server(only_server):
    """A server as it is at the beginning, with the same weights in each test."""
    only_server.theta = random_weights(only_server)
    only_server.mean_square = np.ones_like(only_server.theta)
    only_server.updates = 0
    only_server.frames = 0
    only_server.staleness = []
    only_server.is_learned = False
    only_server.seed = 7
    only_server.eps_steps = a3c.EPS_STEPS
    only_server.progress = a3c.Progress("CartPole-v0", 20_000)
    return only_server


def random_weights(server):
    """Random weights, none of them 0, so that a forgotten bias would be noticed."""
    rng = np.random.default_rng(7)
    return rng.normal(size=server.theta.shape, scale=0.5).astype(np.float32)


@pytest.fixture
def brain(server):
    return a3c.LocalBrain("brain", server)


@pytest.fixture
def rng():
    return np.random.default_rng(20171115)


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """A run in a process of its own that learned and played nine test episodes; and its folder."""
    folder = tmp_path_factory.mktemp("learned")
    run = run_python(PROGRAM, "--seed", 1, "--test-episodes", 9, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run, folder / "movie" / "A3C"


class FakeEnv:
    """An environment whose episodes last a given number of steps."""

    def __init__(self, length):
        self.length = length
        self.step_count = 0

    def reset(self, **_):
        self.step_count = 0
        return np.zeros(4, np.float32), {}

    def step(self, _action):
        self.step_count += 1
        state = np.full(4, self.step_count / 100, np.float32)
        return state, 1.0, self.step_count >= self.length, False, {}

    def close(self):
        pass


def fill_queue(brain, rng, samples):
    """Queue random samples, some at the end of an episode; return arrays s, a, R_n, s_, mask."""
    s = rng.normal(size=(samples, 4)).astype(np.float32)
    a = np.eye(2, dtype=np.float32)[rng.integers(0, 2, samples)]
    R_n = rng.normal(size=samples).astype(np.float32)
    s_ = rng.normal(size=(samples, 4)).astype(np.float32)
    mask = (rng.random(samples) >= 0.3).astype(np.float32)
    for i in range(samples):
        brain.train_push(s[i], a[i], float(R_n[i]), s_[i] if mask[i] else None)
    return s, a, R_n, s_ * mask[:, None], mask


def forward(weights, s):
    """The network in plain NumPy, float64: p (B, 2) and V (B,)."""
    kernel, bias, p_kernel, p_bias, v_kernel, v_bias = [np.asarray(w, float) for w in weights]
    hidden = np.maximum(s @ kernel + bias, 0)
    z = hidden @ p_kernel + p_bias
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True), (hidden @ v_kernel + v_bias)[:, 0]


def frames_of(film):
    """Every frame of a film, decoded, as arrays (height, width, 3)."""
    frames = imageio_ffmpeg.read_frames(str(film))
    width, height = next(frames)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames]


def run_python(*arguments, cwd, timeout=120, **environment):
    """Run Python in a process of its own to its end; return what it printed and its status."""
    process = start_python(*arguments, cwd=cwd, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_python(*arguments, cwd, **environment):
    """Start Python in a process of its own, without a screen; its lines can be read at once."""
    given = {k: v for k, v in GIVEN.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-u", *map(str, arguments)], cwd=cwd, text=True,
                            encoding="utf-8", env={**given, **environment}, **pipes)
