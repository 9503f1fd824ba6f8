"""companions/a3c_two_networks.py: returns, losses, both Adams, shared updates, the program."""
import threading

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, run_python

from companions import a3c_two_networks as two

keras = two.keras


def run_it(*arguments, cwd):
    return run_python(ROOT / "companions/a3c_two_networks.py", "--no-render", *arguments, cwd=cwd)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """One compiled update for all: it is pure, and to compile it takes most of a test's time."""
    optimizer = two.A3C(seed=7).optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two.A3C, "_build_optimizer", lambda self: None)
        patch.setattr(two.A3C, "optimizer", staticmethod(optimizer), raising=False)
        yield optimizer


@pytest.fixture
def a3c():
    a3c = two.A3C(seed=7)
    a3c.episode = 100
    return a3c


@pytest.fixture
def agent(a3c):
    return two.Agent(0, a3c, update_iter=10)


@pytest.fixture
def steps():
    """An episode of 23 steps: states, actions, rewards, and the state after them."""
    rng = np.random.default_rng(3)
    return rng.normal(size=(23, 4)), list(rng.integers(0, 2, 23)), [1.] * 23, rng.normal(size=4)


def test_returns_of_an_episode_that_ended_computed_by_hand(agent):
    # 3; 2 + .95·3; 1 + .95·4.85
    assert agent.discount_reward([1, 2, 3], np.ones(4), True) == pytest.approx([5.6075, 4.85, 3])


def test_returns_of_an_episode_cut_off_go_on_with_the_critics_value(agent, a3c):
    state = np.array([.1, -.2, .3, .4], np.float32)
    value = float(a3c.models[1](state[np.newaxis])[0, 0])
    expected = [1 + .95 * 1 + .95 ** 2 * value, 1 + .95 * value]
    assert abs(value) > .01
    assert agent.discount_reward([1, 1], state, False) == pytest.approx(expected, rel=1e-5)


def test_losses_computed_by_hand(a3c):
    p, value, a, r = (tf.constant([[x], [y]]) for x, y in ((.8, .8), (1., 2.), (1., 0.), (3., 1.)))
    actor, critic = a3c.losses(p, value, a, r)
    entropy = -.8 * np.log(.8) - .2 * np.log(.2)
    by_hand = [-np.log(.8) * 2 - .01 * entropy, -np.log(.2) * -1 - .01 * entropy]
    assert actor[:, 0].numpy() == pytest.approx(by_hand, rel=1e-5)
    assert critic[:, 0].numpy() == pytest.approx([4, 1])


def test_losses_stay_finite_where_the_actor_is_certain(a3c):
    p = tf.constant([[0.], [1.]])
    with tf.GradientTape() as tape:
        tape.watch(p)
        actor, _ = a3c.losses(p, p, 1 - p, p + 1)
    assert np.isfinite(actor).all() and np.isfinite(tape.gradient(actor, p)).all()


def test_three_updates_equal_keras_adam_on_each_network(a3c, agent, steps):
    states, actions, rewards, last = steps
    rates = two.ACTOR_LR, two.CRITIC_LR
    twins = [keras.models.clone_model(model) for model in a3c.models]
    for twin, model in zip(twins, a3c.models):
        twin.set_weights(model.get_weights())
    adams = [keras.optimizers.Adam(rate) for rate in rates]
    for T in 10, 20, 23:
        R = agent.discount_reward(rewards[:T], last, False)[:, np.newaxis]
        agent.train_episode(states[:T], actions[:T], rewards[:T], last, False)
        a = np.array(actions[:T])[:, np.newaxis]
        with tf.GradientTape(persistent=True) as tape:
            p, value = [twin(states[:T].astype(np.float32)) for twin in twins]
            prob = tf.where(a == 1, p, 1 - p)
            entropy = -p * tf.math.log(p) - (1 - p) * tf.math.log(1 - p)
            advantage = tf.stop_gradient(R.astype(np.float32) - value)
            losses = [tf.reduce_mean(-tf.math.log(prob) * advantage - .01 * entropy),
                      tf.reduce_mean((R.astype(np.float32) - value) ** 2)]
        for adam, loss, twin in zip(adams, losses, twins):
            adam.apply(tape.gradient(loss, twin.trainable_variables), twin.trainable_variables)
    expected = [weight for twin in twins for weight in twin.get_weights()]
    moved = [np.abs(w - m).max() for w, m in zip(expected, two.A3C(seed=7).weights)]
    assert min(moved) > 1e-3        # all weights of both have learned,
    for ours, theirs in zip(a3c.weights, expected):     # and to the same place
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_an_update_replaces_theta_and_leaves_the_old_one_as_it_was(a3c, agent, steps):
    states, actions, rewards, last = steps
    held, copy = a3c.theta, a3c.theta.copy()
    agent.train_episode(states, actions, rewards, last, True)
    assert (held == copy).all() and (a3c.theta != copy).any()


