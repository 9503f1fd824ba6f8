"""a3c_processes.py: the arithmetic in this process, then processes that share memory."""

import contextlib
import csv
import multiprocessing as mp
import os
import re
import signal
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, frames_of, start_python

import a3c_cartpole as base
from companions import a3c_processes as processes

FILE = ROOT / "companions" / "a3c_processes.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def options(tmp_path, *arguments):
    return processes.read_options(["--seed", "7", "--out", str(tmp_path), *arguments])


@pytest.fixture(scope="module")
def policy():
    """A policy with random weights. No test may change it."""
    return processes.Policy(2, 4, 4, seed=7)


# -- the arithmetic


def test_the_defaults_are_the_posts(tmp_path):
    args = options(tmp_path)
    assert (args.num_process, args.local_t_max, args.frame_num) == (8, 50, 4)
    assert (args.lr, args.eps, args.epoch) == (0.0011, 0.1, 10_000_000)
    assert (args.entropy_beta, args.v_loss_coeff, args.save_mode) == (0.01, 0.5, "max")


def test_first_weights_are_uniform_up_to_one_over_the_root_of_the_inputs(policy):
    for layer in policy.model.layers[1:]:
        kernel, bias = layer.get_weights()
        bound = len(kernel) ** -0.5
        assert np.abs(kernel).max() <= bound and np.abs(bias).max() <= bound
        assert np.abs(kernel).max() > 0.95 * bound and bias.any()


def test_forward_equals_the_keras_model(policy):
    x = np.random.default_rng(1).normal(size=(9, 16)).astype(np.float32)
    p, v = map(np.asarray, policy.model(x))
    for i in range(9):
        p_i, v_i = policy.forward(x[i])
        np.testing.assert_allclose(p_i, p[i], atol=1e-6)
        np.testing.assert_allclose(v_i, v[i, 0], atol=1e-6)


def test_sync_makes_a_copy_that_later_updates_do_not_change():
    policy = processes.Policy(2, 4, 1)
    theta = np.arange(policy.theta.size, dtype=np.float32)
    policy.sync(theta)
    theta += 1
    assert policy.theta[0] == 0 and policy.weights[0][0, 0] == 0


def test_gradient_equals_finite_differences_of_the_posts_loss(policy, tmp_path):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 16))
    a = np.array([0, 1, 1, 0])
    R = np.array([3.0, -1, 2, 0.5])
    weights = [rng.normal(scale=0.3, size=w.shape) for w in policy.weights]

    def forward(weights):
        twin = types.SimpleNamespace(weights=weights)
        return map(np.array, zip(*[processes.Policy.forward(twin, row) for row in x]))

    _, v = forward(weights)
    constant_advantage = R - v

    def loss(weights):
        p, v = forward(weights)
        return np.sum(
            -np.log(p[range(4), a]) * constant_advantage
            + 0.5 * 0.5 * (R - v) ** 2
            + 0.01 * np.sum(p * np.log(p + 0.1), axis=1)
        )

    compute_gradient = processes.compile_gradient(policy, options(tmp_path))
    theta = policy.pack(weights).astype(np.float32)
    tensors = theta, x.astype(np.float32), a.astype(np.int32), R.astype(np.float32)
    gradient = compute_gradient(*map(processes.tf.constant, tensors)).numpy()
    for n, gradient_n in enumerate(policy.unpack(gradient)):
        for i in {tuple(rng.integers(0, gradient_n.shape)) for _ in range(8)}:
            both = []
            for sign in 1, -1:
                shifted = [array.copy() for array in weights]
                shifted[n][i] += sign * 1e-5
                both.append(loss(shifted))
            expected = (both[0] - both[1]) / 2e-5
            assert gradient_n[i] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_step_is_rmsprop_from_zero_with_eps_beside_the_root_and_writes_into_the_memory():
    rng = np.random.default_rng(3)
    start, first, second = rng.normal(size=(3, 6))
    theta = start.copy()
    optimizer = processes.AsyncRMSprop(theta, np.zeros(6), eps=0.1)
    optimizer.step(1e-2, first)
    optimizer.step(1e-3, second)
    g1 = 0.01 * first**2
    g2 = 0.99 * g1 + 0.01 * second**2
    expected = start - 1e-2 * first / (np.sqrt(g1) + 0.1) - 1e-3 * second / (np.sqrt(g2) + 0.1)
    np.testing.assert_allclose(theta, expected, rtol=1e-12)


def test_normalised_returns_have_mean_0_and_the_samples_deviation_beside_eps():
    np.testing.assert_allclose(processes.normalise(np.array([1.0, 2, 3]), 0.5), [-2 / 3, 0, 2 / 3])
    assert processes.normalise(np.array([4.0]), 0.5) == [4]


def test_frames_begin_as_the_first_one_repeated_and_then_move_up():
    env = processes.StackEnv(processes.make_env(), 4)
    first = env.reset()
    assert first.shape == (16,) and (first.reshape(4, 4) == first[:4]).all()
    second, reward, done = env.step(0)
    np.testing.assert_array_equal(second[:12], first[4:])
    assert (second[12:] != first[12:]).any() and (reward, done) == (1, False)


