"""What the tests share: the program as a module, small servers, and the program as a process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PROGRAM = ROOT / "a3c_cartpole.py"

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


@pytest.fixture
def rng():
    return np.random.default_rng(20171115)


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


def make_batch(s, a, r, s_, mask):
    """Join sample arrays into the (B, 13) that LocalBrain.gradients takes."""
    return np.hstack([s, a, r[:, None], s_, mask[:, None], np.ones((len(s), 1))]).astype(np.float32)


def random_weights(rng, model, scale=1.0):
    return [rng.normal(size=w.shape, scale=scale).astype(np.float32) for w in model.get_weights()]


def forward(weights, s):
    """The network in plain NumPy, float64: p (B, 2) and V (B,)."""
    *hidden, kernel, bias, v_kernel, v_bias = [np.asarray(w, np.float64) for w in weights]
    for w, b in zip(hidden[::2], hidden[1::2]):
        s = np.maximum(s @ w + b, 0)
    z = s @ kernel + bias
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True), (s @ v_kernel + v_bias)[:, 0]


def program_environment(**extra):
    """This process's environment, without a screen unless a test brings one."""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    return {**environment, **extra}


def run_program(*arguments, **options):
    """Run the program to its end, as a user would, and return what it printed and its status."""
    return run_python(PROGRAM, *arguments, **options)


def run_python(*arguments, cwd, timeout=120, **environment):
    """Run Python in a process of its own to its end; return what it printed and its status."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env=program_environment(**environment),
    )
