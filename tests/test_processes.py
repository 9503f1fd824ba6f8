"""a3c_processes.py: the arithmetic in this process, then processes that share memory."""

import contextlib
import csv
import multiprocessing as mp
import os
import random
import signal
import sys
import time
from pathlib import Path

from companions import a3c_processes as processes
from companions import common

import numpy as np
import pytest
import tensorflow as tf
from conftest import finite_differences, run_python, start_python

UNFINISHED = "a3c_processes.unfinished.weights.h5"


@pytest.fixture
def policy(rng):
    """A policy with weights of which none is 0, in double precision."""
    policy = processes.Policy(2, 4)
    policy.sync([rng.normal(size=w.shape, scale=0.3) for w in policy.weights])
    return policy


# -- the arithmetic


def test_first_weights_are_uniform_up_to_one_over_the_root_of_the_inputs():
    for layer in processes.Policy(2, 4).model.layers[1:]:
        kernel, bias = layer.get_weights()
        bound = len(kernel) ** -0.5
        assert 0.95 * bound < np.abs(kernel).max() <= bound
        assert 0 < np.abs(bias).max() <= bound


def test_a_forward_that_forgets_a_bias_ends_the_program(monkeypatch, policy):
    def forgetful(policy, x):
        policy.weights[3] = 0 * policy.weights[3]
        return forward(policy, x)

    forward = processes.Policy.forward
    processes.check_forward(policy)
    monkeypatch.setattr(processes.Policy, "forward", forgetful)
    with pytest.raises(SystemExit, match="two different networks"):
        processes.check_forward(policy)


def test_returns_by_hand():
    # 1 + .99·1.96 = 2.9404 and 1 + .99·.9697 = 1.96. Their deviation is their difference / √2.
    by_hand = 0.4902 / (0.9804 / 2**0.5 + 0.1)
    assert processes.compute_returns([1.0, 1.0], 0.9697) == pytest.approx([by_hand, -by_hand], 1e-3)
    assert processes.compute_returns([1.0], 10) == pytest.approx([1 + 0.99 * 10])


def test_returns_equal_the_sums_written_out_with_v_after_the_last_reward(rng):
    rewards = rng.normal(size=50).tolist()
    R = np.array([sum(0.99 ** (k - t) * rewards[k] for k in range(t, 50)) + 0.99 ** (50 - t) * 7
                  for t in range(50)])
    expected = (R - R.mean()) / (R.std(ddof=1) + 0.1)
    np.testing.assert_allclose(processes.compute_returns(rewards, 7), expected, atol=1e-5)


def loss_of(p, v, actions, returns, advantage):
    """The post's loss, step by step. The advantage is given, because it is a constant there."""
    loss = 0
    for p_t, v_t, a, R, A in zip(p, v, actions, returns, advantage):
        loss += -np.log(p_t[a]) * A + 0.5 * 0.5 * (R - v_t) ** 2
        loss += 0.01 * sum(p_i * np.log(p_i + 0.1) for p_i in p_t)
    return loss


def test_loss_by_hand():
    p, v, actions, returns = [[0.25, 0.75], [0.5, 0.5]], [1.0, 2.0], [1, 0], [3.0, 1.0]
    by_hand = -np.log(0.75) * 2 + 0.25 * 4 - np.log(0.5) * -1 + 0.25 * 1 \
        + 0.01 * (0.25 * np.log(0.35) + 0.75 * np.log(0.85) + np.log(0.6))
    assert loss_of(p, v, actions, returns, [2, -1]) == pytest.approx(by_hand)
    loss = processes.compute_loss(*map(tf.constant, (p, v, actions, returns)))
    assert float(loss) == pytest.approx(by_hand)


