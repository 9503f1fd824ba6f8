"""companions/a3c_two_networks.py: returns, losses, both Adams, shared networks, the program."""
import threading

import gymnasium as gym
import numpy as np
import pytest
import tensorflow as tf

from companions import a3c_two_networks as two

keras = two.keras


def random_weights(model, seed):
    """Weights for a Keras model, with biases that are not 0."""
    rng = np.random.default_rng(seed)
    return [.4 * rng.normal(size=w.shape).astype(np.float32) for w in model.get_weights()]


def start_anew(a3c, seed=None):
    """Make an A3C as it was at its start, which takes no compiling."""
    a3c.actor.set_weights(a3c.actor_at_start)
    a3c.critic.set_weights(a3c.critic_at_start)
    for variable, value in a3c.optimizers_at_start:
        variable.assign(value)
    a3c.publish(a3c.actor_at_start, a3c.critic_at_start)
    a3c.seed = seed
    a3c.steps = 0
    a3c.is_learned = False
    a3c.progress = two.base.Progress(two.ENV, 100)
    return a3c


@pytest.fixture(scope="module")
def only_one():
    """The A3C of all tests: to compile its update takes most of a test's time."""
    a3c = two.A3C(seed=7)
    a3c.actor_at_start = random_weights(a3c.actor, 1)
    a3c.critic_at_start = random_weights(a3c.critic, 2)
    variables = a3c.actor_optimizer.variables + a3c.critic_optimizer.variables
    a3c.optimizers_at_start = [(variable, variable.numpy()) for variable in variables]
    return a3c


@pytest.fixture
def a3c(only_one):
    return start_anew(only_one)


@pytest.fixture
def agent(a3c):
    return two.Agent(0, a3c, update_iter=10)


@pytest.fixture
def steps():
    """An episode of 23 steps: states, actions, rewards, and the state after them."""
    rng = np.random.default_rng(3)
    return (list(rng.normal(size=(23, 4))), list(rng.integers(0, 2, 23)), [1.] * 23,
            rng.normal(size=4))


@pytest.fixture
def main(a3c, monkeypatch, tmp_path):
    """The program with the A3C of all tests, and with episodes of at most 12 steps.

    A few of these are enough to learn them.
    """
    def run(*arguments):
        return two.main(["--no-render", "--log", "--out", str(tmp_path), *arguments])
    cart_pole = gym.spec("CartPole-v0").entry_point
    gym.register("ShortCartPole-v0", cart_pole, max_episode_steps=12)
    monkeypatch.setattr(two, "ENV", "ShortCartPole-v0")
    monkeypatch.setattr(two, "A3C", lambda seed: start_anew(a3c, seed))
    yield run
    del gym.registry["ShortCartPole-v0"]


# -- what an update computes

def test_returns_of_an_episode_that_ended_computed_by_hand(agent):
    # 3; 2 + .95·3; 1 + .95·4.85
    assert agent.discount_reward([1, 2, 3], np.ones(4), True) == pytest.approx([5.6075, 4.85, 3])


def test_returns_of_an_episode_cut_off_go_on_with_the_critics_value(agent, a3c):
    state = np.array([.1, -.2, .3, .4], np.float32)
    value = float(a3c.critic(state[np.newaxis])[0, 0])
    expected = [1 + .95 * 1 + .95 ** 2 * value, 1 + .95 * value]
    assert abs(value) > .01
    assert agent.discount_reward([1, 1], state, False) == pytest.approx(expected, rel=1e-5)


def test_losses_computed_by_hand(a3c):
    p, values, actions, R = (
        tf.constant([[x], [y]]) for x, y in ((.8, .7), (1., 2.), (1., 0.), (3., 1.)))
    actor_loss, critic_loss = a3c.losses(p, values, actions, R)
    entropies = [-.8 * np.log(.8) - .2 * np.log(.2), -.7 * np.log(.7) - .3 * np.log(.3)]
    by_hand = [-np.log(.8) * 2 - .01 * entropies[0], -np.log(.3) * -1 - .01 * entropies[1]]
    assert float(actor_loss) == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert float(critic_loss) == pytest.approx((2 ** 2 + 1 ** 2) / 2)


