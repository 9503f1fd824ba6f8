"""companions/dqn_cartpole.py: targets, updates, exploration, memory, and the weights it keeps."""

from companions import dqn_cartpole
from companions.dqn_cartpole import DQN, Run

import keras
import numpy as np
import pytest
from conftest import FakeEnv

WEIGHTS = "DQN.unfinished.weights.h5"


@pytest.fixture
def agent():
    return DQN()


def states(*first_numbers):
    return [np.array([x, 0, 0, 0], np.float32) for x in first_numbers]


def short_run(folder, *options):
    return dqn_cartpole.main(["--max-episodes", "2", "--test-episodes", "1", "--no-render",
                              "--out", str(folder), *options])


def test_targets_by_hand_after_a_step_after_a_fall_and_of_the_other_action(agent):
    network = [np.zeros_like(w) for w in agent.Q]
    network[1] += 1                                     # the scaler's variance
    network[3][[0, 4, 8, 12], 0] = 1000, 100, 10, 1     # x: the states' first numbers as digits
    network[5][0, 0] = network[7][0, 0] = 1
    network[9][0] = 1, 2
    network[10][0] = 3                                  # Q⁻ is (x + 3, 2·x)
    agent.target_Q = network
    agent.memory.clear()
    for _ in range(16):
        agent._remember(states(1, 2, 3, 4), 0, 1.0, states(5)[0], False)
        agent._remember(states(1, 2, 3, 4), 1, 1.0, states(5)[0], True)
    agent_hists, Y = agent._get_samples()
    assert (agent_hists[:, ::4] == [1, 2, 3, 4]).all()
    expected = [[1234 + 3, 1], [1 + 0.99 * 2 * 2345, 2 * 1234]]
    np.testing.assert_allclose(np.unique(Y, axis=0), expected, rtol=1e-6)


@pytest.mark.parametrize("by_time_limit", [False, True])
def test_after_a_fall_no_rewards_follow_but_after_the_time_limit_they_do(
    agent, by_time_limit, tmp_path
):
    class Env(FakeEnv):
        def step(self, action):
            state, reward, ends, _, info = super().step(action)
            return state, reward, ends and not by_time_limit, ends and by_time_limit, info

    agent._replay = lambda: None
    agent.env = Env(20)
    agent.memory.clear()
    agent.learn(Run(tmp_path), 1)
    assert [done for *_, done in agent.memory] == [False] * 16 + [not by_time_limit]


def test_two_replays_equal_train_on_batch_of_a_keras_model_with_one_sample_after_another(agent):
    mean, variance, _, *weights = agent.Q
    twin = keras.Sequential([keras.Input((16,)), keras.layers.Normalization(-1, mean, variance)]
                            + [keras.layers.Dense(n, "relu") for n in (20, 20, 10)]
                            + [keras.layers.Dense(2)])
    twin.set_weights(weights)
    twin.compile(optimizer="adam", loss="mse")
    samples = [agent._get_samples(), agent._get_samples()]
    given = iter(samples)
    agent._get_samples = lambda: next(given)
    for agent_hists, Y in samples:
        agent._replay()
        for agent_hist, y in zip(agent_hists, Y):
            twin.train_on_batch(agent_hist[np.newaxis], y[np.newaxis])
    for new, expected in zip(agent.Q, [mean, variance, 0, *twin.get_weights()]):
        np.testing.assert_allclose(new, expected, atol=1e-4)
    assert np.abs(agent.Q[-1] - weights[-1]).max() > 1e-2


def test_target_network_is_renewed_after_the_replay_of_steps_0_100_200_of_each_episode(
    agent, tmp_path
):
    seen = []

    def replay():
        seen.append(agent.target_Q[-1][0])
        agent.Q = [*agent.Q[:-1], np.full(2, len(seen))]    # the last bias counts the replays

    agent.env = FakeEnv(250)
    agent._replay = replay
    agent.learn(Run(tmp_path), 2)
    # The first three steps of an episode have no replay, so step 100 has the 98th.
    first = [0] * 98 + [98] * 100 + [198] * 49
    second = [247] * 98 + [247 + 98] * 100 + [247 + 198] * 49
    assert seen == first + second