def test_gradients_equal_finite_differences_of_the_loss_in_a_random_direction(policy, rng):
    x = rng.normal(size=(4, 16))
    actions = [0, 1, 1, 0]
    returns = [3.0, -1, 2, 0.5]
    theta = policy.weights
    directions = [rng.normal(size=w.shape) for w in theta]
    advantage = [R - policy.forward(x_t)[1] for x_t, R in zip(x, returns)]

    def loss_after(steps):      # steps: how far to go in the direction of each array
        policy.weights = [w + t * d for w, t, d in zip(theta, steps[0], directions)]
        p, v = zip(*[policy.forward(x_t) for x_t in x])
        return loss_of(p, v, actions, returns, advantage)

    slopes = finite_differences(loss_after, [np.zeros(8)])[0]
    gradients = processes.compile_gradients(policy.model)(
        [tf.constant(w, tf.float32) for w in theta], tf.constant(x, tf.float32),
        tf.constant(actions), tf.constant(returns))
    for slope, gradient, direction in zip(slopes, gradients, directions):
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-3)


def test_step_is_rmsprop_from_0_with_eps_beside_the_root_in_the_given_arrays(rng):
    start, first, second = rng.normal(size=(3, 6))
    w = start.copy()
    optimizer = processes.AsyncRMSprop([w], [np.zeros(6)])
    optimizer.step(1e-2, [first])
    optimizer.step(1e-3, [second])
    m1 = 0.01 * first**2
    m2 = 0.99 * m1 + 0.01 * second**2
    expected = start - 1e-2 * first / (np.sqrt(m1) + 0.1) - 1e-3 * second / (np.sqrt(m2) + 0.1)
    np.testing.assert_allclose(w, expected, rtol=1e-12)


class Game:
    """Episodes of three steps. A frame holds the number of the step."""

    def reset(self):
        self.t = 0
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(4, self.t, np.float32), 1.0, self.t == 3, False, {}


def test_frames_begin_as_the_first_one_repeated_and_then_move_up():
    env = processes.StackEnv(Game())
    assert env.reset()[::4].tolist() == [0, 0, 0, 0]
    env.step(0)
    o, reward, done = env.step(0)
    assert (o[::4].tolist(), reward, done) == ([0, 0, 1, 2], 1, False)
    assert env.step(0)[2]


def test_rollouts_bootstrap_unless_the_episode_ends_and_the_rate_falls_to_0(monkeypatch):
    """`train` with rollouts of two steps at most and episodes of three."""
    monkeypatch.setattr(processes, "LOCAL_T_MAX", 2)
    monkeypatch.setattr(processes, "EPOCH", 7)
    batches, rates, episodes = [], [], []
    policy = processes.Policy(2, 4)

    class Recorder:
        step = staticmethod(lambda lr, gradients: rates.append(lr))
        send = episodes.append

    def compute_gradients(weights, *batch):
        batches.append([tensor.numpy() for tensor in batch])
        return []

    processes.train(random.Random(1), policy.weights, policy, compute_gradients, Recorder,
                    processes.StackEnv(Game()), np.zeros(1, np.int64), Recorder)
    # The states in which the actions were chosen, by their last frames
    states = [observations[:, -1].tolist() for observations, _, _ in batches]
    assert states == [[0, 1], [2], [0, 1], [2], [0, 1]]
    _, v = policy.forward(np.repeat(np.float32([0, 0, 1, 2]), 4))
    np.testing.assert_allclose(batches[0][2], processes.compute_returns([1, 1], v), rtol=1e-5)
    assert batches[1][2] == [1]
    assert rates == pytest.approx([processes.LR * left / 7 for left in (5, 4, 2, 1, 0)])
    assert episodes == [("episode", 3)] * 2


# -- processes


def add_one(shared):
    for array in processes.map_memory(shared, processes.Policy(2, 4)):
        array += 1


def test_a_write_by_one_process_is_seen_by_another_but_not_by_a_copy(policy):
    shared = [mp.RawArray("f", w.ravel()) for w in policy.weights]
    before = [np.float32(w) for w in policy.weights]
    global_weights = processes.map_memory(shared, policy)
    policy.sync(global_weights)
    process = mp.get_context(processes.quick_start()).Process(target=add_one, args=(shared,))
    process.start()
    process.join(60)
    for old, seen, copy in zip(before, global_weights, policy.weights):
        np.testing.assert_array_equal(seen, old + 1)
        np.testing.assert_array_equal(copy, old)


