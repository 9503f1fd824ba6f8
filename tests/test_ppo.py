"""companions/ppo_cartpole.py: returns and advantages, the clipped loss, the update, whole runs."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import frames_of

from companions import ppo_cartpole as ppo


def memory_of(rng, steps):
    """A Memory of random steps, each reward and value unlike the others."""
    memory = ppo.Memory()
    for _ in range(steps):
        state = rng.normal(size=4).astype(np.float32)
        action = int(rng.integers(2))
        memory.add(state, action, rng.normal(), rng.normal(), np.log(rng.uniform(0.3, 0.7)))
    return memory


def batch_of(rng, steps):
    memory = memory_of(rng, steps)
    memory.finish_path()
    return memory.get_batch()


def agent_without_dropout():
    return ppo.Agent(ppo.PVNet(seed=3, droprate=0), seed=3)


@pytest.fixture
def rng():
    return np.random.default_rng(20180901)


@pytest.fixture(scope="module")
def untrained():
    """An agent that no test changes. Its biases are not 0."""
    agent = ppo.Agent(ppo.PVNet(seed=5), seed=5)
    rng = np.random.default_rng(5)
    agent.weights = [rng.normal(size=w.shape).astype(np.float32) / 4 for w in agent.weights]
    agent.model.set_weights(agent.weights)
    return agent


# -- Memory


def test_return_and_advantage_of_three_steps_computed_by_hand():
    memory = ppo.Memory()
    for reward, value in (0, 0.5), (0, 1), (1, 2):
        memory.add(np.zeros(4), 0, reward, value, 0)
    memory.finish_path(gamma=0.5, lam=0.5)
    assert memory.return_lst.tolist() == [0.25, 0.5, 1]
    # δ = 0 + .5·1 - .5, 0 + .5·2 - 1, 1 + 0 - 2; A = δ + .25·A of the next step
    assert memory.advantage_lst.tolist() == [-0.0625, -0.25, -1]


@pytest.mark.parametrize("steps", [1, 9, 200])
def test_return_and_advantage_equal_the_sums_that_define_them(rng, steps):
    memory = memory_of(rng, steps)
    memory.finish_path()
    r = np.array(memory.reward_lst)
    v = np.array(memory.value_lst)
    delta = r + 0.99 * np.append(v[1:], 0) - v
    for t in range(steps):
        k = np.arange(steps - t)
        assert memory.return_lst[t] == pytest.approx((0.99**k * r[t:]).sum())
        assert memory.advantage_lst[t] == pytest.approx(((0.99 * 0.95) ** k * delta[t:]).sum())


def test_advantage_is_return_minus_value_if_lambda_is_1(rng):
    memory = memory_of(rng, 30)
    memory.finish_path(lam=1)
    np.testing.assert_allclose(memory.advantage_lst, memory.return_lst - memory.value_lst)


def test_batch_holds_the_episode_with_standardized_advantages_and_empties_the_memory(rng):
    memory = memory_of(rng, 30)
    memory.finish_path()
    kept = {**vars(memory)}
    state, action, old_log_pi, returns, advantage = memory.get_batch()
    assert not any(len(entries) for entries in vars(memory).values())
    np.testing.assert_array_equal(state, kept["state_lst"])
    np.testing.assert_array_equal(action, kept["action_lst"])
    np.testing.assert_allclose(old_log_pi, kept["log_pi_lst"], rtol=1e-6)
    np.testing.assert_allclose(returns, kept["return_lst"], rtol=1e-6)
    raw = kept["advantage_lst"]
    expected = (raw - raw.mean()) / (raw.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(advantage, expected, rtol=1e-5, atol=1e-6)


# -- losses


def losses_of(pi, value, *batch):
    columns = [np.asarray(column, np.float32) for column in batch[1:]]
    losses = ppo.Agent.losses(
        tf.constant(pi, tf.float32), tf.constant(value, tf.float32), batch[0], *columns
    )
    return [float(loss) for loss in losses]


@pytest.mark.parametrize("ratio, advantage, expected", [
    (1.1, 2, 2.2), (1.5, 2, 2.4), (0.5, 2, 1.0),        # above the clip a good action gains nothing
    (0.9, -2, -1.8), (0.5, -2, -1.6), (1.5, -2, -3.0)])     # below it a bad one gains nothing
def test_policy_loss_is_clipped_in_the_direction_of_the_advantage_only(ratio, advantage, expected):
    pi = [[0.4 * ratio, 1 - 0.4 * ratio]]
    pi_loss, _, _, mean_log_ratio = losses_of(pi, [[0]], [0], [np.log(0.4)], [0], [advantage])
    assert pi_loss == pytest.approx(-expected, rel=1e-5)
    assert mean_log_ratio == pytest.approx(np.log(ratio), abs=1e-6)


def test_losses_equal_numpy(rng):
    state, action, old_log_pi, returns, advantage = batch_of(rng, 40)
    p = rng.uniform(0.05, 0.95, 40)
    pi = np.stack([p, 1 - p], axis=1)
    value = rng.normal(size=(40, 1))
    log_ratio = np.log(pi[np.arange(40), action]) - old_log_pi
    ratio = np.exp(log_ratio)
    assert ((ratio > 1.2) & (advantage > 0)).any() and ((ratio < 0.8) & (advantage < 0)).any()
    clipped = np.clip(ratio, 0.8, 1.2)
    expected = [
        -np.minimum(ratio * advantage, clipped * advantage).mean(),
        np.mean([(returns[t] - value[t, 0]) ** 2 for t in range(40)]),  # each with its own return
        -(pi * np.log(pi)).sum(axis=1).mean(),
        log_ratio.mean(),
    ]
    got = losses_of(pi, value, action, old_log_pi, returns, advantage)
    assert got == pytest.approx(expected, rel=1e-4)


# -- update


def test_updates_equal_keras_adam_on_the_papers_loss_for_all_lengths_compiled_once(
        rng, monkeypatch):
    short = batch_of(rng, 9)
    long = batch_of(rng, 200)
    twin = ppo.PVNet(seed=3, droprate=0)
    adam = keras.optimizers.Adam(1e-4, epsilon=1e-8)
    for batch in [short] * 6 + [long] * 6:
        with tf.GradientTape() as tape:
            pi, value = twin(batch[0], training=True)
            pi_loss, v_loss, entropy, _ = ppo.Agent.losses(pi, value, *batch[1:])
            loss = pi_loss + 0.9 * v_loss - 1e-3 * entropy
        adam.apply(tape.gradient(loss, twin.trainable_variables), twin.trainable_variables)
    monkeypatch.setattr(ppo, "TRAIN_ITERS", 6)
    monkeypatch.setattr(ppo, "TARGET_KL", np.inf)
    agent = agent_without_dropout()
    before = agent.weights
    assert agent.update(short) == 6
    assert agent.update(long) == 6  # Adam's moments and its count go on from update to update
    assert agent.iterate.experimental_get_tracing_count() == 1
    for kept, weight, expected in zip(before, agent.weights, twin.get_weights()):
        np.testing.assert_allclose(weight, expected, atol=1e-5)
        assert np.abs(weight - kept).max() > 5e-4


def test_iterations_end_with_the_first_that_finds_the_actions_1_5_percent_more_probable(
        rng, monkeypatch):
    state, action, _, returns, _ = batch_of(rng, 50)
    action[:] = 0  # one action, always good: it becomes more probable
    advantage = np.ones(50, np.float32)
    monkeypatch.setattr(ppo, "TRAIN_ITERS", 1)
    single = agent_without_dropout()

    def log_pi():
        return np.log(single.model(state)[0].numpy()[:, 0])

    start = log_pi()
    batch = state, action, start, returns, advantage
    found = []  # what iteration 1, 2, … finds, before its own step of Adam
    while not found or found[-1] <= 0.015:
        found.append((log_pi() - start).mean())
        assert single.update(batch) == 1
    assert 2 < len(found) < 80
    monkeypatch.undo()
    agent = agent_without_dropout()
    assert agent.update(batch) == len(found)
    for weight, expected in zip(agent.weights, single.weights):
        np.testing.assert_allclose(weight, expected, atol=1e-6)


def test_iterations_end_at_80_and_an_update_that_is_not_finite_changes_nothing(rng):
    state, action, _, returns, advantage = batch_of(rng, 50)
    agent = agent_without_dropout()
    certain = np.zeros(50, np.float32)  # π_old = 1: no action can become more probable
    assert agent.update((state, action, certain, returns, advantage)) == 80
    kept = agent.weights
    with pytest.raises(FloatingPointError, match="not finite"):
        agent.update((state, action, certain, returns * np.nan, advantage))
    assert agent.weights is kept
    for weight, expected in zip(agent.model.get_weights(), kept):
        np.testing.assert_array_equal(weight, expected)


# -- network and actions


def test_action_value_and_log_pi_equal_the_keras_model(untrained, rng):
    for state in rng.normal(size=(20, 4)).astype(np.float32):
        pi, value = untrained.model(state[np.newaxis])
        action, v, log_pi = untrained.get_action(state)
        assert v == pytest.approx(float(value[0, 0]), abs=1e-5)
        assert np.exp(log_pi) == pytest.approx(float(pi[0, action]), abs=1e-6)
        assert untrained.get_action(state, greedy=True)[0] == int(np.argmax(pi[0]))


def test_actions_are_drawn_by_their_probability(untrained):
    state = np.array([1, 0.5, 0.5, 0.2], np.float32)
    pi, _ = untrained.predict(state)
    drawn = [untrained.get_action(state)[0] for _ in range(4000)]
    assert 0.1 < pi[1] < 0.9 and pi[1] != pytest.approx(0.5, abs=0.03)
    assert np.mean(drawn) == pytest.approx(pi[1], abs=0.03)


def test_dropout_leaves_out_a_fifth_anew_at_each_call_and_nothing_when_acting():
    first, second = [layer for layer in ppo.PVNet(seed=1).layers if "dropout" in layer.name]
    ones = np.ones((200, 64), np.float32)
    masks = [layer(ones, training=True).numpy() for layer in (first, first, second)]
    for mask in masks:
        assert np.unique(mask).tolist() == [0, 1.25]  # 1.25 · .8 = 1: the mean stays
        assert (mask == 0).mean() == pytest.approx(0.2, abs=0.02)
    for one, other in (masks[:2], masks[1:]):
        assert ((one == 0) & (other == 0)).mean() == pytest.approx(0.04, abs=0.01)
    np.testing.assert_array_equal(first(ones), ones)


def test_weights_start_as_pytorchs_xavier_normal():
    weights = ppo.PVNet(seed=5).get_weights()
    for kernel, bias in zip(weights[::2], weights[1::2]):
        assert not bias.any()
        if kernel.size > 1000:
            sigma = np.sqrt(2 / sum(kernel.shape))
            assert kernel.std() == pytest.approx(sigma, rel=0.05)
            assert np.abs(kernel).max() > 2.5 * sigma  # a truncated normal ends at 2.3


def test_reward_is_1_at_an_end_from_step_195_on_and_minus_1_at_a_fall():
    ends = {step: ppo.reward_modify(step, True) for step in (9, 194, 195, 200)}
    assert ends == {9: -1, 194: -1, 195: 1, 200: 1}
    assert ppo.reward_modify(195, False) == ppo.reward_modify(10, False) == 0


# -- whole runs


def run(folder, *arguments):
    """Run the program in this process, and return its exit status."""
    return ppo.main(["--no-render", "--log", "--out", str(folder), *map(str, arguments)])


def steps_of(folder):
    with open(folder / "history.csv", newline="") as file:
        return [int(row["steps"]) for row in csv.DictReader(file)]


def test_run_that_does_not_learn_says_so_keeps_weights_and_repeats_with_its_seed(tmp_path, capsys):
    for folder in "a", "b":
        assert run(tmp_path / folder, "--max-episodes", 3, "--seed", 4) == 1
    assert "\nnot learned in " in capsys.readouterr().out
    assert len(steps_of(tmp_path / "a")) == 3
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b")
    weights = []
    for folder in "a", "b":
        model = ppo.PVNet(seed=1)
        model.load_weights(tmp_path / folder / "PPO.unfinished.weights.h5")
        weights.append(model.get_weights())
    assert all(np.array_equal(one, other) for one, other in zip(*weights))


def test_run_that_meets_the_rule_keeps_the_mean_of_the_weights_that_played_its_ten_episodes(
        tmp_path, capsys, monkeypatch):
    played = []

    def play_200_steps(env, agent, memory):
        state, _ = env.reset()
        for reward in 0, 0, 1:
            memory.add(state, 0, reward, 0.0, np.log(0.5))
        played.append(agent.weights)
        return 200 if len(played) > 2 else 150

    monkeypatch.setattr(ppo, "run_episode", play_200_steps)
    assert run(tmp_path, "--seed", 4, "--test-episodes", 0) == 0
    assert "\nlearned in " in capsys.readouterr().out
    assert steps_of(tmp_path) == [150] * 2 + [200] * 10
    model = ppo.PVNet(seed=1)
    model.load_weights(tmp_path / "PPO.weights.h5")
    assert not np.array_equal(played[-1][0], played[-10][0])
    for weight, ten in zip(model.get_weights(), zip(*played[-10:])):
        np.testing.assert_allclose(weight, np.mean(ten, axis=0), atol=1e-6)


def test_run_plays_and_films_the_weights_of_a_run(tmp_path, capsys, monkeypatch):
    weights = tmp_path / "PPO.weights.h5"
    saved = ppo.PVNet(seed=2)
    saved.save_weights(weights)
    played = []
    run_episode = ppo.run_episode

    def run_episode_and_note_the_weights(env, agent):
        played.append(agent.weights)
        return run_episode(env, agent)

    monkeypatch.setattr(ppo, "run_episode", run_episode_and_note_the_weights)
    assert run(tmp_path / "films", "--play", weights, "--test-episodes", 1) == 0
    assert "test: mean of 1 episodes" in capsys.readouterr().out
    for weight, expected in zip(played[0], saved.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)
    assert len(frames_of(tmp_path / "films" / "PPO-episode-0.mp4")) > 5


@pytest.mark.parametrize("arguments, word", [
    (["--max-episodes", "0"], "--max-episodes"), (["--play", "nothing.weights.h5"], "--play")])
def test_bad_argument_ends_with_status_2_and_names_it(
        tmp_path, arguments, word, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ppo.main(arguments)
    assert end.value.code == 2
    assert word in capsys.readouterr().err.splitlines()[-1]