def test_epsilon_falls_from_1_to_1e_4_over_1000_choices_with_a_history_and_stays(agent):
    expected = {0: 1.0, 500: 0.50005, 1000: 1e-4, 1500: 1e-4}
    for step in range(1501):
        if step in expected:
            assert agent.eps == pytest.approx(expected[step], rel=1e-9)
        agent._get_action(states(0, 0, 0, 0))
        agent._get_action()


def test_actions_are_random_with_probability_epsilon_and_otherwise_have_the_larger_q(agent):
    agent.Q = [*agent.Q[:-1], np.array([0, 1e6])]
    agent.eps_decay = 0
    for agent.eps, expected in (1, 0.5), (0.5, 0.75), (1e-4, 1):
        mean = np.mean([agent._get_action(states(0, 0, 0, 0)) for _ in range(4000)])
        assert mean == pytest.approx(expected, abs=0.05)


def test_memory_starts_with_32_steps_that_the_scaler_normalizes_and_ends_with_the_last_2000(agent):
    agent_hists = np.array([agent_hist for agent_hist, *_ in agent.memory])
    assert agent_hists.shape == (32, 16)
    scaled = agent.scaler(agent_hists).numpy()
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-3)
    for number in range(2010):
        agent._remember(states(number, 0, 0, 0), 0, 1.0, states(0)[0], False)
    assert [agent_hist[0] for agent_hist, *_ in agent.memory] == list(range(10, 2010))


def test_kept_weights_are_the_mean_of_the_target_networks_of_the_ten_best_episodes(tmp_path):
    run = Run(tmp_path)
    for number, score in enumerate([9] * 5 + [100] * 10 + [99] * 10):
        run.finish_episode(score, [np.array([number, -number])])
    np.testing.assert_array_equal(run.best_weights, [[9.5, -9.5]])      # the mean of 5, 6, ..., 14


def test_learning_ends_when_ten_episodes_have_a_mean_above_499_steps(agent, tmp_path):
    agent._replay = lambda: None
    agent.env = FakeEnv(500)
    run = Run(tmp_path)
    agent.learn(run, 20)
    assert run.is_learned
    assert (len(run.history), run.steps) == (10, 5000)


def test_a_seed_fixes_the_first_weights_the_episodes_and_the_samples(tmp_path):
    def play():
        agent = DQN(seed=7)
        samples = []
        agent._replay = lambda: samples.extend(agent._get_samples())
        agent.learn(Run(tmp_path), 3)
        return [*agent.Q, *samples]

    for one, other in zip(play(), play(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_that_did_not_learn_is_kept_and_tested_and_its_weights_can_be_played(
    tmp_path, capsys
):
    assert short_run(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "\nnot learned in " in printed
    assert "test: mean of 1 episodes" in printed
    files = {path.name for path in tmp_path.iterdir()}
    assert {"DQN-episode-0.mp4", WEIGHTS, "history.csv", "learning_curve.png"} <= files
    assert short_run(tmp_path, "--play", str(tmp_path / WEIGHTS)) == 0
    assert "test: mean of 1 episodes" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupt(agent):
        raise KeyboardInterrupt

    monkeypatch.setattr(DQN, "_replay", interrupt)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path)
    assert {WEIGHTS, "history.csv"} <= {path.name for path in tmp_path.iterdir()}


def test_a_network_in_numpy_that_differs_from_the_keras_model_ends_the_program(
    tmp_path, monkeypatch
):
    right = DQN._predict
    monkeypatch.setattr(DQN, "_predict", lambda _, network, x: right([*network[:-1], 0], x))
    with pytest.raises(SystemExit, match="two different networks"):
        short_run(tmp_path)


def test_weights_of_another_network_are_refused_with_status_2(tmp_path, capsys):
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(SystemExit) as stopped:
        short_run(tmp_path, "--play", str(tmp_path / "other.weights.h5"))
    assert stopped.value.code == 2
    assert "other.weights.h5 does not hold the weights" in capsys.readouterr().err
