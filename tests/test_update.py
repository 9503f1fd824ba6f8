"""The two arrows of A3C: a brain computes a gradient, the server applies it. The copies of θ."""

import threading

import numpy as np
import pytest
import tensorflow as tf
from conftest import fill_queue, forward

import a3c_cartpole as a3c


def mean_loss(weights, s, a, R, advantage):
    """The article's loss in float64; `advantage` is the factor in the loss of the policy."""
    p, v = forward(weights, s)
    policy = -np.log((p * a).sum(axis=1) + 1e-10) * advantage
    value = a3c.LOSS_V * (R - v) ** 2
    entropy = a3c.LOSS_ENTROPY * (p * np.log(p + 1e-10)).sum(axis=1)
    return (policy + value + entropy).mean()


def return_of(weights, R_n, s_, mask):
    return R_n + a3c.GAMMA_N * forward(weights, s_)[1] * mask


def finite_differences(function, theta, step=1e-6):
    """Central differences of function(θ) on every single weight."""
    theta = theta.astype(float)
    steps = step * np.eye(len(theta))
    return np.array([(function(theta + d) - function(theta - d)) / (2 * step) for d in steps])


def handed_over(brain):
    """Let a brain update; return the gradient that it handed to the server."""
    gradients = []
    brain.parameter_server.apply_gradient = lambda gradient, _: gradients.append(gradient)
    try:
        brain.update_parameter_server()
    finally:
        del brain.parameter_server.apply_gradient
    (gradient,) = gradients
    return gradient


def test_loss_of_one_sample_computed_by_hand():
    p, v = tf.constant([[0.25, 0.75]]), tf.constant([[0.5]])
    loss = a3c.LocalBrain.loss_total(p, v, tf.constant([[0.0, 1.0]]), tf.constant([[2.0]]))
    # -log .75 · 1.5  +  .5 · 1.5²  +  .01 · (.25 log .25 + .75 log .75)
    assert loss.shape == (1, 1)
    assert float(loss[0, 0]) == pytest.approx(0.4315231087 + 1.125 - 0.0056233514, abs=1e-6)


@pytest.mark.parametrize("samples", [5, 12, 40])
def test_gradient_equals_finite_differences_with_r_and_advantage_held_constant(
        server, brain, rng, samples):
    theta = brain.theta
    s, a, R_n, s_, mask = fill_queue(brain, rng, samples)
    gradient = handed_over(brain)
    R = return_of(server.unpack(theta), R_n, s_, mask)
    advantage = R - forward(server.unpack(theta), s)[1]

    def held(t):
        return mean_loss(server.unpack(t), s, a, R, advantage)

    def moving_advantage(t):
        return mean_loss(server.unpack(t), s, a, R, R - forward(server.unpack(t), s)[1])

    def moving_return(t):
        return mean_loss(server.unpack(t), s, a, return_of(server.unpack(t), R_n, s_, mask),
                         advantage)

    np.testing.assert_allclose(gradient, finite_differences(held, theta), rtol=1e-3, atol=5e-5)
    assert np.abs(gradient - finite_differences(moving_advantage, theta)).max() > 0.01
    assert np.abs(gradient - finite_differences(moving_return, theta)).max() > 0.01


