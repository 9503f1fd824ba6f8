"""The mathematics of LocalBrain and ParameterServer: loss, gradients, RMSProp, the copies."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import fill_queue, forward, make_batch, random_weights

import a3c_cartpole as a3c


def mean_loss(weights, s, a, target, advantage):
    """The article's loss in float64; `advantage` is what weighs the policy term."""
    p, v = forward(weights, s)
    policy = -np.log((p * a).sum(axis=1) + 1e-10) * advantage
    value = 0.5 * (target - v) ** 2
    entropy = 0.01 * (p * np.log(p + 1e-10)).sum(axis=1)
    return (policy + value + entropy).mean()


def finite_differences(function, weights, step=1e-6):
    """Central differences of function(weights) on every single weight."""
    weights = [np.array(w, np.float64) for w in weights]
    gradients = [np.zeros_like(w) for w in weights]
    for w, g in zip(weights, gradients):
        for i in np.ndindex(w.shape):
            middle = w[i]
            w[i] = middle + step
            above = function(weights)
            w[i] = middle - step
            g[i] = (above - function(weights)) / (2 * step)
            w[i] = middle
    return gradients


def flat(arrays):
    return np.concatenate([np.ravel(x) for x in arrays])


@pytest.fixture
def case(brain, rng):
    """Random weights and 12 samples, with the gradients the brain computes for them."""
    weights = random_weights(rng, brain.model, scale=0.5)
    samples = fill_queue(brain, rng, 12)
    loss, gradients = brain.gradients(
        tf.constant(make_batch(*samples)), [tf.constant(w) for w in weights]
    )
    return weights, samples, float(loss), flat(g.numpy() for g in gradients)


def target_of(weights, r, s_, mask):
    return r + 0.99**5 * forward(weights, s_)[1] * mask


def test_loss_of_one_sample_computed_by_hand():
    p, v = tf.constant([[0.25, 0.75]]), tf.constant([[0.5]])
    loss = a3c.LocalBrain.loss_total(p, v, tf.constant([[0.0, 1.0]]), tf.constant([[2.0]]))
    # -log .75 · 1.5  +  .5 · 1.5²  +  .01 · (.25 log .25 + .75 log .75)
    assert loss.shape == (1, 1)
    assert float(loss[0, 0]) == pytest.approx(0.4315231087 + 1.125 - 0.0056233514, abs=1e-6)


def test_loss_of_a_batch_equals_numpy(case):
    weights, (s, a, r, s_, mask), loss, _ = case
    target = target_of(weights, r, s_, mask)
    assert loss == pytest.approx(
        mean_loss(weights, s, a, target, target - forward(weights, s)[1]), rel=1e-5
    )


def test_target_bootstraps_from_v_only_where_the_episode_went_on(brain, rng):
    weights = [tf.constant(w) for w in random_weights(rng, brain.model)]
    s, a, r, s_, _ = fill_queue(brain, rng, 6, terminal_share=0)
    for mask in np.eye(6)[2], np.zeros(6), np.ones(6):
        loss, _ = brain.gradients(tf.constant(make_batch(s, a, r, s_, mask)), weights)
        v_next = forward(weights, s_)[1]
        target = np.array([r[i] + (0.99**5 * v_next[i] if mask[i] else 0) for i in range(6)])
        expected = mean_loss(weights, s, a, target, target - forward(weights, s)[1])
        assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_gradients_equal_finite_differences_with_advantage_and_next_value_held(case):
    weights, (s, a, r, s_, mask), _, gradients = case
    target = target_of(weights, r, s_, mask)
    advantage = target - forward(weights, s)[1]
    expected = flat(finite_differences(lambda w: mean_loss(w, s, a, target, advantage), weights))
    np.testing.assert_allclose(gradients, expected, rtol=1e-3, atol=2e-5)


def test_gradients_are_not_those_of_an_advantage_that_moves(case):
    weights, (s, a, r, s_, mask), _, gradients = case
    target = target_of(weights, r, s_, mask)
    moving = flat(
        finite_differences(lambda w: mean_loss(w, s, a, target, target - forward(w, s)[1]), weights)
    )
    assert np.abs(gradients - moving).max() > 0.01


def test_gradients_are_not_those_of_a_next_value_that_moves(case):
    weights, (s, a, r, s_, mask), _, gradients = case
    advantage = target_of(weights, r, s_, mask) - forward(weights, s)[1]
    moving = flat(
        finite_differences(
            lambda w: mean_loss(w, s, a, target_of(w, r, s_, mask), advantage), weights
        )
    )
    assert np.abs(gradients - moving).max() > 0.01


