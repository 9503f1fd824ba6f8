"""A3C in processes: the arithmetic without Ray, then runs that lose processes or find none."""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import uuid
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, frames_of, run_python

ray = pytest.importorskip("ray")
from companions import a3c_processes as processes  # noqa: E402

FILE = ROOT / "companions" / "a3c_processes.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def options(**changed):
    return argparse.Namespace(**{**dict(
        seed=7, num_process=2, local_t_max=5, entropy_beta=.01, v_loss_coeff=.5, frame_num=4,
        lr=7e-4, epoch=1000, episodes=100, save_mode="last"), **changed})


@pytest.fixture
def policy():
    return processes.Policy(2, 4, 4, seed=7)


def worker(**changed):
    return processes.Worker(0, options(**changed))


# -- the arithmetic

def test_first_weights_are_uniform_up_to_one_over_the_root_of_the_inputs(policy):
    for layer in policy.model.layers[1:]:
        kernel, bias = layer.get_weights()
        bound = len(kernel) ** -.5
        assert np.abs(kernel).max() <= bound and np.abs(bias).max() <= bound
        assert np.abs(kernel).max() > .95 * bound and bias.any()


def test_forward_equals_the_keras_model(policy):
    x = np.random.default_rng(1).normal(size=(9, 16)).astype(np.float32)
    p, v = map(np.asarray, policy.model(x))
    for i in range(9):
        p_i, v_i = policy.forward(x[i])
        np.testing.assert_allclose(p_i, p[i], atol=1e-6)
        np.testing.assert_allclose(v_i, v[i, 0], atol=1e-6)


def test_gradient_equals_finite_differences_of_the_loss():
    w, rng = worker(), np.random.default_rng(2)
    x, a, R = rng.normal(size=(4, 16)), np.array([0, 1, 1, 0]), np.array([3., -1, 2, .5])
    weights = [rng.normal(scale=.3, size=k.shape) for k in w.local_policy.weights]
    held = None                     # R − V of the policy's part, which the gradient does not see

    def loss(weights):
        twin = types.SimpleNamespace(weights=weights)
        p, v = map(np.array, zip(*[processes.Policy.forward(twin, row) for row in x]))
        return np.sum(-np.log(p[range(4), a]) * (R - v if held is None else held)
                      + .5 * .5 * (R - v) ** 2 + .01 * np.sum(p * np.log(p + .01), axis=1))
    held = R - np.array([processes.Policy.forward(types.SimpleNamespace(weights=weights), row)[1]
                         for row in x])
    rows = np.float32([*x, x[0]]), np.float32([*a, -1]), np.float32([*R, 9])   # the last is no step
    theta = np.float32(np.concatenate([k.ravel() for k in weights]))
    tensors = map(processes.tf.constant, (theta, *rows))
    gradient = w.local_policy.unpack(w.compiled(*tensors).numpy())
    for n, k in enumerate(weights):
        for i in {tuple(rng.integers(0, k.shape)) for _ in range(8)}:
            both = []
            for sign in 1, -1:
                shifted = [array.copy() for array in weights]
                shifted[n][i] += sign * 1e-5
                both.append(loss(shifted))
            assert (both[0] - both[1]) / 2e-5 == pytest.approx(gradient[n][i], rel=1e-3, abs=1e-4)


def test_returns_by_hand():
    assert processes.returns([1, 1, 1], 0) == pytest.approx([2.9701, 1.99, 1])
    assert processes.returns([1, 0], 10) == pytest.approx([1 + .99 ** 2 * 10, 9.9])


@pytest.mark.parametrize("before, eta", [(0, 1e-3), (500, .5e-3), (1000, 0), (1300, 0)])
def test_step_is_the_papers_rmsprop_with_a_rate_that_falls_to_zero(before, eta):
    rng = np.random.default_rng(3)
    theta, first, second = rng.normal(size=(3, 6))
    server = processes.Server(theta, options(lr=1e-3))
    server.global_t = before
    server.step(first)
    server.step(second)
    g1 = .01 * first ** 2
    g2 = .99 * g1 + .01 * second ** 2
    expected = theta - eta * first / np.sqrt(g1 + .01) - eta * second / np.sqrt(g2 + .01)
    np.testing.assert_allclose(server.theta, expected, rtol=1e-12)