def test_gradient_is_that_of_the_brains_own_weights_and_changes_the_servers(server, brain, rng):
    own = brain.theta
    samples_rng = np.random.default_rng(1)
    fill_queue(brain, samples_rng, 9)
    gradient = handed_over(brain)
    shared = rng.normal(size=own.shape).astype(np.float32)  # meanwhile, others change θ
    server.theta = shared
    fill_queue(brain, np.random.default_rng(1), 9)
    np.testing.assert_allclose(handed_over(brain), gradient, atol=1e-6)
    fill_queue(brain, np.random.default_rng(1), 9)
    brain.update_parameter_server()
    expected = shared - 5e-3 * gradient / np.sqrt(0.99 + 0.01 * gradient**2 + 1e-10)
    np.testing.assert_allclose(server.theta, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(brain.theta, own)


def test_gradient_is_found_without_the_servers_lock_and_applied_under_it(server, brain, rng):
    before = server.theta
    fill_queue(brain, rng, 9)
    found = threading.Event()
    apply_gradient = server.apply_gradient

    def spy(*arguments):
        found.set()
        apply_gradient(*arguments)

    server.apply_gradient = spy
    try:
        thread = threading.Thread(target=brain.update_parameter_server)
        with server.update_lock:
            thread.start()
            assert found.wait(20)  # the gradient is there although the lock is taken
            thread.join(0.2)
            assert thread.is_alive() and server.theta is before  # it waits to be applied
        thread.join(20)
        assert server.updates == 1 and server.theta is not before
    finally:
        del server.apply_gradient


def test_sixty_updates_equal_the_articles_graph_in_tensorflow_1(server, brain, rng):
    graph = tf.Graph()
    with graph.as_default():
        weights = [tf.compat.v1.Variable(w) for w in server.unpack(server.theta)]

        def network(state):
            hidden = tf.nn.relu(state @ weights[0] + weights[1])
            return tf.nn.softmax(hidden @ weights[2] + weights[3]), hidden @ weights[4] + weights[5]

        shapes = (4, 2, 1, 4, 1)
        feeds = [tf.compat.v1.placeholder(tf.float32, (None, size)) for size in shapes]
        s_t, a_t, r_t, next_t, mask_t = feeds
        R = tf.stop_gradient(r_t + 0.99**5 * network(next_t)[1] * mask_t)
        p, v = network(s_t)
        log_prob = tf.math.log(tf.reduce_sum(p * a_t, axis=1, keepdims=True) + 1e-10)
        advantage = R - v
        entropy = 0.01 * tf.reduce_sum(p * tf.math.log(p + 1e-10), axis=1, keepdims=True)
        loss = tf.reduce_mean(
            -log_prob * tf.stop_gradient(advantage) + 0.5 * tf.square(advantage) + entropy)
        optimizer = tf.compat.v1.train.RMSPropOptimizer(5e-3, 0.99)
        update = optimizer.apply_gradients(zip(tf.gradients(loss, weights), weights))
        start = tf.compat.v1.global_variables_initializer()
    first = server.theta
    session = tf.compat.v1.Session(graph=graph)  # no `with`: that would change TensorFlow's mode
    session.run(start)
    for samples in [5, 11, 40] * 20:
        columns = fill_queue(brain, rng, samples)
        values = [np.reshape(x, (samples, -1)) for x in columns]
        session.run(update, dict(zip(feeds, values)))
        brain.update_parameter_server()
        brain.pull_parameter_server()
    twin = np.concatenate([w.ravel() for w in session.run(weights)])
    session.close()
    assert server.updates == 60 and np.abs(server.theta - first).max() > 0.02
    np.testing.assert_allclose(server.theta, twin, rtol=0, atol=1e-6)


def test_mean_square_starts_at_1_and_every_brain_with_the_servers_weights():
    server = a3c.ParameterServer(seed=3)
    assert server.theta.shape == server.mean_square.shape == (131,)
    assert server.theta.dtype == np.float32 and (server.mean_square == 1).all()
    np.testing.assert_array_equal(server.theta, a3c.ParameterServer(seed=3).theta)


def test_staleness_counts_the_updates_of_others_since_the_pull(server, rng):
    brains = [a3c.LocalBrain(f"brain{i}", server) for i in range(3)]
    for brain in brains:  # all have pulled at update 0
        fill_queue(brain, rng, 5)
        brain.update_parameter_server()
    brains[0].pull_parameter_server()
    fill_queue(brains[0], rng, 5)
    brains[0].update_parameter_server()
    assert server.staleness == [0, 1, 2, 0]


def test_below_min_batch_nothing_changes_and_the_samples_stay(server, brain, rng):
    before = server.theta
    fill_queue(brain, rng, a3c.MIN_BATCH - 1)
    brain.update_parameter_server()
    assert server.theta is before and server.updates == 0
    assert len(brain.train_queue) == a3c.MIN_BATCH - 1
    fill_queue(brain, rng, 1)
    brain.update_parameter_server()
    assert server.updates == 1 and len(brain.train_queue) == 0


def test_sample_without_a_later_state_is_queued_with_none_state_and_mask_0(brain):
    s, a = np.arange(4.0), np.array([0.0, 1.0])
    brain.train_push(s, a, 2.0, s + 1)
    brain.train_push(s, a, 3.0, None)
    (_, _, first, s_1, mask_1), (_, _, second, s_2, mask_2) = brain.train_queue
    assert (first, mask_1, second, mask_2) == (2.0, 1, 3.0, 0)
    np.testing.assert_array_equal(s_1, s + 1)
    np.testing.assert_array_equal(s_2, np.zeros(4))


def test_model_is_keras_with_the_weights_as_they_are_now(server, brain, rng):
    for _ in range(2):
        brain.theta = rng.normal(size=(131,)).astype(np.float32)
        brain.push_parameter_server()
        weights = server.model.get_weights()
        assert [w.shape for w in weights] == [(4, 16), (16,), (16, 2), (2,), (16, 1), (1,)]
        np.testing.assert_array_equal(np.concatenate([w.ravel() for w in weights]), brain.theta)


def test_predict_p_equals_keras(server, brain, rng):
    for scale in 0.1, 1.0, 5.0:
        brain.theta = rng.normal(size=(131,), scale=scale).astype(np.float32)
        brain.push_parameter_server()
        s = rng.normal(size=(64, 4), scale=2).astype(np.float32)
        p = brain.predict_p(s)
        assert p.shape == (64, 2)
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(p, server.model(s)[0], atol=1e-6)


def test_predict_p_survives_logits_that_overflow_exp(brain):
    brain.theta = np.full((131,), 100, np.float32)
    np.testing.assert_allclose(brain.predict_p(np.ones((2, 4), np.float32)), 0.5)


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


def test_eight_threads_lose_no_update(server):
    def work(brain, updates):
        for _ in range(updates):
            fill_queue(brain, np.random.default_rng(1), 6)
            brain.update_parameter_server()  # it never pulls, so each gradient is the same

    start = server.theta
    brains = [a3c.LocalBrain(f"brain{i}", server) for i in range(8)]
    threads = [threading.Thread(target=work, args=(brain, 250)) for brain in brains]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    theta, mean_square, updates = server.theta, server.mean_square, server.updates

    server.theta, server.mean_square = start, np.ones_like(start)
    work(brains[0], 2000)
    assert updates == 2000
    np.testing.assert_allclose(theta, server.theta, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean_square, server.mean_square, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_an_error_that_leaves_theta_as_it_was(
        server, brain, rng, poison):
    before = server.theta
    fill_queue(brain, rng, 6)
    brain.train_push(np.zeros(4), np.eye(2)[0], poison, None)
    server.frames = 4321
    with pytest.raises(FloatingPointError, match="not finite.*4321"):
        brain.update_parameter_server()
    assert server.theta is before and server.updates == 0


def test_no_gradient_is_applied_once_learning_is_over(server, brain, rng):
    before = server.theta
    server.progress.stop.set()
    fill_queue(brain, rng, 10)
    brain.update_parameter_server()
    assert server.theta is before and server.updates == 0