def run_main(folder, *arguments):
    """Run the program in this process, with two others; return its exit status."""
    return processes.main(["--num-process", "2", "--no-render", "--out", str(folder), *arguments])


def test_two_processes_learn_and_what_they_have_learned_can_be_played(tmp_path, capfd):
    assert run_main(tmp_path, "--test-episodes", "0") == 0
    with open(tmp_path / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    assert {row["thread"] for row in history} == {"process_0", "process_1"}
    assert float(history[-1]["mean_of_last_10"]) > 199

    weights = str(tmp_path / "a3c_processes.weights.h5")
    assert run_main(tmp_path, "--play", weights, "--test-episodes", "1") == 0
    out, err = capfd.readouterr()
    assert int(out.split("test  episode 1  steps ")[1].split()[0]) > 150 and not err


def run_failing(name, *args):
    processes.train = None
    processes.run_process(name, *args)


def run_killed(name, *args):
    """Let process_0 be killed after its first rollout. process_1 goes on."""
    if name == "process_0":
        processes.compute_returns = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    processes.run_process(name, *args)


def run_until_300(name, *args):
    processes.EPOCH = 300
    processes.run_process(name, *args)


@pytest.mark.parametrize("run_process, error, tracebacks", [
    (run_failing, "error: process_", 1),
    pytest.param(run_killed, "error: process_0 was killed by signal 9", 0,
                 marks=pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")),
    (run_until_300, "", 0)])
def test_a_process_that_ends_ends_the_run_with_one_message_and_weights(
        tmp_path, capfd, monkeypatch, run_process, error, tracebacks):
    monkeypatch.setattr(processes, "run_process", run_process)
    assert run_main(tmp_path) == 1
    err = capfd.readouterr().err
    assert err.startswith(error) and err.count("Traceback") == tracebacks
    assert err.count("error: ") == bool(error) == bool(err)
    common.load_weights(processes.Policy(2, 4).model, tmp_path / UNFINISHED)
    assert not mp.active_children()


# -- as a user starts it


def start_session(*arguments, **environment):
    """Start Python as the first process of a session, as a terminal does."""
    code = "import os, sys; os.setsid(); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return start_python("-c", code, "-u", *arguments, **environment)


def is_empty(session):
    """Wait until no process of a session is left, at most ten seconds."""
    for _ in range(100):
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                found.append(os.getsid(int(folder.name)))
        if session not in found:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_and_sigterm_end_all_processes_and_keep_the_weights_also_with_a_long_tmpdir(
        tmp_path):
    long_folder = tmp_path / ("long" * 30)      # no socket can be there, so processes are spawned
    long_folder.mkdir()
    program = "-m", "companions.a3c_processes", "--num-process", "1", "--out"
    forked = start_session(*program, "forked", cwd=tmp_path)
    spawned = start_session(*program, "spawned", cwd=tmp_path, TMPDIR=str(long_folder))
    assert forked.stdout.readline().startswith("process_0  episode 1")
    os.killpg(forked.pid, signal.SIGINT)        # a terminal sends it to all processes
    assert spawned.stdout.readline().startswith("process_0  episode 1")
    spawned.terminate()
    for run, folder in (forked, "forked"), (spawned, "spawned"):
        out, err = run.communicate(timeout=60)
        assert (run.returncode, err) == (130, "") and "not learned in" in out
        assert (tmp_path / folder / UNFINISHED).is_file()
        assert is_empty(run.pid)


def test_a_script_that_calls_main_without_a_guard_gets_one_message(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom companions import a3c_processes\n"
                      "sys.exit(a3c_processes.main(['--num-process', '3', '--out', 'kept']))\n")
    run = run_python(script, cwd=tmp_path)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1
    assert 'below `if __name__ == "__main__":`' in run.stderr
    assert run.stdout.count("learned in") == 1