@pytest.mark.parametrize("compiler", [{}, {"jit_compile": True}], ids=["graph", "xla"])
def test_losses_stay_finite_where_the_actor_is_certain(a3c, compiler):
    @tf.function(**compiler, input_signature=[tf.TensorSpec((None, 1))])
    def loss_and_gradient(p):
        with tf.GradientTape() as tape:
            tape.watch(p)
            loss, _ = a3c.losses(p, p, 1 - p, p + 1)
        return loss, tape.gradient(loss, p)
    for tensor in loss_and_gradient(tf.constant([[0.], [1.]])):
        assert np.isfinite(tensor).all()


def test_three_updates_equal_keras_adam_on_copies_of_both_networks(a3c, agent, steps):
    states, actions, rewards, last = steps
    twins = [keras.models.clone_model(model) for model in (a3c.actor, a3c.critic)]
    for twin, weights in zip(twins, (a3c.actor_at_start, a3c.critic_at_start)):
        twin.set_weights(weights)
    adams = [keras.optimizers.Adam(rate) for rate in (.001, .01)]
    for T in 10, 20, 23:
        R = agent.discount_reward(rewards[:T], last, False)[:, np.newaxis]
        agent.train_episode(states[:T], actions[:T], rewards[:T], last, False)
        a = np.array(actions[:T])[:, np.newaxis]
        with tf.GradientTape(persistent=True) as tape:
            p, value = [twin(np.array(states[:T], np.float32)) for twin in twins]
            prob = tf.where(a == 1, p, 1 - p)
            entropy = -p * tf.math.log(p) - (1 - p) * tf.math.log(1 - p)
            advantage = tf.stop_gradient(R - value)
            losses = [tf.reduce_mean(-tf.math.log(prob) * advantage - .01 * entropy),
                      tf.reduce_mean((R - value) ** 2)]
        for adam, loss, twin in zip(adams, losses, twins):
            adam.apply(tape.gradient(loss, twin.trainable_variables), twin.trainable_variables)
    expected = [weight for twin in twins for weight in twin.get_weights()]
    at_start = a3c.actor_at_start + a3c.critic_at_start
    moved = [np.abs(new - old).max() for new, old in zip(expected, at_start)]
    assert min(moved) > 1e-3        # all weights of both have learned,
    for ours, theirs in zip(a3c.actor_weights + a3c.critic_weights, expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)     # and to the same place


# -- how threads share the networks

def test_threads_act_by_the_same_networks_as_keras(a3c):
    state = np.array([.5, -1., .1, 2.], np.float32)
    p = float(a3c.actor(state[np.newaxis])[0, 0])
    value = float(a3c.critic(state[np.newaxis])[0, 0])
    assert .05 < p < .95
    assert a3c.predict_actor(state) == pytest.approx(p, rel=1e-5)
    assert a3c.predict_critic(state) == pytest.approx(value, rel=1e-5)


def test_a_network_that_was_changed_in_one_place_only_is_refused(a3c):
    two.check_predictions(a3c)
    a3c.actor.layers[2].activation = keras.activations.tanh
    with pytest.raises(SystemExit) as refused:
        two.check_predictions(a3c)
    a3c.actor.layers[2].activation = keras.activations.relu
    assert "do not define the networks" in refused.value.code


