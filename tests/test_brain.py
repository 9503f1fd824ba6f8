"""The mathematics of LocalBrain and ParameterServer: loss, gradients, RMSProp, the copies."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import fill_queue, forward

import a3c_cartpole as a3c


def mean_loss(weights, s, a, target, advantage):
    """The article's loss in float64; `advantage` is what weighs the policy term."""
    p, v = forward(weights, s)
    policy = -np.log((p * a).sum(axis=1) + 1e-10) * advantage
    value = a3c.LOSS_V * (target - v) ** 2
    entropy = a3c.LOSS_ENTROPY * (p * np.log(p + 1e-10)).sum(axis=1)
    return (policy + value + entropy).mean()


def target_of(weights, r, s_, mask):
    return r + a3c.GAMMA_N * forward(weights, s_)[1] * mask


def finite_differences(function, theta, step=1e-6):
    """Central differences of function(θ) on every single weight."""
    theta = theta.astype(np.float64)
    steps = step * np.eye(len(theta))
    return np.array([(function(theta + d) - function(theta - d)) / (2 * step) for d in steps])


def random_theta(rng, server, scale=1.0):
    return rng.normal(size=server.theta.shape, scale=scale).astype(np.float32)


def gradient_of_an_update(server, brain):
    """The gradient that an update used, from what RMSProp made of the mean square."""
    before, theta = server.mean_square.astype(float), server.theta.astype(float)
    brain.update_parameter_server()
    size = np.sqrt((server.mean_square - 0.99 * before) / 0.01)
    return size * np.sign(theta - server.theta)


@pytest.fixture
def case(server, brain, rng):
    """Random local weights, 12 samples, and the gradient that the update takes for them."""
    brain.theta = random_theta(rng, server, scale=0.5)
    samples = fill_queue(brain, rng, 12)
    server.mean_square = np.zeros_like(server.mean_square)
    return server.unpack, brain.theta, samples, gradient_of_an_update(server, brain)


def test_loss_of_one_sample_computed_by_hand():
    p, v = tf.constant([[0.25, 0.75]]), tf.constant([[0.5]])
    loss = a3c.LocalBrain.loss_total(p, v, tf.constant([[0.0, 1.0]]), tf.constant([[2.0]]))
    # -log .75 · 1.5  +  .5 · 1.5²  +  .01 · (.25 log .25 + .75 log .75)
    assert loss.shape == (1, 1)
    assert float(loss[0, 0]) == pytest.approx(0.4315231087 + 1.125 - 0.0056233514, abs=1e-6)


def test_gradient_equals_finite_differences_with_advantage_and_next_value_held(case):
    unpack, theta, (s, a, r, s_, mask), gradient = case
    target = target_of(unpack(theta), r, s_, mask)
    advantage = target - forward(unpack(theta), s)[1]
    expected = finite_differences(lambda t: mean_loss(unpack(t), s, a, target, advantage), theta)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=5e-5)


def test_gradient_is_not_that_of_an_advantage_that_moves(case):
    unpack, theta, (s, a, r, s_, mask), gradient = case
    target = target_of(unpack(theta), r, s_, mask)
    moving = finite_differences(
        lambda t: mean_loss(unpack(t), s, a, target, target - forward(unpack(t), s)[1]), theta
    )
    assert np.abs(gradient - moving).max() > 0.01


def test_gradient_is_not_that_of_a_next_value_that_moves(case):
    unpack, theta, (s, a, r, s_, mask), gradient = case
    advantage = target_of(unpack(theta), r, s_, mask) - forward(unpack(theta), s)[1]
    moving = finite_differences(
        lambda t: mean_loss(unpack(t), s, a, target_of(unpack(t), r, s_, mask), advantage), theta
    )
    assert np.abs(gradient - moving).max() > 0.01


