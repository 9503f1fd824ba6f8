"""companions/ppo_cartpole.py: returns and advantages, the clipped loss, the update, learning."""


import keras
import numpy as np
import ppo_cartpole as ppo
import pytest
import tensorflow as tf
from conftest import FakeEnv, finite_differences


def memory_of(rng, steps):
    """A Memory of random steps."""
    memory = ppo.Memory()
    for log_pi in np.log(rng.uniform(.3, .7, steps)):
        memory.add(rng.normal(size=4), int(rng.integers(2)), rng.normal(), rng.normal(), log_pi)
    memory.finish_path()
    return memory


def agent_with(weights):
    """An agent whose step of the optimizer is minus the gradient."""
    model = ppo.PVNet()
    model.set_weights(weights)
    agent = ppo.Agent(model)
    agent.optimizer = keras.optimizers.SGD(1.)
    agent.optimizer.build(model.trainable_variables)
    return agent


def test_return_and_advantage_equal_the_sums_that_define_them(rng):
    memory = memory_of(rng, 200)
    r = np.array(memory.reward_lst)
    v = np.array(memory.value_lst)
    delta = r + .99 * np.append(v[1:], 0) - v
    for t in range(200):
        k = np.arange(200 - t)
        assert memory.return_lst[t] == pytest.approx((.99**k * r[t:]).sum())
        assert memory.advantage_lst[t] == pytest.approx(((.99 * .95) ** k * delta[t:]).sum())


def test_batch_holds_the_episode_with_standardized_advantages_and_empties_the_memory(rng):
    memory = memory_of(rng, 30)
    kept = {**vars(memory)}
    *columns, advantage = memory.get_batch()
    assert not any(len(entries) for entries in vars(memory).values())
    for column, name in zip(columns, ("state", "action", "log_pi", "return"), strict=True):
        np.testing.assert_allclose(column, kept[f"{name}_lst"], rtol=1e-6)
    a = kept["advantage_lst"]
    variance = ((a - a.mean()) ** 2).sum() / 29
    np.testing.assert_allclose(advantage, (a - a.mean()) / variance**.5, rtol=1e-4, atol=1e-6)


def test_an_episode_of_one_step_teaches_the_value_and_makes_no_nan(rng):
    memory = memory_of(rng, 1)
    state, returns = memory.state_lst[0], memory.return_lst[0]
    agent = ppo.Agent(ppo.PVNet())
    error = abs(agent.forward(agent.weights, state)[1][0] - returns)
    agent.update(memory.get_batch())
    assert abs(agent.forward(agent.weights, state)[1][0] - returns) < error     # false if NaN
    assert all(np.isfinite(w).all() for w in agent.weights)


@pytest.mark.parametrize("ratio, advantage, slope", [
    (1.1, 2, 2), (1.5, 2, 0), (.5, 2, 2), (.9, -2, -2), (.5, -2, 0), (1.5, -2, -2)])
def test_clip_in_its_corners_by_hand(ratio, advantage, slope, monkeypatch):
    monkeypatch.setattr(ppo, "TRAIN_ITERS", 1)
    # With weights of 0 both actions have π = .5 and V is 0. Then the slope of the ratio is
    # ratio·.5 at the chosen action's bias and minus this at the other's, that of the entropy is 0.
    agent = agent_with([np.zeros_like(w) for w in ppo.PVNet().get_weights()])
    state, action, log_pi = np.zeros((1, 4)), np.array([1]), np.log([.5 / ratio])
    columns = [x.astype(np.float32) for x in (log_pi, np.array([3]), np.array([advantage]))]
    agent.update((state.astype(np.float32), action, *columns))
    pi_bias, v_bias = agent.weights[5], agent.weights[7]
    np.testing.assert_allclose(pi_bias, [-slope * ratio / 2, slope * ratio / 2], rtol=1e-5)
    np.testing.assert_allclose(v_bias, .9 * 2 * 3, rtol=1e-5)


def test_gradients_equal_finite_differences_of_the_loss_in_numpy(rng, monkeypatch):
    for name, value in ("DROPRATE", 0), ("HID_NUM", 5), ("TRAIN_ITERS", 1):
        monkeypatch.setattr(ppo, name, value)
    before = [rng.normal(size=w.shape).astype(np.float32) / 2 for w in ppo.PVNet().get_weights()]
    agent = agent_with(before)
    batch = state, action, log_pi, returns, advantage = memory_of(rng, 12).get_batch()

    def loss(weights):
        pi, v = agent.forward(weights, state.astype(float))
        ratio = pi[range(12), action] / np.exp(log_pi)
        clipped = np.clip(ratio, .8, 1.2)
        return np.mean(-np.minimum(ratio * advantage, clipped * advantage)
                       + .9 * (returns - v[:, 0]) ** 2 + 1e-3 * (pi * np.log(pi)).sum(axis=1))

    agent.update(batch)
    for w, new, gradient in zip(before, agent.weights, finite_differences(loss, before)):
        np.testing.assert_allclose(w - new, gradient, atol=1e-5)
        assert np.abs(gradient).max() > 1e-3