def test_an_update_publishes_new_lists_and_leaves_the_old_ones_as_they_were(a3c, agent, steps):
    held = a3c.actor_weights
    copies = [weight.copy() for weight in held]
    agent.train_episode(*steps, True)
    assert a3c.actor_weights is not held
    assert all((weight == copy).all() for weight, copy in zip(held, copies))
    for weights, model in ((a3c.actor_weights, a3c.actor), (a3c.critic_weights, a3c.critic)):
        assert all((ours == keras_).all() for ours, keras_ in zip(weights, model.get_weights()))
    assert all((new != old).any() for new, old in zip(a3c.actor_weights, held))


def test_a_weight_that_is_not_finite_is_refused(a3c, agent, steps):
    states, actions, rewards, last = steps
    states[5] = states[5] * np.inf
    held = a3c.actor_weights, a3c.critic_weights
    with pytest.raises(FloatingPointError, match="after update 1"):
        agent.train_episode(states, actions, rewards, last, True)
    assert held[0] is a3c.actor_weights and held[1] is a3c.critic_weights


def test_free_threads_lose_none_of_300_updates(a3c, monkeypatch, capsys):
    update = a3c.compiled_update
    batches = []
    threads = set()

    def noted(*batch):
        batches.append(batch)
        threads.add(threading.current_thread())
        weights = update(*batch)
        if len(batches) >= 300 and len(threads) == 4:
            a3c.progress.stop.set()
        return weights
    monkeypatch.setattr(a3c, "compiled_update", noted)
    a3c.train(2000, 4, 1, log=True)
    assert a3c.progress.failed is None
    assert len(batches) == a3c.actor_optimizer.iterations >= 300
    four = a3c.actor_weights + a3c.critic_weights

    # One after the other in this thread, the same updates lead to the same weights.
    start_anew(a3c)
    for batch in batches:
        actor_weights, critic_weights = update(*batch)
    alone = actor_weights + critic_weights
    assert all((one.numpy() == other).all() for one, other in zip(alone, four))


# -- a whole run

def test_agents_play_in_the_threads_that_they_are(a3c, monkeypatch, capsys):
    players = []

    def run_episode(agent):
        players.append((agent, threading.current_thread()))
        while len(players) < 3:
            pass
        a3c.progress.stop.set()
    monkeypatch.setattr(two.Agent, "run_episode", run_episode)
    a3c.train(2000, 3, 10)
    assert len(players) == 3 and all(agent is thread for agent, thread in players)
    assert not any(agent.is_alive() for agent, _ in players)


def test_four_threads_with_one_seed_repeat_to_the_last_bit(a3c, capsys):
    runs = []
    for seed in 5, 5, 6:
        start_anew(a3c, seed).train(20, 4, 10, log=True)
        runs.append(([e[:5] for e in a3c.progress.history], a3c.actor_weights + a3c.critic_weights))
    (same, weights), (again, weights_again), (other, _) = runs
    assert same == again != other and len(same) == 20
    assert all((one == two_).all() for one, two_ in zip(weights, weights_again))


def test_a_seed_fixes_the_weights_at_the_start(monkeypatch):
    monkeypatch.setattr(two.A3C, "_build_optimizer", lambda self: None)
    same, again, other = [two.A3C(seed).critic_weights[0] for seed in (5, 5, 6)]
    assert (same == again).all() and (same != other).any()


def test_the_winner_hands_over_the_mean_of_its_ten_weights(a3c, agent):
    actors = [random_weights(a3c.actor, i) for i in range(11)]
    critics = [random_weights(a3c.critic, i) for i in range(20, 31)]
    for actor, critic, length in zip(actors, critics, [30] + [200] * 10):
        assert not a3c.is_learned
        a3c.publish(actor, critic)
        agent.finish_episode(length)
    assert a3c.is_learned and a3c.progress.stop.is_set() and a3c.steps == 2030
    for weights, ten in ((a3c.actor_weights, actors[1:]), (a3c.critic_weights, critics[1:])):
        for weight, arrays in zip(weights, zip(*ten)):
            np.testing.assert_allclose(weight, sum(arrays) / 10, rtol=1e-4, atol=1e-6)