@pytest.mark.parametrize("samples", [5, 11, 18, 40])
def test_one_hundred_updates_equal_tensorflow_1s_rmsprop(server, brain, rng, samples):
    """The twin: Keras' model, the loss written out again, tf.compat.v1's optimiser."""
    twin, start = server._build_model(), server.theta
    twin.set_weights(server.model.get_weights())
    optimizer = tf.compat.v1.train.RMSPropOptimizer(5e-3, 0.99)
    for _ in range(100):
        s, a, r, s_, mask = (tf.constant(x, tf.float32) for x in fill_queue(brain, rng, samples))
        target = r + 0.99**5 * twin(s_)[1][:, 0] * mask
        with tf.GradientTape() as tape:
            p, v = twin(s)
            advantage = target - v[:, 0]
            policy = -tf.math.log(tf.reduce_sum(p * a, 1)) * tf.stop_gradient(advantage)
            entropy = -tf.reduce_sum(p * tf.math.log(p), 1)
            loss = tf.reduce_mean(policy + 0.5 * advantage**2 - 0.01 * entropy)
        weights = [w.value for w in twin.trainable_variables]
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))
        brain.update_parameter_server()
        brain.pull_parameter_server()
    assert server.updates == 100 and np.abs(server.theta - start).max() > 0.02
    np.testing.assert_allclose(server.theta, server.pack(twin.get_weights()), rtol=0, atol=1e-6)