# -- the loop of a process


class ShortEpisodes:
    """An environment in which every episode lasts three steps and every reward is 1."""

    def __init__(self):
        self.step_count = 0

    def seed(self, seed):
        pass

    def reset(self):
        self.step_count = 0
        return np.zeros(16, np.float32)

    def step(self, action):
        self.step_count += 1
        return np.full(16, self.step_count, np.float32), 1.0, self.step_count == 3


class Listener:
    """Stands in for the optimizer and the report of a process, and notes what it is told."""

    def __init__(self):
        self.rates = []
        self.episodes = []

    def step(self, lr, gradient):
        self.rates.append(lr)

    def finish_episode(self, *episode):
        self.episodes.append(episode)


def run_loop(monkeypatch, tmp_path, gradient, *arguments):
    """Run `train` on short episodes; return the listener and the batches of the gradients."""
    batches = []

    def compute_gradient(theta, *batch):
        batches.append([tensor.numpy() for tensor in batch])
        return processes.tf.constant(gradient)

    monkeypatch.setattr(processes, "compile_gradient", lambda policy, args: compute_gradient)
    policy = processes.Policy(2, 4, 4, seed=7)
    listener = Listener()
    global_t = np.zeros(1, np.int64)
    args = options(tmp_path, "--local-t-max", "2", *arguments)
    processes.train(0, policy.theta.copy(), policy, listener, ShortEpisodes(), global_t, listener,
                    args)
    return listener, batches, policy


def test_a_rollout_ends_with_the_episode_or_goes_on_with_v_of_the_next_state(monkeypatch, tmp_path):
    listener, batches, policy = run_loop(monkeypatch, tmp_path, [0.0], "--epoch", "6")
    assert [len(actions) for _, actions, _ in batches] == [2, 1, 2, 1]
    assert [states[:, 0].tolist() for states, _, _ in batches] == [[0, 1], [2], [0, 1], [2]]
    _, v = policy.forward(np.full(16, 2, np.float32))
    expected = processes.normalise(np.array([1 + 0.99 * (1 + 0.99 * v), 1 + 0.99 * v]), 0.1)
    np.testing.assert_allclose(batches[0][2], expected, rtol=1e-4)
    assert batches[1][2] == [1]
    assert [(steps, t) for steps, _, t in listener.episodes] == [(3, 3), (3, 6)]


def test_the_learning_rate_falls_to_zero_at_the_last_step_and_not_below(monkeypatch, tmp_path):
    listener, _, _ = run_loop(monkeypatch, tmp_path, [0.0], "--epoch", "4", "--lr", "0.8")
    assert listener.rates == pytest.approx([0.4, 0.2, 0])


def test_a_gradient_that_is_not_finite_is_an_error_before_it_changes_theta(monkeypatch, tmp_path):
    with pytest.raises(FloatingPointError, match="after 2 steps"):
        run_loop(monkeypatch, tmp_path, [np.nan])


# -- which weights are kept


def kept_weights(rank, save_mode, episodes):
    """Of each episode, the first number of the weights that the process wants to be kept."""
    sent = []
    report = processes.Report(rank, types.SimpleNamespace(send=sent.append), save_mode)
    for n, steps in enumerate(episodes):
        report.finish_episode(steps, np.full(2, n, np.float32), 0)
    return [None if weights is None else weights[0] for *_, weights in sent]


def test_after_ten_full_episodes_the_mean_of_their_ten_thetas_is_kept():
    assert kept_weights(1, "max", [20] + [200] * 10) == [None] * 10 + [5.5]


@pytest.mark.parametrize("mode, kept", [
    ("last", [0, 1, 2, 3]), ("all", [0, 1, 2, 3]), ("max", [0, 1, None, 3])])
def test_save_mode_max_keeps_the_weights_of_the_best_episode_of_process_0(mode, kept):
    assert kept_weights(0, mode, [20, 50, 50, 60]) == kept
    assert kept_weights(1, mode, [20, 50, 50, 60]) == [None] * 4


# -- processes


def add_one(shared):
    np.frombuffer(shared, np.float32)[:] += 1


def test_a_write_by_one_process_is_seen_by_another():
    shared = processes.share_memory(np.array([3, 4], np.float32))
    process = mp.get_context(processes.START_METHOD).Process(target=add_one, args=(shared,))
    process.start()
    process.join(60)
    assert np.frombuffer(shared, np.float32).tolist() == [4, 5]


def run_main(folder, *arguments):
    """Run the program in this process, with two others; return its exit status."""
    return processes.main(["--num-process", "2", "--no-render", "--log", "--out", str(folder),
                           *arguments])


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_learn_and_what_they_have_learned_can_be_played(tmp_path, capfd):
    assert run_main(tmp_path, "--test-episodes", "0") == 0
    out, err = capfd.readouterr()
    assert re.search(r"^learned in [\d.]+ s: \d+ steps, \d+ episodes, 2 workers, ", out, re.M)
    assert not err
    assert {row["thread"] for row in history(tmp_path)} == {"process_0", "process_1"}
    assert float(history(tmp_path)[-1]["mean_of_last_10"]) > 199

    weights = tmp_path / "a3c_processes.weights.h5"
    played = tmp_path / "played"
    assert run_main(played, "--play", str(weights), "--test-episodes", "1") == 0
    steps = int(re.search(r"test  episode 1  steps (\d+)", capfd.readouterr().out)[1])
    assert [film.name for film in played.iterdir()] == ["a3c_processes-episode-0.mp4"]
    frames = len(frames_of(played / "a3c_processes-episode-0.mp4"))
    assert steps > 150 and frames in (steps, steps + 1)     # moviepy rounds


