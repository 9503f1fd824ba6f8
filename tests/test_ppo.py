"""companions/ppo_cartpole.py: returns and advantages, the clipped loss, the update, a whole run."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, run_python

from companions import ppo_cartpole as ppo

NAME = "companions.ppo_cartpole"


def episode(rng, steps):
    """A Memory of random steps, each value and reward unlike the others."""
    memory = ppo.Memory()
    for _ in range(steps):
        state = rng.normal(size=ppo.NUM_STATES).astype(np.float32)
        action = int(rng.integers(2))
        memory.add(state, action, rng.normal(), rng.normal(), np.log(rng.uniform(0.3, 0.7)))
    return memory


def batch_of(rng, steps):
    memory = episode(rng, steps)
    memory.finish_path()
    return memory.get_batch()


@pytest.fixture
def agent():
    return ppo.Agent(ppo.PVNet(seed=3, droprate=0), seed=3)


def losses_of(pi, value, rows):
    batch = np.array(rows, np.float32)
    return [float(x) for x in ppo.Agent.losses(tf.constant(pi), tf.constant(value), batch)]


def test_return_and_advantage_of_three_steps_computed_by_hand():
    memory = ppo.Memory()
    for reward, value in (0, 0.5), (0, 1), (1, 2):
        memory.add(np.zeros(4), 0, reward, value, 0)
    memory.finish_path(gamma=0.5, lam=0.5)
    assert memory.return_lst.tolist() == [0.25, 0.5, 1]
    # δ = 0 + .5·1 - .5, 0 + .5·2 - 1, 1 + 0 - 2; A = δ + .25·A of the next step
    assert memory.advantage_lst.tolist() == [-0.0625, -0.25, -1]


@pytest.mark.parametrize("steps", [2, 9, 200])
def test_return_and_advantage_equal_the_sums_that_define_them(rng, steps):
    memory = episode(rng, steps)
    memory.finish_path()
    _, _, r, v, _ = map(np.array, zip(*[(0, 0, *step[2:4], 0) for step in memory.steps]))
    delta = r + 0.99 * np.append(v[1:], 0) - v
    for t in range(steps):
        k = np.arange(steps - t)
        assert memory.return_lst[t] == pytest.approx((0.99**k * r[t:]).sum())
        assert memory.advantage_lst[t] == pytest.approx(((0.99 * 0.95) ** k * delta[t:]).sum())


def test_batch_standardises_the_advantage_pads_with_zeros_and_empties_the_memory(rng):
    memory = episode(rng, 30)
    memory.finish_path()
    steps, advantage, returns = list(memory.steps), memory.advantage_lst, memory.return_lst
    batch = memory.get_batch()
    assert batch.shape == (200, 10) and not batch[30:].any() and memory.steps == []
    np.testing.assert_array_equal(batch[:30, :4], [step[0] for step in steps])
    np.testing.assert_array_equal(batch[:30, 4:6].argmax(axis=1), [step[1] for step in steps])
    np.testing.assert_array_equal(batch[:30, 4:6].sum(axis=1), 1)
    np.testing.assert_allclose(batch[:30, 6], [step[4] for step in steps], rtol=1e-6)
    np.testing.assert_allclose(batch[:30, 7], returns, rtol=1e-6)
    expected = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(batch[:30, 8], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch[:30, 9], 1)


@pytest.mark.parametrize("ratio, advantage, expected", [
    (1.1, 2, 2.2), (1.5, 2, 2.4), (0.5, 2, 1.0),        # above the clip a good action earns no more
    (0.9, -2, -1.8), (0.5, -2, -1.6), (1.5, -2, -3.0)])     # below it a bad one loses no less
def test_policy_loss_is_clipped_on_the_side_of_the_advantage_only(ratio, advantage, expected):
    row = [0, 0, 0, 0, 1, 0, np.log(0.4), 0, advantage, 1]
    pi = np.array([[0.4 * ratio, 1 - 0.4 * ratio]], np.float32)
    pi_loss, _, _, gain = losses_of(pi, np.zeros((1, 1), np.float32), [row])
    assert pi_loss == pytest.approx(-expected, rel=1e-5)
    assert gain == pytest.approx(np.log(ratio), abs=1e-6)


def test_losses_equal_numpy_and_padding_changes_none(rng):
    batch = batch_of(rng, 40)
    p = rng.uniform(0.05, 0.95, 200).astype(np.float32)
    pi, value = np.stack([p, 1 - p], axis=1), rng.normal(size=(200, 1)).astype(np.float32)
    b, q, v = batch[:40].astype(float), pi[:40].astype(float), value[:40, 0]
    log_ratio = np.log((q * b[:, 4:6]).sum(axis=1)) - b[:, 6]
    ratio, advantage = np.exp(log_ratio), b[:, 8]
    assert ((ratio > 1.2) & (advantage > 0)).any() and ((ratio < 0.8) & (advantage < 0)).any()
    expected = [-np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).mean(),
                0.9 * ((b[:, 7] - v) ** 2).mean(),
                1e-3 * (q * np.log(q)).sum(axis=1).mean(), log_ratio.mean()]
    for rows in 40, 41, 200:
        assert losses_of(pi[:rows], value[:rows], batch[:rows]) == pytest.approx(expected, rel=1e-4)


def test_update_equals_as_many_steps_of_keras_adam(agent, rng, monkeypatch):
    batch = batch_of(rng, 70)
    twin = ppo.PVNet(seed=3, droprate=0)
    adam = keras.optimizers.Adam(1e-4, epsilon=1e-8)
    for iteration in range(12):
        with tf.GradientTape() as tape:
            *losses, _ = ppo.Agent.losses(*twin(batch[:, :4], training=True), batch)
            loss = sum(losses)
        gradients = tape.gradient(loss, twin.trainable_variables)
        adam.apply_gradients(zip(gradients, twin.trainable_variables))
    before = agent.theta
    monkeypatch.setattr(ppo, "TRAIN_ITERS", 6)
    monkeypatch.setattr(ppo, "MAX_GAIN", np.inf)
    agent.update(batch)
    agent.update(batch)     # Adam's moments and its count go on from update to update
    assert agent.iterations == 12
    expected = np.concatenate([weight.ravel() for weight in twin.get_weights()])
    assert np.abs(expected - before).max() > 1e-3
    np.testing.assert_allclose(agent.theta, expected, atol=1e-5)


def test_iterations_end_with_the_first_that_found_the_gain_above_its_limit(agent, rng, monkeypatch):
    batch = batch_of(rng, 50)
    batch[:50, 4:6], batch[:50, 8] = [1, 0], 1      # one action, always good: it becomes likelier

    def log_pi():
        agent.model.set_weights(agent.unpack(agent.theta))
        return np.log(agent.model(batch[:50, :4])[0].numpy()[:, 0])

    batch[:50, 6] = start = log_pi()
    monkeypatch.setattr(ppo, "TRAIN_ITERS", 1)
    gains = []                  # that iteration 1, 2, … finds, before its own step of Adam
    while not gains or gains[-1] <= 1.5 * 0.01:
        gains.append((log_pi() - start).mean())
        agent.update(batch)
    assert 2 < len(gains) < 80
    monkeypatch.undo()
    fresh = ppo.Agent(ppo.PVNet(seed=3, droprate=0), seed=3)
    fresh.update(batch)
    assert fresh.iterations == len(gains)
    np.testing.assert_allclose(fresh.theta, agent.theta, atol=1e-6)


def test_iterations_end_at_80(agent, rng):
    batch = batch_of(rng, 50)
    batch[:50, 6] = 0       # log π_old = 0 (π_old = 1): no action can become likelier
    agent.update(batch)
    assert agent.iterations == 80


def test_action_value_and_log_pi_equal_the_keras_model(agent, rng):
    for state in rng.normal(size=(20, 4)).astype(np.float32):
        pi, value = agent.model(state[None])
        action, v, log_pi = agent.get_action(state)
        assert v == pytest.approx(float(value[0, 0]), abs=1e-5)
        assert np.exp(log_pi) == pytest.approx(float(pi[0, action]), abs=1e-6)
        assert agent.get_action(state, greedy=True)[0] == int(np.argmax(pi[0]))


def test_dropout_leaves_out_a_fifth_anew_at_each_call_and_nothing_when_acting():
    net, ones = ppo.PVNet(seed=1), np.ones((200, 64), np.float32)
    layer = next(layer for layer in net.layers if isinstance(layer, ppo.Dropout))
    draw = tf.function(lambda: (layer(ones, training=True), layer(ones, training=True)),
                       jit_compile=True)
    first, second = (h.numpy() for h in draw())
    assert np.unique(first).tolist() == [0, 1.25]       # 1.25 · .8 = 1: the mean stays
    assert (first == 0).mean() == pytest.approx(0.2, abs=0.02)
    assert ((first == 0) & (second == 0)).mean() == pytest.approx(0.04, abs=0.01)
    np.testing.assert_array_equal(layer(ones), ones)


def test_weights_start_as_pytorchs_xavier_normal():
    for kernel, bias in zip(*[iter(ppo.PVNet(seed=5).get_weights())] * 2):
        sigma = np.sqrt(2 / sum(kernel.shape))
        assert not bias.any()
        if kernel.size > 1000:
            assert kernel.std() == pytest.approx(sigma, rel=0.05)
            assert np.abs(kernel).max() > 2.5 * sigma       # a truncated normal ends at 2.3


def test_reward_is_one_at_an_end_from_step_195_on_and_minus_one_at_a_fall():
    ends = {step: ppo.reward_modify(step, True) for step in (9, 194, 195, 200)}
    assert ends == {9: -1, 194: -1, 195: 1, 200: 1}
    assert ppo.reward_modify(195, False) == ppo.reward_modify(10, False) == 0


def test_update_refuses_what_is_not_finite_and_compiles_once_for_all_lengths(agent, rng):
    for steps in 9, 60, 200:
        agent.update(batch_of(rng, steps))
    assert agent.graph.experimental_get_tracing_count() == 1
    theta, bad = agent.theta, batch_of(rng, 20)
    bad[3, 7] = np.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        agent.update(bad)
    assert agent.theta is theta


def test_run_that_does_not_learn_says_so_keeps_weights_and_repeats_with_its_seed(tmp_path):
    histories = []
    for folder in tmp_path / "a", tmp_path / "b":
        run = run_python("-m", NAME, "--episodes", 3, "--seed", 4, "--no-render", "--log",
                         "--out", folder, cwd=ROOT)
        assert run.returncode == 1 and run.stderr == ""
        assert "not learned within 3 episodes: " in run.stdout
        with open(folder / "history.csv", newline="") as file:
            histories.append([row["steps"] for row in csv.DictReader(file)])
        assert {"PPO.unfinished.weights.h5", "learning_curve.png"} <= {
            path.name for path in folder.iterdir()}
    assert len(histories[0]) == 3 and histories[0] == histories[1]


def test_run_by_its_path_plays_the_weights_of_a_run(tmp_path):
    ppo.PVNet(seed=2).save_weights(tmp_path / "PPO.weights.h5")
    run = run_python(ROOT / "companions" / "ppo_cartpole.py", "--play", "PPO.weights.h5",
                     "--test-episodes", 2, "--no-render", "--out", "films", cwd=tmp_path)
    assert run.returncode == 0 and "test: mean of 2 episodes" in run.stdout
    assert len(list((tmp_path / "films").glob("PPO-episode-*.mp4"))) == 2


@pytest.mark.parametrize("arguments, word", [
    (["--episodes", "0"], "--episodes"), (["--play", "nothing.weights.h5"], "--play")])
def test_bad_argument_costs_one_line_and_status_2(tmp_path, arguments, word, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ppo.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and word in error and error.count("\n") == 1
