"""a3c_two_networks.py: returns, losses, updates, when a thread trains, the lock, learning."""
import copy
import threading
import types

import common

import a3c_two_networks as two
import gymnasium as gym
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import FakeEnv, finite_differences


@pytest.fixture
def a3c(tmp_path, rng):
    """An A3C with weights of which none is 0, and a run that counts for it."""
    a3c = two.A3C()
    a3c.model.set_weights([rng.normal(size=w.shape, scale=.4) for w in a3c.model.get_weights()])
    a3c.actor_weights = a3c.actor.get_weights()
    a3c.critic_weights = a3c.critic.get_weights()
    args = types.SimpleNamespace(out=tmp_path, max_episodes=2000, test_episodes=0, play=None)
    a3c.run = common.Run(a3c.model, gym.make(two.ENV), "a test", args,
                         [f"thread{i}" for i in range(4)])
    return a3c


def test_returns_computed_by_hand(a3c):
    # 3; 2 + .95·3; 1 + .95·4.85
    returns = two.Agent(0, a3c, 10).discount_reward([1, 2, 3], np.ones(4), True)
    assert returns == pytest.approx([5.6075, 4.85, 3])


@pytest.mark.parametrize("done", [True, False])
def test_returns_are_the_sums_of_their_definition(a3c, rng, done):
    rewards = list(rng.normal(size=23))
    value = 0 if done else float(a3c.critic(np.ones((1, 4)))[0, 0])
    assert done or abs(value) > .1
    expected = [sum(.95 ** (k - t) * r for k, r in enumerate([*rewards, value]) if k >= t)
                for t in range(23)]
    returns = two.Agent(0, a3c, 10).discount_reward(rewards, np.ones(4), done)
    assert returns == pytest.approx(expected, rel=1e-4)


def test_losses_computed_by_hand():
    p, actions, advantages = [tf.constant(x) for x in ([[.8], [.7]], [[1.], [0.]], [[2.], [-1.]])]
    entropies = [-.8 * np.log(.8) - .2 * np.log(.2), -.7 * np.log(.7) - .3 * np.log(.3)]
    by_hand = [-np.log(.8) * 2 - .01 * entropies[0], -np.log(.3) * -1 - .01 * entropies[1]]
    assert float(two.A3C.actor_loss(p, actions, advantages)) == pytest.approx(np.mean(by_hand))
    assert float(two.A3C.critic_loss(p, actions)) == pytest.approx((.2 ** 2 + .7 ** 2) / 2)


def test_the_gradient_is_finite_where_the_actor_is_certain():
    p = tf.constant([[0.], [1.]])
    with tf.GradientTape() as tape:
        tape.watch(p)
        loss = two.A3C.actor_loss(p, 1 - p, p + 1)
    assert np.isfinite(loss) and np.isfinite(tape.gradient(loss, p)).all()


