"""The n-step return: Agent.advantage_push_local_brain against sums done the long way round."""

import numpy as np
import pytest

import a3c_cartpole as a3c

N, GAMMA = a3c.N_STEP_RETURN, a3c.GAMMA


class RecordingBrain:
    def __init__(self):
        self.samples = []

    def train_push(self, s, a, r, s_):
        self.samples.append((s, a, r, s_))


@pytest.fixture
def agent(server):
    agent = a3c.Agent("agent", server)
    agent.brain = RecordingBrain()
    return agent


def play(agent, rewards, first_state=0):
    """Feed one episode; state t is filled with first_state + t, the action alternates."""
    for t, r in enumerate(rewards):
        s_ = np.full(4, first_state + t + 1.0) if t + 1 < len(rewards) else None
        agent.advantage_push_local_brain(np.full(4, first_state + float(t)), t % 2, r, s_)


def brute_force(rewards, first_state=0):
    """Every sample an episode must give: s, a, R, s' (None at the end)."""
    samples = []
    for t in range(len(rewards)):
        following = rewards[t : t + N]
        total = 0.0
        for k in range(len(following)):
            total += GAMMA**k * following[k]
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


def test_returns_of_a_seven_step_episode_computed_by_hand(agent):
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
    state = np.zeros(4)
    for step in range(1, 21):
        agent.advantage_push_local_brain(state, 0, 0.0, state)
        assert len(agent.brain.samples) == max(0, step - N + 1)
        assert len(agent.memory) == min(step, N - 1)


def test_no_drift_over_100_000_steps(agent, rng):
    rewards = rng.normal(size=100_000).tolist()
    play(agent, rewards)
    returns = np.array([r for _, _, r, _ in agent.brain.samples])
    padded = np.append(rewards, np.zeros(N))
    expected = sum(GAMMA**k * padded[k : k + len(rewards)] for k in range(N))
    np.testing.assert_allclose(returns, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [8, 20, 57, 200])
def test_article_recursion_agrees_on_ordinary_episodes(agent, rng, length):
    rewards = rng.normal(size=length).tolist()
    play(agent, rewards)
    waiting, R, returns = [], 0.0, []
    for t, r in enumerate(rewards):  # the article's formula: one running R, divided and reduced
        waiting.append(r)
        R = (R + r * GAMMA**N) / GAMMA
        if t + 1 == length:
            while waiting:
                returns.append(R)
                R = (R - waiting.pop(0)) / GAMMA
        elif len(waiting) >= N:
            returns.append(R)
            R -= waiting.pop(0)
    assert [r for _, _, r, _ in agent.brain.samples] == pytest.approx(returns, rel=1e-9, abs=1e-9)


def test_queue_of_a_real_brain_holds_zeros_and_mask_0_at_the_end(server):
    agent = a3c.Agent("agent", server)
    play(agent, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    s, a, r, s_, mask = agent.brain.train_queue
    assert mask == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    np.testing.assert_array_equal(s_[0], np.full(4, 5.0))
    np.testing.assert_array_equal(s_[1], np.full(4, 6.0))
    np.testing.assert_array_equal(s_[2:], np.zeros((5, 4)))
    np.testing.assert_array_equal(np.array(s)[:, 0], np.arange(7))
    np.testing.assert_array_equal(np.array(a)[:, 1], np.arange(7) % 2)
    assert r == pytest.approx([0.0, 0.0, 0.99**4, 0.99**3, 0.99**2, 0.99, 1.0])
