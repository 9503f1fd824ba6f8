"""The n-step return: Agent.advantage_push_local_brain against sums done the long way round."""

import collections
import types

import numpy as np
import pytest

import a3c_cartpole as a3c


def test_n_step_return_is_the_discounted_sum_of_at_most_n_rewards():
    agent = a3c.Agent.__new__(a3c.Agent)  # the agent alone: no server, no network
    agent.memory, returns = collections.deque(), []
    agent.brain = types.SimpleNamespace(train_push=lambda s, a, R, s_: returns.append(R))
    rewards = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    for t in range(7):
        s_ = np.zeros(4) if t < 6 else None  # None: the episode is over
        agent.advantage_push_local_brain(np.zeros(4), 0, rewards[t], s_)

    assert len(returns) == 7
    for t in range(7):
        R = 0.0
        for k in range(a3c.N_STEP_RETURN):
            if t + k < 7:
                R += a3c.GAMMA**k * rewards[t + k]
        assert returns[t] == pytest.approx(R)


@pytest.fixture
def agent():
    """An agent without a server, whose brain keeps the samples it is handed."""
    agent = a3c.Agent.__new__(a3c.Agent)
    agent.memory, samples = collections.deque(), []
    agent.brain = types.SimpleNamespace(
        samples=samples, train_push=lambda *sample: samples.append(sample)
    )
    return agent


def play(agent, rewards, first_state=0):
    """Feed one episode; state t is filled with first_state + t, the action alternates."""
    for t, r in enumerate(rewards):
        s_ = np.full(4, first_state + t + 1.0) if t + 1 < len(rewards) else None
        agent.advantage_push_local_brain(np.full(4, first_state + float(t)), t % 2, r, s_)


def brute_force(rewards, first_state=0):
    """Every sample an episode must give: number of s, a, R, number of s' (None at the end)."""
    N, samples = a3c.N_STEP_RETURN, []
    for t in range(len(rewards)):
        total = sum(a3c.GAMMA**k * r for k, r in enumerate(rewards[t : t + N]))
        went_on = t + N < len(rewards)
        samples.append((first_state + t, t % 2, total, first_state + t + N if went_on else None))
    return samples


def assert_same(samples, expected):
    assert len(samples) == len(expected)
    for (s, a, r, s_), (state, action, total, next_state) in zip(samples, expected):
        np.testing.assert_array_equal(s, np.full(4, float(state)))
        np.testing.assert_array_equal(a, [1 - action, action])
        assert r == pytest.approx(total, rel=1e-12, abs=1e-12)
        if next_state is None:
            assert s_ is None
        else:
            np.testing.assert_array_equal(s_, np.full(4, float(next_state)))


def test_returns_of_a_seven_step_episode_computed_by_hand(agent, monkeypatch):
    monkeypatch.setattr(a3c, "N_STEP_RETURN", 5)
    monkeypatch.setattr(a3c, "GAMMA", 0.99)
    play(agent, [1, 2, 3, 4, 5, 6, 7])
    g = 0.99
    by_hand = [
        1 + 2 * g + 3 * g**2 + 4 * g**3 + 5 * g**4,
        2 + 3 * g + 4 * g**2 + 5 * g**3 + 6 * g**4,
        3 + 4 * g + 5 * g**2 + 6 * g**3 + 7 * g**4,
        4 + 5 * g + 6 * g**2 + 7 * g**3,
        5 + 6 * g + 7 * g**2,
        6 + 7 * g,
        7,
    ]
    assert [r for _, _, r, _ in agent.brain.samples] == pytest.approx(by_hand, rel=1e-12)
    assert [s_ is None for _, _, _, s_ in agent.brain.samples] == [False] * 2 + [True] * 5


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6])
def test_short_episode_return_is_plain_discounted_sum(agent, length):
    rewards = [0.0] * (length - 1) + [-1.0]
    play(agent, rewards)
    assert_same(agent.brain.samples, brute_force(rewards))
    assert not agent.memory