def test_rows_that_fill_a_batch_up_change_nothing(brain, rng):
    weights = [tf.constant(w) for w in random_weights(rng, brain.model)]
    batch = make_batch(*fill_queue(brain, rng, 7))
    filled = np.vstack([batch, np.zeros((11, 13), np.float32)])
    loss, gradients = brain.gradients(tf.constant(batch), weights)
    loss_filled, gradients_filled = brain.gradients(tf.constant(filled), weights)
    assert float(loss) == pytest.approx(float(loss_filled), rel=1e-6)
    np.testing.assert_allclose(flat(gradients), flat(gradients_filled), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", [5, 11, 18, 40])
def test_one_hundred_updates_equal_tensorflow_1s_rmsprop(server, brain, rng, samples):
    twin = [tf.Variable(w) for w in server.model.get_weights()]
    optimizer = tf.compat.v1.train.RMSPropOptimizer(5e-3, 0.99)
    for _ in range(100):
        batch = make_batch(*fill_queue(brain, rng, samples))
        weights = [tf.constant(w) for w in brain.model.get_weights()]
        _, gradients = brain.gradients(tf.constant(batch), weights)
        optimizer.apply_gradients(zip(gradients, twin))
        brain.update_parameter_server()
        brain.pull_parameter_server()
    start, end = (
        flat(a3c.ParameterServer(seed=7).model.get_weights()),
        flat(server.model.get_weights()),
    )
    assert np.abs(end - start).max() > 0.02
    np.testing.assert_allclose(end, flat(w.numpy() for w in twin), rtol=0, atol=1e-6)
    assert int(server.optimizer.iterations) == 100


def test_rmsprop_starts_as_tensorflow_1_did(server, brain):
    step, rate, *mean_squares = [variable.numpy() for variable in server.optimizer.variables]
    assert (step, rate) == (0, pytest.approx(5e-3))
    assert len(mean_squares) == 6 and all((m == 1).all() for m in mean_squares)
    assert server.optimizer.epsilon == 1e-10 and server.optimizer.rho == 0.99


def test_building_the_graph_leaves_the_server_as_it_was():
    server = a3c.ParameterServer(seed=3)
    before = [w.copy() for w in server.model.get_weights()]
    brain = a3c.LocalBrain("brain", server)
    np.testing.assert_array_equal(flat(before), flat(server.model.get_weights()))
    np.testing.assert_array_equal(flat(before), flat(brain.model.get_weights()))


def test_pull_copies_every_weight(server, brain, rng):
    weights = random_weights(rng, server.model)
    server.model.set_weights(weights)
    assert np.abs(flat(brain.model.get_weights()) - flat(weights)).max() > 0.1
    brain.pull_parameter_server()
    for mine, theirs in zip(brain.model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_push_of_one_brain_is_seen_by_the_pull_of_another(server, brain, rng):
    other = a3c.LocalBrain("other", server)
    weights = random_weights(rng, server.model)
    brain.model.set_weights(weights)
    brain.push_parameter_server()
    other.pull_parameter_server()
    for copy in other.model.get_weights(), server.model.get_weights():
        np.testing.assert_array_equal(flat(copy), flat(weights))


def test_update_of_one_brain_is_seen_by_the_pull_of_another_with_no_model_asked_for(rng):
    server = a3c.ParameterServer(seed=7)
    brain, other = a3c.LocalBrain("brain", server), a3c.LocalBrain("other", server)
    s = rng.normal(size=(3, 4)).astype(np.float32)
    before = other.predict_p(s)
    fill_queue(brain, rng, 8)
    brain.update_parameter_server()
    np.testing.assert_array_equal(other.predict_p(s), before)
    other.pull_parameter_server()
    assert np.abs(other.predict_p(s) - before).max() > 1e-5
    np.testing.assert_allclose(other.predict_p(s), server.model(s)[0], atol=1e-6)


def test_local_weights_do_not_move_with_an_update_until_pulled(server, brain, rng):
    local = flat(brain.model.get_weights())
    fill_queue(brain, rng, 8)
    brain.update_parameter_server()
    np.testing.assert_array_equal(flat(brain.model.get_weights()), local)
    assert np.abs(flat(server.model.get_weights()) - local).max() > 1e-6
    brain.pull_parameter_server()
    np.testing.assert_array_equal(flat(brain.model.get_weights()), flat(server.model.get_weights()))


def test_gradient_is_taken_at_the_local_weights_and_applied_to_the_servers(server, brain, rng):
    local, shared = random_weights(rng, server.model), random_weights(rng, server.model)
    brain.model.set_weights(local)
    server.model.set_weights(shared)
    batch = make_batch(*fill_queue(brain, rng, 9))
    _, gradients = brain.gradients(tf.constant(batch), [tf.constant(w) for w in local])
    g = flat(gradients)
    brain.update_parameter_server()
    expected = flat(shared) - 5e-3 * g / np.sqrt(0.99 + 0.01 * g**2 + 1e-10)
    np.testing.assert_allclose(flat(server.model.get_weights()), expected, rtol=0, atol=1e-6)


def test_below_min_batch_nothing_changes_and_nothing_is_lost(server, brain, rng):
    before = flat(server.model.get_weights())
    fill_queue(brain, rng, a3c.MIN_BATCH - 1)
    queued = [list(column) for column in brain.train_queue]
    brain.update_parameter_server()
    np.testing.assert_array_equal(flat(server.model.get_weights()), before)
    assert int(server.optimizer.iterations) == 0
    assert [len(column) for column in brain.train_queue] == [a3c.MIN_BATCH - 1] * 5
    for column, kept in zip(brain.train_queue, queued):
        np.testing.assert_array_equal(column, kept)
    fill_queue(brain, rng, 1)
    brain.update_parameter_server()
    assert int(server.optimizer.iterations) == 1 and brain.train_queue == [[], [], [], [], []]


def test_predict_p_equals_keras_for_random_weights_and_its_rows_sum_to_1(server, brain, rng):
    for scale in 0.1, 1.0, 5.0:
        brain.model.set_weights(random_weights(rng, server.model, scale))
        s = rng.normal(size=(64, 4), scale=2).astype(np.float32)
        p = brain.predict_p(s)
        assert p.shape == (64, 2)
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(p, brain.model(s)[0], atol=1e-6)


def test_predict_p_survives_logits_that_overflow_exp(server, brain):
    brain.model.set_weights([np.full(w.shape, 100, np.float32) for w in server.model.get_weights()])
    np.testing.assert_allclose(brain.predict_p(np.ones((2, 4), np.float32)), 0.5)


def network(*hidden, heads=("softmax", "linear"), separate=False):
    """A class of server whose network has these hidden activations."""

    class Server(a3c.ParameterServer):
        def _build_model(self):
            state = last = keras.Input((4,))
            for i, activation in enumerate(hidden):
                last = keras.layers.Dense(8 + i, activation)(last)
            value_source = keras.layers.Dense(8, "relu")(state) if separate else last
            policy = keras.layers.Dense(2, heads[0])(last)
            return keras.Model(state, [policy, keras.layers.Dense(1, heads[1])(value_source)])

    return Server


@pytest.mark.parametrize("hidden", [(), ("relu", "relu"), ("relu", "relu", "relu")])
def test_predict_p_equals_keras_for_any_number_of_hidden_relu_layers(rng, hidden):
    server = network(*hidden)(seed=1)
    brain = a3c.LocalBrain("deep", server)
    fill_queue(brain, rng, 10)
    brain.update_parameter_server()
    brain.pull_parameter_server()
    s = rng.normal(size=(16, 4)).astype(np.float32)
    np.testing.assert_allclose(brain.predict_p(s), server.model(s)[0], atol=1e-6)


@pytest.mark.parametrize(
    "server_class",
    [
        network("tanh"),
        network("relu", "elu"),
        network("relu", heads=("sigmoid", "linear")),
        network("relu", separate=True),
    ],
)
def test_network_that_numpy_could_not_repeat_is_refused_before_any_update(server_class):
    with pytest.raises(ValueError, match="predict_p knows only a chain of Dense relu"):
        a3c.LocalBrain("brain", server_class())


def test_workers_share_one_compiled_update_and_own_their_weights(server):
    brains = [a3c.LocalBrain(f"brain{i}", server) for i in range(3)]
    graph = server.update_graph
    a3c.LocalBrain("one more", server)
    assert server.update_graph is graph
    assert len({id(brain.model) for brain in brains} | {id(server.model)}) == 4


def push_in_threads(server, threads, pushes, batch):
    def work(weights):
        for _ in range(pushes):
            server.apply_update(batch, weights)

    weights = server.newest[1]
    workers = [threading.Thread(target=work, args=(weights,)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def test_8_threads_of_1500_updates_lose_none(rng):
    results = []
    for threads, pushes in (8, 1500), (1, 12_000):
        server = a3c.ParameterServer(seed=5)
        brain = a3c.LocalBrain("brain", server)
        samples = fill_queue(brain, np.random.default_rng(1), a3c.BATCH_ROWS)
        push_in_threads(server, threads, pushes, make_batch(*samples))
        results.append(
            [variable.numpy() for variable in server.optimizer.variables]
            + server.model.get_weights()
        )
        np.testing.assert_array_equal(server.newest[1], flat(server.model.get_weights()))
        assert server.newest[0] == 12_000
    (together_steps, _, *together), (alone_steps, _, *alone) = results
    assert together_steps == alone_steps == 12_000
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_update_that_ends_in_nan_says_so_with_the_step(server, brain, rng):
    fill_queue(brain, rng, 6)
    brain.train_queue[2][0] = float("nan")
    server.frames = 4321
    with pytest.raises(FloatingPointError, match="not finite.*4321"):
        brain.update_parameter_server()


def test_only_the_cpu_is_visible():
    assert not tf.config.get_visible_devices("GPU")
