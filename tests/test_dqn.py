"""companions/dqn_cartpole.py: targets, updates, exploration, memory and target network."""

import copy
import types

import dqn_cartpole
import gymnasium as gym
import keras
import numpy as np
import pytest
from conftest import FakeEnv


@pytest.fixture
def agent():
    return dqn_cartpole.DQN()


def states(*first_numbers):
    return [np.array([x, 0, 0, 0], np.float32) for x in first_numbers]


def test_targets_by_hand_after_a_step_after_a_fall_and_of_the_other_action(agent):
    network = [np.zeros_like(w) for w in agent.Q]
    network[1] += 1                                     # the scaler's variance
    network[3][[0, 4, 8, 12], 0] = 1000, 100, 10, 1     # x: the states' first numbers as digits
    network[5][0, 0] = network[7][0, 0] = 1
    network[9][0] = 1, 2
    network[10][0] = 3                                  # Q̂ is (x + 3, 2·x)
    agent.target_Q = network
    agent.memory.clear()
    for _ in range(16):
        agent._remember(states(1, 2, 3, 4), 0, 1., states(5)[0], False)
        agent._remember(states(1, 2, 3, 4), 1, 1., states(5)[0], True)
    agent_hists, Y = agent._get_samples()
    assert (agent_hists[:, ::4] == [1, 2, 3, 4]).all()
    expected = [[1234 + 3, 1], [1 + .99 * 2 * 2345, 2 * 1234]]
    np.testing.assert_allclose(np.unique(Y, axis=0), expected, rtol=1e-6)


@pytest.mark.parametrize("time_limit, falls", [(6, False), (500, True)])
def test_after_a_fall_no_rewards_follow_but_after_the_time_limit_they_do(agent, time_limit, falls):
    agent.env = gym.make("CartPole-v1", max_episode_steps=time_limit)
    agent._replay = lambda: None
    agent.memory.clear()
    agent.learn(types.SimpleNamespace(steps=0, finish_episode=lambda *_: True))
    *others, last = [terminated for *_, terminated in agent.memory]
    assert others and not any(others) and last == falls


def test_two_replays_equal_train_on_batch_of_a_keras_model_with_one_sample_after_another(agent):
    first = agent.Q
    mean, variance, _, *weights = first_copy = copy.deepcopy(first)
    twin = keras.Sequential([keras.Input((16,)), keras.layers.Normalization(-1, mean, variance)]
                            + [keras.layers.Dense(n, "relu") for n in (20, 20, 10)]
                            + [keras.layers.Dense(2)])
    twin.set_weights(weights)
    twin.compile(optimizer="adam", loss="mse")
    samples = [agent._get_samples(), agent._get_samples()]
    agent._get_samples = iter(samples).__next__
    agent._replay()
    second = agent.Q
    second_copy = copy.deepcopy(second)
    agent._replay()
    for agent_hist, y in zip(*map(np.concatenate, zip(*samples))):
        twin.train_on_batch(agent_hist[np.newaxis], y[np.newaxis])
    for new, expected in zip(agent.Q, [mean, variance, 0, *twin.get_weights()]):
        np.testing.assert_allclose(new, expected, atol=1e-4)
    assert np.abs(agent.Q[-1] - weights[-1]).max() > 1e-2
    # A replay changes no older list.
    assert all(map(np.array_equal, first + second, first_copy + second_copy))


def test_target_network_is_renewed_after_steps_0_100_200_of_each_episode_and_handed_over(agent):
    seen = []
    kept = []

    def replay():
        seen.append(agent.target_Q[-1][0])
        agent.Q = [*agent.Q[:-1], np.full(2, len(seen))]    # the last bias counts the replays

    def finish_episode(_worker, steps, weights):
        kept.append((steps, weights[-1][0]))
        return len(kept) == 2

    agent.env = FakeEnv(250)
    agent._replay = replay
    run = types.SimpleNamespace(steps=0, finish_episode=finish_episode)
    agent.learn(run)
    # The first three steps of an episode have no replay, so step 100 has the 98th.
    first = [0] * 98 + [98] * 100 + [198] * 49
    second = [247] * 98 + [247 + 98] * 100 + [247 + 198] * 49
    assert seen == first + second
    assert run.steps == 500
    assert kept == [(250, 198), (250, 445)]


def test_epsilon_falls_from_1_to_1e_4_over_1000_choices_with_a_history_and_stays(agent):
    epsilons = [agent.eps]
    for _ in range(1500):
        agent._get_action(states(0, 0, 0, 0))
        agent._get_action()
        epsilons.append(agent.eps)
    np.testing.assert_allclose(epsilons[::500], [1, .50005, 1e-4, 1e-4], rtol=1e-9)


def test_actions_are_random_with_probability_epsilon_and_otherwise_have_the_larger_q(agent):
    agent.Q = [*agent.Q[:-1], np.array([0, 1e6])]
    agent.eps_decay = 0
    for agent.eps, expected in (1, .5), (.5, .75), (1e-4, 1):
        mean = np.mean([agent._get_action(states(0, 0, 0, 0)) for _ in range(4000)])
        assert mean == pytest.approx(expected, abs=.05)


def test_memory_starts_with_32_steps_that_the_scaler_normalizes_and_ends_with_the_last_2000(agent):
    agent_hists = np.array([agent_hist for agent_hist, *_ in agent.memory])
    assert agent_hists.shape == (32, 16)
    scaled = agent.scaler(agent_hists).numpy()
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-3)
    for number in range(2010):
        agent._remember(states(number, 0, 0, 0), 0, 1., states(0)[0], False)
    assert [agent_hist[0] for agent_hist, *_ in agent.memory] == list(range(10, 2010))
