"""The two arrows of A3C: a brain computes gradients, the server applies them. The copies of θ."""

import threading

import a3c_cartpole as a3c

import numpy as np
import pytest
import tensorflow as tf
from conftest import finite_differences


def forward(weights, s):
    """The network in plain NumPy, float64: p (B, 2) and V (B,)."""
    kernel, bias, p_kernel, p_bias, v_kernel, v_bias = [np.asarray(w, float) for w in weights]
    hidden = np.maximum(s @ kernel + bias, 0)
    z = hidden @ p_kernel + p_bias
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True), (hidden @ v_kernel + v_bias)[:, 0]


def mean_loss(weights, s, a, R, advantage):
    """The article's loss in float64; `advantage` is the factor in the loss of the policy."""
    p, v = forward(weights, s)
    policy = -np.log((p * a).sum(axis=1) + 1e-10) * advantage
    value = a3c.LOSS_V * (R - v) ** 2
    entropy = a3c.LOSS_ENTROPY * (p * np.log(p + 1e-10)).sum(axis=1)
    return (policy + value + entropy).mean()


def fill_queue(brain, rng, samples):
    """Queue random samples, some at the end of an episode; return arrays s, a, R_n, s_, mask."""
    s = rng.normal(size=(samples, 4)).astype(np.float32)
    a = np.eye(2, dtype=np.float32)[rng.integers(0, 2, samples)]
    R_n = rng.normal(size=samples).astype(np.float32)
    s_ = rng.normal(size=(samples, 4)).astype(np.float32)
    mask = (rng.random(samples) >= 0.3).astype(np.float32)
    for i in range(samples):
        brain.train_push(s[i], a[i], float(R_n[i]), s_[i] if mask[i] else None)
    return s, a, R_n, s_ * mask[:, None], mask


def difference(one, other):
    """The largest difference of two lists of arrays."""
    return max(np.abs(a - b).max() for a, b in zip(one, other, strict=True))


def handed_over(brain):
    """Let a brain update; return the gradients that it handed to the server."""
    handed = []
    brain.parameter_server.apply_gradients = handed.append
    brain.update_parameter_server()
    del brain.parameter_server.apply_gradients
    (gradients,) = handed
    return gradients


def test_loss_of_one_sample_computed_by_hand():
    p, v = tf.constant([[0.25, 0.75]]), tf.constant([0.5])
    (loss,) = a3c.loss_total(p, v, tf.constant([[0.0, 1.0]]), tf.constant([2.0]))
    # -log .75 · 1.5  +  .5 · 1.5²  +  .01 · (.25 log .25 + .75 log .75)
    assert float(loss) == pytest.approx(0.4315231087 + 1.125 - 0.0056233514, abs=1e-6)


@pytest.mark.parametrize("samples", [5, 40])
def test_gradients_equal_finite_differences_with_r_and_advantage_held_constant(
        brain, rng, samples):
    theta = brain.weights
    s, a, R_n, s_, mask = fill_queue(brain, rng, samples)
    gradients = handed_over(brain)

    def return_of(weights):
        return R_n + a3c.GAMMA_N * forward(weights, s_)[1] * mask

    R = return_of(theta)
    advantage = R - forward(theta, s)[1]
    held = finite_differences(lambda w: mean_loss(w, s, a, R, advantage), theta)
    moving_advantage = finite_differences(
        lambda w: mean_loss(w, s, a, R, R - forward(w, s)[1]), theta)
    moving_return = finite_differences(
        lambda w: mean_loss(w, s, a, return_of(w), advantage), theta)
    for gradient, expected in zip(gradients, held, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=5e-5)
    assert difference(gradients, moving_advantage) > 0.01
    assert difference(gradients, moving_return) > 0.01


def test_gradients_are_those_of_the_brains_own_weights_and_change_the_servers(server, brain, rng):
    own = brain.weights
    fill_queue(brain, np.random.default_rng(1), 9)
    gradients = handed_over(brain)
    shared = [rng.normal(size=w.shape).astype(np.float32) for w in own]
    server.weights = shared  # meanwhile, others change θ
    fill_queue(brain, np.random.default_rng(1), 9)
    brain.update_parameter_server()
    expected = [w - 5e-3 * g / np.sqrt(0.99 + 0.01 * g**2 + 1e-10)
                for w, g in zip(shared, gradients)]
    assert difference(server.weights, expected) < 1e-6
    assert brain.weights is own