def test_a_spawned_process_learns_until_the_last_step(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(processes, "START_METHOD", "spawn")
    assert run_main(tmp_path, "--num-process", "1", "--epoch", "300") == 1
    out, err = capfd.readouterr()
    assert "not learned in" in out and not err
    assert 300 <= int(re.search(r"(\d+) steps,", out)[1]) < 300 + 50


def test_processes_end_after_the_last_step_and_mode_all_leaves_every_file(tmp_path, capfd):
    assert run_main(tmp_path, "--epoch", "300", "--save-mode", "all") == 1
    out, err = capfd.readouterr()
    assert "not learned in" in out and not err
    steps = int(re.search(r"(\d+) steps,", out)[1])
    assert 300 <= steps < 300 + 2 * 50
    ends = {row["total_steps"] for row in history(tmp_path) if row["thread"] == "process_0"}
    names = {f"a3c_processes.{end}.weights.h5" for end in ends | {"unfinished"}}
    assert {path.name for path in tmp_path.glob("*.h5")} == names


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_killed_process_ends_the_run_with_one_line_and_the_weights_are_saved(tmp_path, capfd):
    def kill_one():
        while len(mp.active_children()) < 2:
            time.sleep(.1)
        time.sleep(1)
        mp.active_children()[0].kill()

    threading.Thread(target=kill_one).start()
    assert run_main(tmp_path, "--lr", "0") == 1
    out, err = capfd.readouterr()
    assert re.fullmatch(r"error: process_[01] was killed by signal 9\n", err)
    assert re.search("not learned, process_[01] failed, in", out)
    base.load_weights(processes.Policy(2, 4, 4).model,
                      tmp_path / "a3c_processes.unfinished.weights.h5")
    assert not mp.active_children()


def test_an_error_in_a_process_ends_the_run_and_is_shown_once(tmp_path, capfd):
    assert run_main(tmp_path, "--lr", "1e30") == 1
    out, err = capfd.readouterr()
    assert re.match(r"error: process_[01] failed:\nTraceback", err) and err.count("Traceback") == 1
    assert re.search("not learned, process_[01] failed, in", out)


@pytest.mark.parametrize("option, value", [
    ("--num-process", "0"), ("--lr", "-1"), ("--eps", "nan"), ("--entropy-beta", "much"),
    ("--save-mode", "never")])
def test_a_bad_argument_is_one_clear_line_and_status_2(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(tmp_path, option, value)
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"error: argument {option}: " in error and value in error


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_sigterm_ends_the_run_with_status_143_and_the_weights_are_saved(tmp_path, capfd):
    def terminate():
        while len(mp.active_children()) < 2 or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
            time.sleep(.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            base.run_program(lambda: run_main(tmp_path, "--lr", "0"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 128 + signal.SIGTERM and not capfd.readouterr().err
    assert (tmp_path / "a3c_processes.unfinished.weights.h5").is_file()
    assert not mp.active_children()


def processes_of(session):
    """Ids of the processes of a session, which has the id of its first process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(folder.name)) == session:
                found.append(int(folder.name))
    return found


@linux
def test_ctrl_c_and_the_parents_death_leave_no_process_and_no_shared_memory(tmp_path):
    code = f"import os, runpy, sys; os.setsid(); sys.argv = sys.argv[1:]; " \
           f"runpy.run_path({str(FILE)!r}, run_name='__main__')"
    signals = {"ctrl_c": signal.SIGINT, "death": signal.SIGKILL}
    memory = set(os.listdir("/dev/shm"))
    runs = {}
    for name in signals:
        runs[name] = start_python(
            "-c", code, FILE, "--num-process", 1, "--lr", 0, "--no-render", "--log", "--out", name,
            cwd=tmp_path)
    for name, number in signals.items():
        run = runs[name]
        with contextlib.suppress(StopIteration):
            while not next(run.stdout).startswith("process_0  episode"):
                pass
        if name == "ctrl_c":
            os.killpg(run.pid, number)      # as a terminal does
        else:
            run.send_signal(number)
        _, err = run.communicate(timeout=60)
        assert not err
        if name != "death":
            assert run.returncode == 128 + number
            assert (tmp_path / name / "a3c_processes.unfinished.weights.h5").is_file()
        assert wait_until(lambda: not processes_of(run.pid))
    assert set(os.listdir("/dev/shm")) <= memory


def wait_until(fact, seconds=30):
    end = time.monotonic() + seconds
    while not fact() and time.monotonic() < end:
        time.sleep(.1)
    return fact()