def test_gradient_is_taken_at_the_local_weights_and_applied_to_the_servers(server, brain, rng):
    local, shared = random_theta(rng, server, 0.5), random_theta(rng, server)
    unpack, brain.theta, server.theta = server.unpack, local, shared
    s, a, r, s_, mask = fill_queue(brain, rng, 9)
    target = target_of(unpack(local), r, s_, mask)
    advantage = target - forward(unpack(local), s)[1]
    g = finite_differences(lambda t: mean_loss(unpack(t), s, a, target, advantage), local)
    brain.update_parameter_server()
    expected = shared - 5e-3 * g / np.sqrt(0.99 + 0.01 * g**2 + 1e-10)
    np.testing.assert_allclose(server.theta, expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(brain.theta, local)


def test_mean_square_starts_at_1_as_tensorflow_1s_did(server):
    assert server.mean_square.shape == server.theta.shape == (131,)
    assert (server.mean_square == 1).all()


def test_making_brains_leaves_the_server_as_it_was(rng):
    server, untouched = a3c.ParameterServer(seed=3), a3c.ParameterServer(seed=3)
    brains = [a3c.LocalBrain(f"brain{i}", server) for i in range(3)]
    for theta in server.theta, *(brain.theta for brain in brains):
        np.testing.assert_array_equal(theta, untouched.theta)
    assert (server.mean_square == 1).all() and server.updates == 0


def test_model_is_keras_with_the_weights_as_they_are_now(server, brain, rng):
    for theta in random_theta(rng, server), random_theta(rng, server):
        brain.theta = theta
        brain.push_parameter_server()
        weights = server.model.get_weights()
        assert [w.shape for w in weights] == [(4, 16), (16,), (16, 2), (2,), (16, 1), (1,)]
        np.testing.assert_array_equal(np.concatenate([w.ravel() for w in weights]), theta)


def test_push_of_one_brain_is_seen_by_the_pull_of_another(server, brain, rng):
    other, before = a3c.LocalBrain("other", server), server.theta
    brain.theta = random_theta(rng, server)
    brain.push_parameter_server()
    np.testing.assert_array_equal(other.theta, before)
    other.pull_parameter_server()
    np.testing.assert_array_equal(other.theta, brain.theta)
    np.testing.assert_array_equal(server.theta, brain.theta)


def test_what_was_pulled_does_not_move_with_updates_until_the_next_pull(server, brain, rng):
    other = a3c.LocalBrain("other", server)
    s, before = rng.normal(size=(3, 4)).astype(np.float32), other.theta.copy()
    p = other.predict_p(s)
    fill_queue(brain, rng, 8)
    brain.update_parameter_server()
    np.testing.assert_array_equal(other.theta, before)
    np.testing.assert_array_equal(other.predict_p(s), p)
    other.pull_parameter_server()
    assert np.abs(other.theta - before).max() > 1e-6
    np.testing.assert_allclose(other.predict_p(s), server.model(s)[0], atol=1e-6)


def test_below_min_batch_nothing_changes_and_nothing_is_lost(server, brain, rng):
    before = server.theta.copy()
    fill_queue(brain, rng, a3c.MIN_BATCH - 1)
    queued = [list(column) for column in brain.train_queue]
    brain.update_parameter_server()
    np.testing.assert_array_equal(server.theta, before)
    assert server.updates == 0
    for column, kept in zip(brain.train_queue, queued, strict=True):
        np.testing.assert_array_equal(column, kept)
    fill_queue(brain, rng, 1)
    brain.update_parameter_server()
    assert server.updates == 1 and not any(brain.train_queue)


def test_sample_of_an_episodes_end_waits_with_zeros_and_mask_0(brain):
    s, a = np.arange(4.0), np.array([0.0, 1.0])
    brain.train_push(s, a, 2.0, s + 1)
    brain.train_push(s, a, 3.0, None)
    _, _, r, s_, mask = brain.train_queue
    assert (r, mask) == ([2.0, 3.0], [1.0, 0.0])
    np.testing.assert_array_equal(s_, [s + 1, np.zeros(4)])


@pytest.mark.parametrize("hidden", [(), (16,), (8, 9), (8, 9, 10)])
def test_predict_p_equals_keras_for_any_number_of_hidden_relu_layers(rng, hidden):
    class Server(a3c.ParameterServer):
        def _build_model(self):
            state = last = keras.Input((4,))
            for units in hidden:
                last = keras.layers.Dense(units, "relu")(last)
            heads = keras.layers.Dense(2, "softmax")(last), keras.layers.Dense(1)(last)
            return keras.Model(state, heads)

    server = Server()
    brain = a3c.LocalBrain("deep", server)
    fill_queue(brain, rng, 10)
    brain.update_parameter_server()
    for scale in 0.1, 1.0, 5.0:
        brain.theta = random_theta(rng, server, scale)
        brain.push_parameter_server()
        s = rng.normal(size=(64, 4), scale=2).astype(np.float32)
        p = brain.predict_p(s)
        assert p.shape == (64, 2)
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(p, server.model(s)[0], atol=1e-6)


def test_predict_p_survives_logits_that_overflow_exp(server, brain):
    brain.theta = np.full_like(server.theta, 100)
    np.testing.assert_allclose(brain.predict_p(np.ones((2, 4), np.float32)), 0.5)


def test_8_threads_of_1500_updates_lose_none():
    results = []
    for threads, updates in (8, 1500), (1, 12_000):
        server = a3c.ParameterServer(seed=5)
        brains = [a3c.LocalBrain(f"brain{i}", server) for i in range(threads)]

        def work(brain):
            for _ in range(updates):
                fill_queue(brain, np.random.default_rng(1), 6)
                brain.update_parameter_server()  # never pulled: each gradient is the same

        workers = [threading.Thread(target=work, args=[brain]) for brain in brains]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert server.updates == 12_000
        results.append((server.theta, server.mean_square))
    (theta, mean_square), (theta_alone, mean_square_alone) = results
    np.testing.assert_allclose(theta, theta_alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean_square, mean_square_alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_update_that_is_not_finite_names_the_step_and_leaves_the_weights(
    server, brain, rng, poison
):
    before = server.theta.copy()
    fill_queue(brain, rng, 6)
    brain.train_queue[2][0] = poison
    server.frames = 4321
    with pytest.raises(FloatingPointError, match="not finite.*4321"):
        brain.update_parameter_server()
    np.testing.assert_array_equal(server.theta, before)


def test_only_the_cpu_is_visible():
    assert not tf.config.get_visible_devices("GPU")
