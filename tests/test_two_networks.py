"""companions/a3c_two_networks.py: returns, losses, updates, the lock, the end, the program."""
import copy
import threading
import time

from companions import a3c_two_networks as two
from companions import common

import gymnasium as gym
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import FakeEnv, finite_differences


@pytest.fixture
def a3c(tmp_path):
    """An A3C with weights of which none is 0."""
    a3c = two.A3C(common.Run("a test", 200, tmp_path, [f"thread{i}" for i in range(4)]))
    rng = np.random.default_rng(1)
    a3c.weights = [rng.normal(size=w.shape, scale=.4).astype(np.float32) for w in a3c.weights]
    a3c.model.set_weights(a3c.weights)
    a3c.episode = 100
    return a3c


@pytest.fixture
def agent(a3c):
    return two.Agent(0, a3c, update_iter=10)


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The program, with episodes of at most 12 steps: ten of these are soon learned."""
    cart_pole = gym.spec("CartPole-v0").entry_point
    gym.register("ShortCartPole-v0", cart_pole, max_episode_steps=12)
    monkeypatch.setattr(two, "ENV", "ShortCartPole-v0")
    yield lambda *arguments: two.main(["--no-render", "--out", str(tmp_path), *arguments])
    del gym.registry["ShortCartPole-v0"]


def test_returns_computed_by_hand(agent):
    # 3; 2 + .95·3; 1 + .95·4.85
    assert agent.discount_reward([1, 2, 3], np.ones(4), True) == pytest.approx([5.6075, 4.85, 3])


@pytest.mark.parametrize("done", [True, False])
def test_returns_are_the_sums_of_their_definition(a3c, agent, rng, done):
    rewards = list(rng.normal(size=23))
    value = 0 if done else float(a3c.critic(np.ones((1, 4)))[0, 0])
    assert done or abs(value) > .1
    expected = [sum(.95 ** (k - t) * r for k, r in enumerate([*rewards, value]) if k >= t)
                for t in range(23)]
    assert agent.discount_reward(rewards, np.ones(4), done) == pytest.approx(expected, rel=1e-4)


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


def test_updates_are_keras_adam_with_finite_differences_of_each_networks_own_loss(
        a3c, agent, rng):
    states = rng.normal(size=(23, 4))
    actions = rng.integers(0, 2, 23)
    rewards = rng.normal(size=23)
    twins = [tf.Variable(weight) for weight in a3c.weights]
    actor_adam = keras.optimizers.Adam(.001)
    critic_adam = keras.optimizers.Adam(.01)
    for T in 10, 23:
        s, a = states[:T], actions[:T]
        R = agent.discount_reward(rewards[:T], np.ones(4), False)
        old = a3c.weights
        copies = copy.deepcopy(old)
        agent.train_episode(list(s), list(a), list(rewards[:T]), np.ones(4), False)
        weights = [twin.numpy() for twin in twins]
        advantages = R - two.predict(weights, s)[1][:, 0]

        def actor_loss(actor):
            p = two.predict(actor + weights[6:], s)[0][:, 0]
            entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
            return np.mean(-np.log(np.where(a == 1, p, 1 - p)) * advantages - .01 * entropy)

        def critic_loss(critic):
            return np.mean((R - two.predict(weights[:6] + critic, s)[1][:, 0]) ** 2)

        gradients = finite_differences(actor_loss, weights[:6])
        actor_adam.apply([tf.constant(g, tf.float32) for g in gradients], twins[:6])
        gradients = finite_differences(critic_loss, weights[6:])
        critic_adam.apply([tf.constant(g, tf.float32) for g in gradients], twins[6:])
        for ours, twin, before, copied in zip(a3c.weights, twins, old, copies, strict=True):
            np.testing.assert_allclose(ours, twin, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(before, copied)   # who still plays with it is safe
            assert (ours != before).any()


def test_threads_lose_and_mix_no_updates(a3c, monkeypatch, capsys):
    alone = two.A3C(a3c.run)
    alone.weights = a3c.weights
    alone.model.set_weights(a3c.weights)
    train_episode = two.Agent.train_episode
    episodes = []
    threads = set()

    def noted(agent, *episode):
        episodes.append(copy.deepcopy(episode))
        threads.add(agent)
        if len(episodes) >= 100 and len(threads) == 4:
            a3c.stop.set()
        train_episode(agent, *episode)
    monkeypatch.setattr(two.Agent, "train_episode", noted)
    a3c.train(2000, 4, 1)
    agent = two.Agent(0, alone, 1)
    for episode in episodes:    # in one thread the same updates lead to the same weights
        train_episode(agent, *episode)
    for weight, other in zip(a3c.weights, alone.weights, strict=True):
        np.testing.assert_array_equal(weight, other)


@pytest.mark.parametrize("length, expected", [
    (23, [(10, False), (20, False), (23, True)]), (20, [(10, False), (20, True)])])
def test_an_agent_trains_every_ten_steps_and_at_the_end_with_all_steps_so_far(
        a3c, agent, monkeypatch, capsys, length, expected):
    def train_episode(states, actions, rewards, next_state, done):
        assert [s[0] for s in states] == pytest.approx(np.arange(len(rewards)) / 100)
        assert next_state[0] == np.float32(len(actions) / 100)
        updates.append((len(states), done))
    updates = []
    monkeypatch.setattr(agent, "train_episode", train_episode)
    agent.env = FakeEnv(length)
    agent.run_episode()
    assert updates == expected
    assert [(e.steps, e.total_steps) for e in a3c.run.history] == [(length, length)]


def test_the_winner_saves_the_mean_of_its_ten_weights_and_nothing_changes_afterwards(
        a3c, agent, rng, tmp_path, capsys):
    lists = [[rng.normal(size=w.shape) for w in a3c.weights] for _ in range(11)]
    for a3c.weights, length in zip(lists, [30] + [200] * 10):
        assert not a3c.stop.is_set()
        agent.finish_episode(length)
    assert a3c.run.is_learned and a3c.stop.is_set()
    agent.env = FakeEnv(30)
    agent.run_episode()
    assert len(a3c.run.history) == 11
    a3c.run.seconds = 1
    a3c.save()
    other = two.A3C(a3c.run)
    other.load(tmp_path / "a3c_two_networks.weights.h5")
    for weight, arrays in zip(other.weights, zip(*lists[1:]), strict=True):
        np.testing.assert_allclose(weight, sum(arrays) / 10, rtol=1e-5, atol=1e-6)


def test_play_takes_the_more_probable_action(a3c):
    actions = []
    env = FakeEnv(3)
    env.step = lambda action: actions.append(action) or FakeEnv.step(env, action)
    for bias in 9, -9:
        a3c.weights[5] = np.full(1, bias)       # makes p nearly 1, then nearly 0
        assert a3c.play(env) == 3
    assert actions == [1, 1, 1, 0, 0, 0]


def test_a_seed_fixes_the_first_weights_and_the_draws_of_each_thread(a3c):
    a3cs = [two.A3C(a3c.run, seed) for seed in (5, 5, 6)]
    sums = [a3c.weights[0].sum() for a3c in a3cs]
    assert sums[0] == sums[1] != sums[2]
    draws = [two.Agent(i, a3c, 10).rng.random() for i in (1, 2) for a3c in a3cs]
    assert draws[0] == draws[1] and draws[3] == draws[4] and len(set(draws)) == 4


def test_a_run_that_learns_keeps_both_networks_in_one_file_that_can_be_played(
        main, tmp_path, capsys):
    assert main("--test-episodes", "0") == 0
    file = tmp_path / "a3c_two_networks.weights.h5"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {file.name, "history.csv", "learning_curve.png"}
    capsys.readouterr()
    assert main("--play", str(file), "--test-episodes", "1") == 0
    assert capsys.readouterr().out.startswith("test  episode 1")


def test_weights_of_one_network_alone_are_refused(main, a3c, tmp_path, capsys):
    for model in a3c.actor, a3c.critic:
        model.save_weights(tmp_path / "one.weights.h5")
        with pytest.raises(SystemExit) as refused:
            main("--play", str(tmp_path / "one.weights.h5"))
        assert refused.value.code == 2
        assert "does not hold the weights of this network" in capsys.readouterr().err


def test_a_bias_that_predict_forgets_is_noticed(main, monkeypatch):
    predict = two.predict
    monkeypatch.setattr(two, "predict", lambda w, s: predict([*w[:11], 0 * w[11]], s))
    with pytest.raises(SystemExit, match="two different networks"):
        main()


def test_a_run_that_reaches_the_most_episodes_keeps_its_unfinished_networks(
        main, tmp_path, monkeypatch):
    monkeypatch.setattr(two.Agent, "train_episode", lambda *_: None)
    assert main("--max-episodes", "8") == 1
    assert (tmp_path / "history.csv").read_text().count("\n") == 1 + 8
    assert (tmp_path / "a3c_two_networks.unfinished.weights.h5").exists()


def test_an_error_in_one_thread_is_shown_and_ends_learning_for_all(main, tmp_path, monkeypatch):
    def train_episode(agent, *_):
        if agent.name == "thread2":
            raise RuntimeError("the pole broke")
    shown = []
    monkeypatch.setattr(two.Agent, "train_episode", train_episode)
    monkeypatch.setattr(two.Agent, "finish_episode", lambda *_: None)   # so that nobody learns
    monkeypatch.setattr(threading, "excepthook", shown.append)
    assert main() == 1
    assert [(str(e.exc_value), e.thread.name) for e in shown] == [("the pole broke", "thread2")]
    assert (tmp_path / "a3c_two_networks.unfinished.weights.h5").exists()


def test_ctrl_c_ends_all_threads_and_keeps_the_networks(main, tmp_path, monkeypatch):
    def start(agent):
        if agent.name == "thread3":     # the other three play
            raise KeyboardInterrupt
        threading.Thread.start(agent)
    monkeypatch.setattr(two.Agent, "start", start)
    monkeypatch.setattr(two.Agent, "train_episode", lambda *_: time.sleep(1))
    monkeypatch.setattr(two.Agent, "finish_episode", lambda *_: None)   # so that nobody learns
    with pytest.raises(KeyboardInterrupt):
        main()
    assert not any(isinstance(thread, two.Agent) for thread in threading.enumerate())
    assert (tmp_path / "a3c_two_networks.unfinished.weights.h5").exists()