def test_a_weight_that_is_not_finite_is_refused(a3c, agent, steps):
    states, actions, rewards, last = steps
    before = a3c.theta
    with pytest.raises(FloatingPointError):
        agent.train_episode(states * np.inf, actions, rewards, last, True)
    assert a3c.theta is before and a3c.updates == 0


def test_four_threads_lose_none_of_2000_updates(compiled):
    a3c = two.A3C()         # without a seed: no turns
    theta, m, v, seen = a3c.theta, a3c.m, a3c.v, []

    def optimizer(batch, *more):
        seen.append(batch)
        if len(seen) == 2000:
            a3c.stop.set()
        return compiled(batch, *more)
    a3c.optimizer = optimizer
    a3c.train(2000, 4, 1)
    assert a3c.updates == len(seen) == 2000 and not a3c.failed
    assert len({e.thread for e in a3c.history}) == 4
    for t, batch in enumerate(seen):    # one after the other, they lead to the same weights
        theta, m, v = compiled(batch, tf.constant(theta), m, v, tf.constant(t + 1.))
        theta = theta.numpy()
    assert (theta == a3c.theta).all()


def test_four_threads_with_one_seed_repeat_to_the_last_bit():
    runs = [two.A3C(seed) for seed in (5, 5, 6)]
    for a3c in runs:
        a3c.train(20, 4, 10)
    same, again, other = [[e[:5] for e in a3c.history] for a3c in runs]
    assert same == again != other
    assert (runs[0].theta == runs[1].theta).all()


def test_the_winner_hands_over_the_mean_of_its_ten_thetas(a3c, agent):
    thetas = np.random.default_rng(0).normal(size=(11, len(a3c.theta))).astype(np.float32)
    for theta, length in zip(thetas, [30] + [200] * 10):
        assert not a3c.learned
        a3c.put(theta)
        agent.finish_episode(length)
    assert a3c.learned and a3c.stop.is_set()
    np.testing.assert_allclose(a3c.theta, thetas[1:].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_a_run_keeps_both_networks_and_plays_the_actor_again(tmp_path):
    ended = run_it("--seed", "2", "--out", "out", "--test-episodes", "1", "--log", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"actor.weights.h5", "critic.weights.h5", "history.csv", "learning_curve.png",
            "A3C-episode-0.mp4"} <= names
    assert "A3C-episode-1.mp4" not in names
    a3c = two.A3C(seed=1)
    critic, actor = a3c.weights[6:], a3c.weights[:6]
    a3c.load(tmp_path / "out/actor.weights.h5")
    s = np.full((1, 4), .2, np.float32)
    assert all((w == c).all() for w, c in zip(a3c.weights[6:], critic))
    assert any((w != o).any() for w, o in zip(a3c.weights, actor))
    np.testing.assert_allclose(a3c.actor(s), a3c.models[0](s), rtol=1e-5)
    played = run_it("--play", "out/actor.weights.h5", "--out", "again", "--test-episodes", "1",
                    cwd=tmp_path)
    assert played.returncode == 0 and "test: mean of 1 episodes" in played.stdout
    with pytest.raises(SystemExit) as refused:
        a3c.load(tmp_path / "out/history.csv")
    assert refused.value.code == 2


def test_a_thread_that_fails_ends_the_run_is_shown_once_and_named(monkeypatch):
    def discount_reward(agent, rewards, *_):
        if agent.name == "thread2":
            raise RuntimeError("the pole broke")
        return rewards
    shown, a3c = [], two.A3C()
    monkeypatch.setattr(two.Agent, "discount_reward", discount_reward)
    monkeypatch.setattr(threading, "excepthook", shown.append)
    a3c.train(2000, 4, 10)
    assert [(str(e.exc_value), e.thread.name) for e in shown] == [("the pole broke", "thread2")]
    assert a3c.failed == ["thread2"] and a3c.stop.is_set() and not a3c.learned
