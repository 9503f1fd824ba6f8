"""The n-step return: what Agent.advantage_push_local_brain hands to its brain."""

import a3c_cartpole as a3c

import numpy as np
import pytest


def test_n_step_return_is_the_discounted_sum_of_at_most_n_rewards():
    # An agent plays an episode of seven steps. The states do not matter here.
    agent = a3c.Agent("agent", "learning", a3c.ParameterServer())
    rewards = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    state = np.zeros(4)
    for t in range(7):
        is_last = t == 6
        agent.advantage_push_local_brain(state, 0, rewards[t], None if is_last else state)

    # Its brain has then been given one sample for each step, with this sum of rewards:
    for t in range(7):
        R_n = 0.0
        for k in range(a3c.N_STEP_RETURN):
            if t + k < 7:
                R_n += a3c.GAMMA**k * rewards[t + k]
        sample = agent.brain.train_queue[t]
        assert sample[2] == pytest.approx(R_n)
    assert len(agent.brain.train_queue) == 7


@pytest.fixture
def agent(server):
    return a3c.Agent("agent", "learning", server)


def play(agent, rewards, first_state=0):
    """Feed one episode; state t is filled with first_state + t, the action alternates."""
    for t, r in enumerate(rewards):
        s_ = np.full(4, first_state + t + 1.0) if t + 1 < len(rewards) else None
        agent.advantage_push_local_brain(np.full(4, first_state + float(t)), t % 2, r, s_)


def test_episodes_of_1_to_100_steps_in_a_row_give_the_samples_of_the_definition(agent, rng):
    n = a3c.N_STEP_RETURN
    for length in range(1, 101):
        agent.brain.train_queue = []
        rewards = rng.normal(size=length).tolist()
        play(agent, rewards, first_state=length)
        assert len(agent.brain.train_queue) == length
        for t, (s, a, R_n, s_, mask) in enumerate(agent.brain.train_queue):
            goes_on = t + n < length
            np.testing.assert_array_equal(s, np.full(4, float(length + t)))
            np.testing.assert_array_equal(a, [1 - t % 2, t % 2])
            total = sum(a3c.GAMMA**k * r for k, r in enumerate(rewards[t : t + n]))
            assert R_n == pytest.approx(total, rel=1e-12, abs=1e-12)
            np.testing.assert_array_equal(s_, np.full(4, float(length + t + n) if goes_on else 0.0))
            assert mask == goes_on


def test_sample_is_handed_over_as_soon_as_its_n_rewards_are_known(agent):
    for step in range(1, 21):
        agent.advantage_push_local_brain(np.zeros(4), 0, 0.0, np.zeros(4))
        assert len(agent.brain.train_queue) == max(0, step - a3c.N_STEP_RETURN + 1)


def articles_returns(rewards):
    """The article's formula: one running sum, which each step divides and reduces."""
    waiting, R, returns = [], 0.0, []
    for t, r in enumerate(rewards):
        waiting.append(r)
        R = (R + r * a3c.GAMMA**a3c.N_STEP_RETURN) / a3c.GAMMA
        if t + 1 == len(rewards):
            while waiting:
                returns.append(R)
                R = (R - waiting.pop(0)) / a3c.GAMMA
        elif len(waiting) >= a3c.N_STEP_RETURN:
            returns.append(R)
            R -= waiting.pop(0)
    return returns


def test_article_sums_the_same_in_episodes_of_n_steps_and_more_but_not_in_shorter_ones(agent):
    for length in 3, 5, 8, 57:
        agent.brain.train_queue = []
        rewards = [0.0] * (length - 1) + [-1.0]
        play(agent, rewards)
        returns = [sample[2] for sample in agent.brain.train_queue]
        is_same = returns == pytest.approx(articles_returns(rewards), abs=1e-9)
        assert is_same == (length >= a3c.N_STEP_RETURN)


def test_return_of_each_step_is_r_n_plus_gamma_to_the_n_times_v_of_s_n_steps_later(server):
    """From Agent to the update in one piece: θ changes as it does for returns done by hand."""
    agent = a3c.Agent("agent", "learning", server)
    by_hand = a3c.ParameterServer()
    by_hand.weights = server.weights
    twin = a3c.LocalBrain(by_hand)

    rewards = [0.0, 0.5, 0.0, 0.25, 0.0, 0.0, 1.0]
    states = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    for t, r in enumerate(rewards):
        agent.advantage_push_local_brain(states[t], t % 2, r, states[t + 1] if t < 6 else None)

    server.model.set_weights(server.weights)
    values = server.model(states)[1].numpy()[:, 0]
    n = a3c.N_STEP_RETURN
    for t in range(7):
        R = sum(a3c.GAMMA**k * r for k, r in enumerate(rewards[t : t + n]))
        if t + n < 7:
            R += a3c.GAMMA**n * values[t + n]
        twin.train_push(states[t], np.eye(2)[t % 2], R, None)

    before = server.weights
    agent.brain.update_parameter_server()
    twin.update_parameter_server()
    assert max(np.abs(w - b).max() for w, b in zip(server.weights, before)) > 1e-4
    for weight, expected in zip(server.weights, by_hand.weights):
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6)
