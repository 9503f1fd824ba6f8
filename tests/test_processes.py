"""a3c_processes.py: the arithmetic in this process, then processes that share memory."""
import multiprocessing as mp
import os
import random
import signal
import sys

import common

import a3c_processes as processes
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, FakeEnv, finite_differences, start_python


@pytest.fixture
def policy(rng):
    """A policy with weights of which none is 0, in double precision."""
    policy = processes.Policy()
    policy.weights = [rng.normal(size=w.shape, scale=.3) for w in policy.weights]
    return policy


# -- the arithmetic

def test_first_weights_are_uniform_up_to_one_over_the_root_of_the_inputs():
    for layer in processes.Policy().model.layers[1:]:
        kernel, bias = layer.get_weights()
        bound = len(kernel) ** -.5
        assert .95 * bound < np.abs(kernel).max() <= bound
        assert 0 < np.abs(bias).max() <= bound


def test_returns_by_hand():
    # 1 + .99·1.96 = 2.9404 and 1 + .99·.9697 = 1.96. Their deviation is their difference / √2.
    by_hand = .4902 / (.9804 / 2 ** .5 + .1)
    assert processes.compute_returns([1., 1.], .9697) == pytest.approx([by_hand, -by_hand], 1e-3)
    assert processes.compute_returns([1.], 10) == pytest.approx([1 + .99 * 10])


def test_returns_equal_the_sums_written_out_with_v_after_the_last_reward(rng):
    rewards = rng.normal(size=50).tolist()
    R = np.array([sum(.99 ** (k - t) * rewards[k] for k in range(t, 50)) + .99 ** (50 - t) * 7
                  for t in range(50)])
    expected = (R - R.mean()) / (R.std(ddof=1) + .1)
    np.testing.assert_allclose(processes.compute_returns(rewards, 7), expected, atol=1e-5)


def loss_of(p, v, actions, returns, advantage):
    """The post's loss, step by step. The advantage is given, because it is a constant there."""
    loss = 0
    for p_t, v_t, a, R, A in zip(p, v, actions, returns, advantage):
        loss += -np.log(p_t[a]) * A + .5 * .5 * (R - v_t) ** 2
        loss += .01 * sum(p_i * np.log(p_i + .1) for p_i in p_t)
    return loss


def test_loss_by_hand():
    p, v, actions, returns = [[.25, .75], [.5, .5]], [1., 2.], [1, 0], [3., 1.]
    by_hand = -np.log(.75) * 2 + .25 * 4 - np.log(.5) * -1 + .25 * 1 \
        + .01 * (.25 * np.log(.35) + .75 * np.log(.85) + np.log(.6))
    assert loss_of(p, v, actions, returns, [2, -1]) == pytest.approx(by_hand)
    assert float(processes.compute_loss(*map(tf.constant, (p, v, actions, returns)))) \
        == pytest.approx(by_hand)


def test_gradients_equal_finite_differences_of_the_loss_in_a_random_direction(policy, rng):
    x = rng.normal(size=(4, 16))
    actions = [0, 1, 1, 0]
    returns = [3., -1, 2, .5]
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
    m1 = .01 * first ** 2
    m2 = .99 * m1 + .01 * second ** 2
    expected = start - 1e-2 * first / (np.sqrt(m1) + .1) - 1e-3 * second / (np.sqrt(m2) + .1)
    np.testing.assert_allclose(w, expected, rtol=1e-12)


class Game(FakeEnv, processes.gym.Env):
    """Episodes of three steps. A frame holds the number of the step / 100; the first one .05."""

    def __init__(self):
        super().__init__(3)

    def reset(self, **options):
        frame, info = super().reset(**options)
        return frame + np.float32(.05), info


def test_frames_begin_as_the_first_one_repeated_and_then_move_up():
    env = processes.StackEnv(Game())
    assert env.reset()[0][::4] == pytest.approx([.05] * 4)
    env.step(0)
    o, *others = env.step(0)
    assert o[::4] == pytest.approx([.05, .05, .01, .02]) and others == [1, False, False, {}]