def test_a_run_that_learns_keeps_both_networks_and_plays_the_actor_again(
        main, a3c, tmp_path, capsys):
    assert main("--seed", "2", "--test-episodes", "1") == 0
    learned = a3c.actor_weights
    names = {path.name for path in tmp_path.iterdir()}
    assert {"actor.weights.h5", "critic.weights.h5", "history.csv", "learning_curve.png",
            "A3C-episode-0.mp4"} <= names
    assert "A3C-episode-1.mp4" not in names
    printed = capsys.readouterr().out
    assert "\nlearned in " in printed and "test: mean of 1 episodes" in printed

    assert main("--play", str(tmp_path / "actor.weights.h5"), "--test-episodes", "2") == 0
    assert not a3c.progress.history
    assert all((weight == saved).all() for weight, saved in zip(a3c.actor_weights, learned))
    assert "test: mean of 2 episodes" in capsys.readouterr().out

    with pytest.raises(SystemExit) as refused:
        main("--play", str(tmp_path / "history.csv"))
    assert refused.value.code == 2


def test_a_run_that_reaches_the_most_episodes_keeps_its_unfinished_networks(
        main, tmp_path, capsys):
    assert main("--max-episodes", "8") == 1
    assert "not learned in" in capsys.readouterr().out
    assert (tmp_path / "history.csv").read_text().count("\n") == 1 + 8
    for name in "actor", "critic":
        assert (tmp_path / f"{name}.unfinished.weights.h5").exists()


def test_an_agent_that_fails_ends_the_run_and_is_shown_once_and_named(
        main, a3c, tmp_path, monkeypatch, capsys):
    def discount_reward(agent, rewards, *_):
        if agent.name == "thread2":
            raise RuntimeError("the pole broke")
        return np.ones(len(rewards), np.float32)
    shown = []
    monkeypatch.setattr(two.Agent, "discount_reward", discount_reward)
    monkeypatch.setattr(threading, "excepthook", shown.append)
    assert main("--seed", "1") == 1
    assert [(str(e.exc_value), e.thread.name) for e in shown] == [("the pole broke", "thread2")]
    assert "not learned, thread2 failed, in" in capsys.readouterr().out
    assert (tmp_path / "actor.unfinished.weights.h5").exists()


def test_of_agents_that_all_fail_at_once_one_is_shown(main, a3c, monkeypatch, capsys):
    all_four = threading.Barrier(4, timeout=10)

    def predict_actor(state):
        all_four.wait()
        raise RuntimeError("the pole broke")
    shown = []
    monkeypatch.setattr(a3c, "predict_actor", predict_actor)
    monkeypatch.setattr(threading, "excepthook", shown.append)
    monkeypatch.setattr(two, "check_predictions", lambda a3c: None)
    assert main() == 1
    assert [str(e.exc_value) for e in shown] == ["the pole broke"]


@pytest.mark.parametrize("arguments", [[], ["--seed", "1"]], ids=["free", "in_turns"])
def test_ctrl_c_ends_all_agents_and_keeps_both_networks(
        main, arguments, tmp_path, monkeypatch, capsys):
    def watch(progress, log):
        progress.limit = 1000       # so that nobody meets the rule before
        while not progress.history:
            progress.stop.wait(.01)
        raise KeyboardInterrupt
    monkeypatch.setattr(two.base.Progress, "watch", watch)
    with pytest.raises(KeyboardInterrupt):
        main(*arguments)
    assert not any(isinstance(thread, two.Agent) for thread in threading.enumerate())
    assert (tmp_path / "actor.unfinished.weights.h5").exists()
    assert (tmp_path / "history.csv").read_text().count("\n") > 1


def test_a_bad_argument_is_refused_in_one_line_before_anything_is_written(main, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main("--max-episodes", "0")
    assert refused.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.splitlines()[-1].endswith(
        "argument --max-episodes: '0' is not a whole number from 1 to 2^32 - 1")