def test_random_episodes_of_length_1_to_300_equal_the_brute_force_sum(agent, rng):
    for length in range(1, 301):
        agent.brain.samples.clear()
        rewards = rng.normal(size=length).tolist()
        play(agent, rewards, first_state=length)
        assert_same(agent.brain.samples, brute_force(rewards, first_state=length))


@pytest.mark.parametrize("lengths", [(3, 4), (5, 5), (12, 2), (1, 30)])
def test_two_episodes_in_a_row_do_not_mix(agent, rng, lengths):
    first, second = (rng.normal(size=length).tolist() for length in lengths)
    play(agent, first)
    play(agent, second, first_state=1000)
    assert_same(agent.brain.samples, brute_force(first) + brute_force(second, first_state=1000))


def test_sample_is_pushed_as_soon_as_its_n_rewards_are_known(agent):
    N = a3c.N_STEP_RETURN
    for step in range(1, 21):
        agent.advantage_push_local_brain(np.zeros(4), 0, 0.0, np.zeros(4))
        assert len(agent.brain.samples) == max(0, step - N + 1)
        assert len(agent.memory) == min(step, N - 1)


def test_no_drift_over_100_000_steps(agent, rng):
    rewards = rng.normal(size=100_000).tolist()
    play(agent, rewards)
    returns = np.array([r for _, _, r, _ in agent.brain.samples])
    padded = np.append(rewards, np.zeros(a3c.N_STEP_RETURN))
    expected = sum(
        a3c.GAMMA**k * padded[k : k + len(rewards)] for k in range(a3c.N_STEP_RETURN)
    )
    np.testing.assert_allclose(returns, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [8, 20, 57, 200])
def test_article_recursion_agrees_on_ordinary_episodes(agent, rng, length):
    rewards = rng.normal(size=length).tolist()
    play(agent, rewards)
    waiting, R, returns = [], 0.0, []
    for t, r in enumerate(rewards):  # the article's formula: one running R, divided and reduced
        waiting.append(r)
        R = (R + r * a3c.GAMMA**a3c.N_STEP_RETURN) / a3c.GAMMA
        if t + 1 == length:
            while waiting:
                returns.append(R)
                R = (R - waiting.pop(0)) / a3c.GAMMA
        elif len(waiting) >= a3c.N_STEP_RETURN:
            returns.append(R)
            R -= waiting.pop(0)
    assert [r for _, _, r, _ in agent.brain.samples] == pytest.approx(returns, rel=1e-9, abs=1e-9)


def test_target_of_each_step_is_r_plus_gamma_to_the_n_times_v_of_s_n_steps_later(server):
    """From Agent to the update in one piece: the change of θ is that of targets done by hand."""
    agent, rewards = a3c.Agent("agent", server), [0.0, 0.5, 0.0, 0.25, 0.0, 0.0, 1.0]
    states = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    for t, r in enumerate(rewards):
        agent.advantage_push_local_brain(states[t], t % 2, r, states[t + 1] if t < 6 else None)

    values = server.model(states)[1].numpy()[:, 0]
    N, targets = a3c.N_STEP_RETURN, []
    for t in range(7):
        R = sum(a3c.GAMMA**k * r for k, r in enumerate(rewards[t : t + N]))
        targets.append(R + a3c.GAMMA**N * values[t + N] if t + N < 7 else R)
    twin = a3c.LocalBrain("twin", server)
    for t in range(7):
        twin.train_push(states[t], np.eye(2)[t % 2], targets[t], None)

    theta, mean_square = server.theta, server.mean_square
    agent.brain.update_parameter_server()
    after_agent = server.theta
    server.theta, server.mean_square = theta, mean_square
    twin.update_parameter_server()
    assert np.abs(after_agent - theta).max() > 1e-4
    np.testing.assert_allclose(after_agent, server.theta, rtol=0, atol=1e-6)