def test_rollouts_bootstrap_unless_the_episode_ends_and_the_rate_falls_to_0(monkeypatch):
    """`train` with rollouts of two steps at most and episodes of three."""
    monkeypatch.setattr(processes, "LOCAL_T_MAX", 2)
    monkeypatch.setattr(processes, "EPOCH", 7)
    batches, rates, episodes = [], [], []
    policy = processes.Policy()

    class Recorder:
        step = staticmethod(lambda lr, gradients: rates.append(lr))
        send = episodes.append

    def compute_gradients(weights, *batch):
        batches.append([tensor.numpy() for tensor in batch])
        return []

    processes.train(random.Random(1), policy.weights, policy, compute_gradients, Recorder,
                    processes.StackEnv(Game()), np.zeros(1, np.int64), Recorder)
    # The states in which the actions were chosen, by their last frames
    states = [np.round(100 * observations[:, -1]).tolist() for observations, _, _ in batches]
    assert states == [[5, 1], [2], [5, 1], [2], [5, 1]]
    _, v = policy.forward(np.repeat(np.float32([.05, .05, .01, .02]), 4))
    np.testing.assert_allclose(batches[0][2], processes.compute_returns([1, 1], v), rtol=1e-5)
    assert batches[1][2] == [1]
    assert rates == pytest.approx([processes.LR * left / 7 for left in (5, 4, 2, 1, 0)])
    assert episodes == [3, 3]


# -- processes

def add_one(shared):
    for array in processes.as_arrays(shared, processes.Policy()):
        array += 1


def test_a_write_by_one_process_is_seen_by_another_but_not_by_a_copy(policy):
    shared = [mp.RawArray("f", w.ravel()) for w in policy.weights]
    before = [np.float32(w) for w in policy.weights]
    global_weights = processes.as_arrays(shared, policy)
    policy.sync(global_weights)
    process = mp.get_context(processes.quick_start()).Process(target=add_one, args=(shared,))
    process.start()
    process.join(60)
    for old, seen, copied in zip(before, global_weights, policy.weights):
        np.testing.assert_array_equal(seen, old + 1)
        np.testing.assert_array_equal(copied, old)


def run_main(folder):
    """Run the program in this process, with two others; return its exit status."""
    return processes.main(["--num-process", "2", "--no-render", "--test-episodes", "3",
                           "--out", str(folder)])


def test_two_processes_learn_and_the_clock_starts_at_the_first_episode(
        tmp_path, capfd, monkeypatch):
    clock_starts = []
    start_clock = common.Run.start_clock
    monkeypatch.setattr(common.Run, "start_clock",
                        lambda run: clock_starts.append(len(run.history)) or start_clock(run))
    assert run_main(tmp_path) == 0
    out, err = capfd.readouterr()
    assert "process_0  episode 1  " in out and "process_1  episode 1  " in out and not err
    assert float(out.split()[-2]) > 190         # the mean of the test
    assert clock_starts == [0, 0]               # at the start of the run, and at the first episode


def run_failing(*args):
    processes.train = None
    processes.run_process(*args)


def run_killed(*args):
    """Let process_0 be killed after its first rollout. process_1 goes on."""
    if mp.current_process().name == "process_0":
        processes.compute_returns = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    processes.run_process(*args)


def run_until_300(*args):
    processes.EPOCH = 300
    processes.run_process(*args)


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("run_process, status", [
    (run_failing, "error: process_. ended with exit code 1"),
    (run_killed, "error: process_0 ended with exit code -9"), (run_until_300, "1")])
def test_a_process_that_fails_or_makes_the_last_step_ends_the_run_with_weights(
        tmp_path, monkeypatch, run_process, status):
    monkeypatch.setattr(processes, "run_process", run_process)
    with pytest.raises(SystemExit, match=f"^{status}$"):
        sys.exit(run_main(tmp_path))
    assert (tmp_path / "a3c_processes.unfinished.weights.h5").exists()
    assert not mp.active_children()


# -- as a user starts it

def test_processes_end_when_the_main_process_is_killed(tmp_path):
    process = start_python(ROOT / "companions" / "a3c_processes.py", "--num-process", 2,
                           cwd=tmp_path)
    assert process.stdout.readline().startswith("process_")
    process.kill()
    _, error = process.communicate(timeout=60)      # until all have ended that could write to it
    assert error == ""