def test_updates_equal_a_plain_loop_of_keras_adam_that_ends_by_the_posts_rule(rng, monkeypatch):
    monkeypatch.setattr(ppo, "DROPRATE", 0)
    keras.utils.set_random_seed(3)
    agent = ppo.Agent(ppo.PVNet())
    twin = ppo.PVNet()
    twin.set_weights(agent.weights)
    adam = keras.optimizers.Adam(1e-4, epsilon=1e-8)

    def twin_update(state, action, log_pi, returns, advantage):
        for step in range(1, 81):
            with tf.GradientTape() as tape:
                pi, value = twin(state)
                log_ratio = -keras.losses.sparse_categorical_crossentropy(action, pi) - log_pi
                ratio = tf.exp(log_ratio)
                gain = tf.minimum(ratio * advantage, tf.clip_by_value(ratio, .8, 1.2) * advantage)
                entropy = keras.losses.categorical_crossentropy(pi, pi)
                loss = tf.reduce_mean(-gain + .9 * (returns - value[:, 0]) ** 2 - 1e-3 * entropy)
            adam.apply(tape.gradient(loss, twin.trainable_variables), twin.trainable_variables)
            if np.mean(log_ratio) > .015:
                break
        return step

    steps = []
    for T, start in (50, .0149), (9, -1), (20, .0151):      # start: the mean at the first step
        state, _, _, returns, _ = memory_of(rng, T).get_batch()
        log_pi = np.log(twin(state)[0].numpy()[:, 0]) - np.float32(start)
        batch = state, np.zeros(T, np.int32), log_pi, returns, np.ones(T, np.float32)
        steps.append(twin_update(*batch))
        agent.update(batch)
        assert agent.optimizer.iterations == sum(steps)
        for weight, expected in zip(agent.weights, twin.get_weights()):
            np.testing.assert_allclose(weight, expected, atol=1e-5)
    assert steps == [2, 80, 1]
    assert agent.train.experimental_get_tracing_count() == 2    # not compiled anew for each T


def test_dropout_is_on_while_learning(rng, monkeypatch):
    monkeypatch.setattr(ppo, "TRAIN_ITERS", 1)
    start = ppo.PVNet().get_weights()
    agent = agent_with(start)
    batch = memory_of(rng, 20).get_batch()
    kernels = []
    for _ in range(2):
        agent.model.set_weights(start)
        agent.update(batch)
        kernels.append(agent.weights[2])
    assert not np.array_equal(*kernels)     # other units were left out


def test_weights_start_as_pytorchs_xavier_normal():
    keras.utils.set_random_seed(3)
    weights = ppo.PVNet().get_weights()
    assert [w.shape for w in weights[::2]] == [(4, 64), (64, 64), (64, 2), (64, 1)]
    assert not any(bias.any() for bias in weights[1::2])
    for kernel in weights[:4:2]:
        sigma = np.sqrt(2 / sum(kernel.shape))
        assert kernel.std() == pytest.approx(sigma, rel=.1)
        assert np.abs(kernel).max() > 2.5 * sigma       # a truncated normal ends at 2.3


def test_actions_are_drawn_by_their_probability_and_come_with_value_and_log_pi():
    agent = ppo.Agent(ppo.PVNet())
    agent.forward = lambda *_: (np.array([.2, .8]), np.array([.5]))
    drawn = [agent.get_action(np.zeros(4)) for _ in range(4000)]
    assert np.mean([action for action, _, _ in drawn]) == pytest.approx(.8, abs=.03)
    assert set(drawn) == {(0, .5, np.log(.2)), (1, .5, np.log(.8))}


@pytest.mark.parametrize("length, last", [(9, -1), (194, -1), (195, 1), (200, 1)])
def test_reward_is_1_at_the_end_of_195_steps_or_more_and_minus_1_at_a_fall(
        length, last, monkeypatch):
    class Run:
        steps = 0

        def finish_episode(self, *_):
            return self.steps > length      # in the second episode

    agent = ppo.Agent(ppo.PVNet())
    batches = []
    agent.update = batches.append
    monkeypatch.setattr(ppo.gym, "make", lambda *_, **__: FakeEnv(length))
    ppo.learning_loop(agent, Run(), seed=1)
    [(state, _, _, returns, _)] = batches
    assert len(state) == length
    np.testing.assert_allclose(returns, last * .99 ** np.arange(length)[::-1], rtol=1e-5)


def test_ppo_learns_the_real_cartpole(tmp_path, capsys):
    assert ppo.main(["--seed", "42", "--no-render", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "\nlearned in " in printed
    assert float(printed.split("test: mean of 10 episodes ")[1].split()[0]) >= 195
