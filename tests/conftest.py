"""What the tests share: samples, a network in NumPy, an environment, Python processes, films."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "a3c_cartpole.py"
FOLDERS = [str(ROOT), str(ROOT / "companions")]
sys.path[:0] = FOLDERS
GIVEN = dict(os.environ)  # before the program's import adds to it

HANDLERS = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
with contextlib.redirect_stdout(io.StringIO()) as PRINTED_AT_IMPORT:
    import a3c_cartpole as a3c
HANDLERS_AFTER = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
THREADS_AFTER = [thread.name for thread in threading.enumerate()]

import imageio_ffmpeg  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def rng():
    return np.random.default_rng(20171115)


@pytest.fixture
def server(rng):
    """A parameter server with weights of which none is 0, so that a forgotten bias is noticed."""
    server = a3c.ParameterServer()
    server.weights = [rng.normal(size=w.shape, scale=0.5).astype(np.float32)
                      for w in server.weights]
    return server


@pytest.fixture
def brain(server):
    return a3c.LocalBrain(server)


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


def finite_differences(function, weights, step=1e-6):
    """Central differences of function(weights) on every single number of a list of arrays."""
    gradients = []
    for i, weight in enumerate(weights):
        gradient = np.zeros(weight.shape)
        for index in np.ndindex(weight.shape):
            values = []
            for d in step, -step:
                moved = [np.array(w, float) for w in weights]
                moved[i][index] += d
                values.append(function(moved))
            gradient[index] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


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


def start_python(*arguments, cwd, stdout=subprocess.PIPE, **environment):
    """Start Python in a process of its own, without a screen; its lines can be read at once."""
    given = {k: v for k, v in GIVEN.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    given["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [GIVEN.get("PYTHONPATH")])])
    pipes = dict(stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-u", *map(str, arguments)], cwd=cwd, text=True,
                            encoding="utf-8", env={**given, **environment}, **pipes)