def test_frames_begin_as_the_first_one_repeated_and_then_move_up():
    env = processes.make_env(4)
    first, _ = env.reset(seed=1)
    assert first.shape == (16,) and (first.reshape(4, 4) == first[:4]).all()
    second, *_ = env.step(0)
    np.testing.assert_array_equal(second[:12], first[4:])
    assert (second[12:] != first[12:]).any()


# -- the server

def test_ten_full_episodes_of_one_worker_end_learning_with_the_mean_of_their_ten_theta():
    server = processes.Server(np.zeros(3), options(epoch=10**9))
    server.step = lambda gradient: setattr(server, "theta", gradient)
    for n in range(10):
        assert server.update(1, np.full(3, 50.), 5, length=199)[1] is False
        theta, over = server.update(0, np.full(3, n), 5, length=200)
        assert over is (n == 9)
    assert server.learned and (theta == 4.5).all()
    after, over = server.update(1, np.full(3, 50.), 5, length=200)
    assert over and (after == 4.5).all() and server.global_t == 100
    rows = server.report(0)[0]
    assert rows[-1][:-1] == ("worker_1", 10, 200, 200, 100)
    assert len(rows) == 20 and server.report(19)[0] == rows[19:]


@pytest.mark.parametrize("limits", [dict(epoch=20), dict(episodes=2)])
def test_learning_ends_unlearned_after_its_steps_or_episodes(limits):
    server = processes.Server(np.zeros(3), options(**limits))
    ends = [server.update(0, np.ones(3), 10, length=10)[1] for _ in range(2)]
    assert ends == [False, True] and not server.learned


# -- save modes

@pytest.mark.parametrize("mode, kept", [("last", 3), ("all", 3), ("max", 2)])
def test_save_mode_max_keeps_the_theta_of_the_best_mean_until_one_has_learned(mode, kept):
    server = processes.Server(np.ones(3), options(epoch=10**9, save_mode=mode))
    server.step = lambda gradient: setattr(server, "theta", gradient)
    for n, rank, length in (1, 0, 20), (2, 1, 50), (3, 0, 20):
        server.update(rank, np.full(3, n), 5, length)
    assert (server.report(0)[2] == kept).all()
    for _ in range(10):
        server.update(1, np.full(3, 7), 5, length=200)
    assert (server.report(0)[2] == 7).all()


@pytest.mark.parametrize("mode, names", [
    ("last", ["unfinished"]), ("max", ["unfinished"]), ("all", ["10", "20"])])
def test_save_mode_all_leaves_every_file(mode, names, policy, tmp_path):
    arguments = options(save_mode=mode, out=tmp_path)
    for n in 1, 2:
        policy.sync(np.full_like(policy.theta, n))
        processes.save(policy, 10 * n, arguments)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"a3c_processes.{name}.weights.h5" for name in names]
    policy.model.load_weights(files[-1])
    assert (policy.model.get_weights()[0] == 2).all()


# -- runs, with Ray

@pytest.fixture
def mark(monkeypatch):
    """What the environment of a test's processes holds, by which they are found again."""
    monkeypatch.setenv("TEST_OF_PROCESSES", uuid.uuid4().hex)
    return f"TEST_OF_PROCESSES={os.environ['TEST_OF_PROCESSES']}".encode()