def test_updates_are_adam_with_finite_differences_of_each_networks_own_loss(a3c, rng):
    agent = two.Agent(0, a3c, 10)
    twins = [tf.Variable(w) for w in a3c.actor_weights + a3c.critic_weights]
    actor_adam = keras.optimizers.Adam(.001)
    critic_adam = keras.optimizers.Adam(.01)
    for T in 10, 3:
        s = rng.normal(size=(T, 4))
        a = rng.integers(0, 2, T)
        rewards = list(rng.normal(size=T))
        old = a3c.actor_weights + a3c.critic_weights
        copies = copy.deepcopy(old)
        R = agent.discount_reward(rewards, np.ones(4), False)
        advantages = R - a3c.critic_predict(s)[:, 0]

        def actor_loss(weights):
            p = a3c.actor_forward(weights, s)[:, 0]
            entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
            return np.mean(-np.log(np.where(a == 1, p, 1 - p)) * advantages - .01 * entropy)

        def critic_loss(weights):
            return np.mean((R - a3c.critic_forward(weights, s)[:, 0]) ** 2)

        agent.train_episode(list(s), list(a), rewards, np.ones(4), False)
        for adam, loss, twin in (actor_adam, actor_loss, twins[:6]), \
                                (critic_adam, critic_loss, twins[6:]):
            gradients = finite_differences(loss, [w.numpy() for w in twin])
            adam.apply([tf.constant(g, tf.float32) for g in gradients], twin)
        new = a3c.actor_weights + a3c.critic_weights
        for ours, twin, before, copied in zip(new, twins, old, copies, strict=True):
            np.testing.assert_allclose(ours, twin, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(before, copied)   # who still plays with it is safe
            assert (ours != before).any()


@pytest.mark.parametrize("length, expected", [
    (23, [(10, False), (10, False), (3, True)]), (20, [(10, False), (10, True)])])
def test_a_thread_trains_every_ten_steps_and_at_the_end_with_each_step_once(
        a3c, monkeypatch, length, expected):
    def train_episode(_agent, states, actions, rewards, next_state, done):
        seen.extend(round(100 * s[0]) for s in states)      # FakeEnv's states hold their number
        assert len(states) == len(actions) == len(rewards)
        assert round(100 * next_state[0]) == len(seen)
        updates.append((len(states), done))

    seen = []
    updates = []
    monkeypatch.setattr(two.Agent, "train_episode", train_episode)
    agent = two.Agent(0, a3c, 10)
    agent.env = FakeEnv(length)
    agent.run_episode()
    assert seen == list(range(length)) and updates == expected
    assert [(e.steps, e.total_steps) for e in a3c.run.history] == [(length, length)]


def test_threads_lose_and_mix_no_updates(a3c, monkeypatch):
    alone = two.A3C()
    alone.model.set_weights(a3c.model.get_weights())
    alone.actor_weights = a3c.actor_weights
    alone.critic_weights = a3c.critic_weights
    train_episode = two.Agent.train_episode
    updates = []
    threads = set()

    def noted(agent, *update):
        updates.append(copy.deepcopy(update))
        threads.add(agent)
        if len(updates) >= 100 and len(threads) == 4:
            a3c.stop.set()
        train_episode(agent, *update)

    monkeypatch.setattr(two.Agent, "train_episode", noted)
    a3c.train(a3c.run, 4, 1)
    agent = two.Agent(0, alone, 1)
    for update in updates:          # in one thread the same updates lead to the same weights
        train_episode(agent, *update)
    for ours, other in zip(a3c.actor_weights + a3c.critic_weights,
                           alone.actor_weights + alone.critic_weights, strict=True):
        np.testing.assert_array_equal(ours, other)


def test_after_learning_is_over_no_update_and_no_episode_is_added(a3c, monkeypatch):
    agent = two.Agent(0, a3c, 10)
    agent.env = FakeEnv(5)
    a3c.stop.set()
    before = a3c.actor_weights
    agent.run_episode()
    assert a3c.actor_weights is before and not a3c.run.history


def test_an_error_in_one_thread_is_shown_and_ends_learning_for_all(a3c, monkeypatch):
    def train_episode(agent, *_):
        if agent.name == "thread2":
            raise RuntimeError("the pole broke")

    shown = []
    monkeypatch.setattr(two.Agent, "train_episode", train_episode)
    monkeypatch.setattr(threading, "excepthook", shown.append)
    a3c.train(a3c.run, 4, 10)
    assert [(str(e.exc_value), e.thread.name) for e in shown] == [("the pole broke", "thread2")]
    assert not any(isinstance(thread, two.Agent) for thread in threading.enumerate())


def test_each_thread_draws_random_numbers_of_its_own_which_a_seed_fixes():
    draws = [two.Agent(i, two.A3C(seed), 10).rng.random() for i in (1, 2) for seed in (5, 5, 6)]
    assert draws[0] == draws[1] and draws[3] == draws[4] and len(set(draws)) == 4


def test_it_learns_cartpole(tmp_path, capsys):
    arguments = ["--no-render", "--test-episodes", "3", "--out", str(tmp_path)]
    assert two.main(arguments) == 0
    out = capsys.readouterr().out
    assert "\nlearned in " in out and float(out.split()[-2]) > 190