def test_gradients_are_computed_without_the_servers_lock_and_applied_under_it(server, brain, rng):
    before = server.weights
    fill_queue(brain, rng, 9)
    computed = threading.Event()
    apply_gradients = server.apply_gradients

    def spy(gradients):
        computed.set()
        apply_gradients(gradients)

    server.apply_gradients = spy
    thread = threading.Thread(target=brain.update_parameter_server)
    with server.lock:
        thread.start()
        assert computed.wait(20)  # the gradients are there although the lock is taken
        thread.join(0.2)
        assert thread.is_alive() and server.weights is before  # it waits to apply them
    thread.join(20)
    assert server.weights is not before


def test_sixty_updates_equal_the_articles_graph_in_tensorflow_1(server, brain, rng):
    graph = tf.Graph()
    with graph.as_default():
        weights = [tf.compat.v1.Variable(w) for w in server.weights]

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
    first = server.weights
    session = tf.compat.v1.Session(graph=graph)  # no `with`: that would change TensorFlow's mode
    session.run(start)
    for samples in [5, 11, 40] * 20:
        columns = fill_queue(brain, rng, samples)
        session.run(update, dict(zip(feeds, [np.reshape(x, (samples, -1)) for x in columns])))
        brain.update_parameter_server()
        brain.pull_parameter_server()
    twin = session.run(weights)
    session.close()
    assert difference(server.weights, first) > 0.02
    assert difference(server.weights, twin) < 1e-6


def test_mean_squares_start_at_1_and_the_learning_rate_is_the_articles():
    server = a3c.ParameterServer()
    assert [w.shape for w in server.weights] == [(4, 16), (16,), (16, 2), (2,), (16, 1), (1,)]
    assert all(w.dtype == np.float32 for w in server.weights + server.mean_squares)
    assert all((m == 1).all() for m in server.mean_squares)
    assert server.learning_rate == 5e-3


def test_below_min_batch_nothing_changes_and_the_samples_stay(server, brain, rng):
    before = server.weights
    fill_queue(brain, rng, a3c.MIN_BATCH - 1)
    brain.update_parameter_server()
    assert server.weights is before and len(brain.train_queue) == a3c.MIN_BATCH - 1
    fill_queue(brain, rng, 1)
    brain.update_parameter_server()
    assert server.weights is not before and len(brain.train_queue) == 0


def test_p_and_v_equal_keras(server, brain, rng):
    for scale in 0.1, 1.0, 5.0:
        brain.weights = [rng.normal(size=w.shape, scale=scale).astype(np.float32)
                         for w in server.weights]
        brain.push_parameter_server()
        server.model.set_weights(server.weights)
        s = rng.normal(size=(64, 4), scale=2).astype(np.float32)
        expected_p, expected_v = server.model(s)
        p, v = brain.predict(s)
        np.testing.assert_allclose(p, expected_p, atol=1e-6)
        np.testing.assert_allclose(v, expected_v[:, 0], rtol=1e-5, atol=1e-5)
        p, v = brain.predict(s[3])
        np.testing.assert_allclose(p, expected_p[3], atol=1e-6)
        assert v == pytest.approx(float(expected_v[3, 0]), rel=1e-5, abs=1e-5)
        np.testing.assert_array_equal(p, brain.predict_p(s[3]))


def test_p_survives_logits_that_overflow_exp(brain):
    brain.weights = [np.full_like(w, 100) for w in brain.weights]
    np.testing.assert_allclose(brain.predict_p(np.ones(4, np.float32)), 0.5)


def test_what_was_pulled_does_not_change_with_updates_until_the_next_pull(server, brain, rng):
    other = a3c.LocalBrain(server)
    before = [w.copy() for w in other.weights]
    fill_queue(brain, rng, 8)
    brain.update_parameter_server()
    assert difference(other.weights, before) == 0
    assert difference(server.weights, before) > 1e-6
    other.pull_parameter_server()
    assert difference(other.weights, server.weights) == 0


def test_eight_threads_lose_no_update(server):
    gradients = [np.full_like(w, 0.01) for w in server.weights]

    def work(server, updates):
        for _ in range(updates):
            server.apply_gradients(gradients)

    in_a_row = a3c.ParameterServer()
    in_a_row.weights = server.weights
    work(in_a_row, 8000)
    threads = [threading.Thread(target=work, args=(server, 1000)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert difference(server.weights, in_a_row.weights) == 0
    assert difference(server.mean_squares, in_a_row.mean_squares) == 0


def test_no_gradients_are_applied_once_learning_is_over(server, brain, rng):
    before, mean_squares = server.weights, server.mean_squares
    server.stop.set()
    fill_queue(brain, rng, 10)
    brain.update_parameter_server()
    assert server.weights is before and server.mean_squares is mean_squares