def find(mark, name=""):
    """Ids of the processes with a mark whose title begins so."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                if (folder / "cmdline").read_text().startswith(name):
                    found.append(int(folder.name))
    return found


def parent(process):
    """The process that started a process: of Ray's, the node's own."""
    return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1]


@contextlib.contextmanager
def running(tmp_path, *arguments):
    """The program as a user starts it, and its lines; it is ended with the block."""
    run = subprocess.Popen(
        [sys.executable, FILE, "--no-render", "--log", "--out", "out", *arguments],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    guard = threading.Timer(100, run.kill)
    guard.start()
    try:
        yield run
    finally:
        guard.cancel()
        run.kill()
        run.communicate()


def read_until(run, text):
    """Read lines up to one that holds a text."""
    for line in run.stdout:
        assert not line.startswith("("), line       # Ray's own
        if text in line:
            return line
    pytest.fail(f"ended without {text!r}: {run.stderr.read()}")


@linux
def test_a_killed_worker_comes_back_and_ctrl_c_leaves_nothing_running(tmp_path, mark):
    with running(tmp_path, "--num-process", "2") as run:
        read_until(run, "worker_2  episode 3 ")
        os.kill(find(mark, "ray::Worker")[0], signal.SIGKILL)
        rank = read_until(run, "was lost; Ray has started it anew").split()[0]
        read_until(run, f"{rank}  episode")
        assert len(find(mark, "ray::Worker")) == 2
        run.send_signal(signal.SIGINT)
        out, err = run.communicate()
    assert run.returncode == 130 and not err, err
    assert "not learned, interrupted after" in out
    assert (tmp_path / "out" / "a3c_processes.unfinished.weights.h5").is_file()
    assert wait_until(lambda: not find(mark))


@linux
def test_workers_run_on_both_nodes_and_end_by_sigterm_or_by_the_end_of_the_server(tmp_path, mark):
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1))
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        arguments = tmp_path, "--num-process", "2", "--address", cluster.address
        with running(*arguments) as run:
            read_until(run, "worker_2  episode 1 ")
            workers = find(mark, "ray::Worker")
            assert len(workers) == len(set(map(parent, workers))) == 2    # of two nodes
            run.terminate()
            out, err = run.communicate()
        assert run.returncode == 143 and "(raylet)" not in out and not err, err
        assert wait_until(lambda: not find(mark, "ray::Worker") + find(mark, "ray::Server"))
        with running(*arguments) as run:
            read_until(run, "worker_2  episode 3 ")
            os.kill(*find(mark, "ray::Server"), signal.SIGKILL)
            out, err = run.communicate()
        assert wait_until(lambda: not find(mark, "ray::Worker"))
    finally:
        cluster.shutdown()
    assert run.returncode == 1 and "not learned, learning failed after" in out
    assert "(raylet)" not in out
    assert err == ("learning lost: ConnectionError: the server's process is gone, and with it the"
                   " run\n")
    weights = tmp_path / "out" / "a3c_processes.unfinished.weights.h5"
    processes.Policy(2, 4, 4).model.load_weights(weights)


def wait_until(fact, seconds=30):
    end = time.monotonic() + seconds
    while not fact() and time.monotonic() < end:
        time.sleep(.2)
    return fact()


def test_no_cluster_at_the_address_is_one_line_and_status_2(tmp_path):
    with socket.socket() as free, socket.socket() as silent:
        addresses = ["nowhere"]
        for port in free, silent:
            port.bind(("127.0.0.1", 0))
            addresses.append(f"127.0.0.1:{port.getsockname()[1]}")
        silent.listen()
        for wrong in addresses:
            run = run_python(FILE, "--address", wrong, cwd=tmp_path)
            assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
            assert f"no Ray cluster at {wrong!r}" in run.stderr


def test_play_films_each_episode_of_the_test_from_its_first_frame(tmp_path, policy):
    policy.model.save_weights(tmp_path / "a3c_processes.weights.h5")
    run = run_python(FILE, "--play", "a3c_processes.weights.h5", "--out", "out", "--test-episodes",
                     2, "--no-render", cwd=tmp_path)
    steps = [int(n) for n in re.findall(r"test  episode \d  steps (\d+)", run.stdout)]
    assert (run.returncode, run.stderr, len(steps)) == (0, "", 2)
    films = sorted((tmp_path / "out").iterdir())
    assert [film.name for film in films] == [f"a3c_processes-episode-{n}.mp4" for n in (0, 1)]
    for film, n in zip(films, steps):
        assert len(frames_of(film)) in (n, n + 1)       # moviepy rounds


def test_without_ray_one_line_says_how_to_install_it_and_status_2(tmp_path):
    code = f"import sys, runpy; sys.modules['ray'] = None; sys.argv = [{str(FILE)!r}];" \
           f"runpy.run_path({str(FILE)!r}, run_name='__main__')"
    run = run_python("-c", code, cwd=tmp_path)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "pip install" in run.stderr
