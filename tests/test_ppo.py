"""companions/ppo_cartpole.py: returns and advantages, the clipped loss, the update, whole runs."""

import a3c_cartpole as a3c
from companions import ppo_cartpole as ppo

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import FakeEnv, finite_differences, frames_of


def memory_of(rng, steps):
    """A Memory of random steps."""
    memory = ppo.Memory()
    for log_pi in np.log(rng.uniform(0.3, 0.7, steps)):
        memory.add(rng.normal(size=4), int(rng.integers(2)), rng.normal(), rng.normal(), log_pi)
    memory.finish_path()
    return memory


def test_return_and_advantage_of_three_steps_computed_by_hand(monkeypatch):
    monkeypatch.setattr(ppo, "GAMMA", 0.5)
    monkeypatch.setattr(ppo, "LAM", 0.5)
    memory = ppo.Memory()
    for reward, value in (0, 0.5), (0, 1), (1, 2):
        memory.add(np.zeros(4), 0, reward, value, 0)
    memory.finish_path()
    assert memory.return_lst.tolist() == [0.25, 0.5, 1]
    # δ = 0 + .5·1 - .5, 0 + .5·2 - 1, 1 + 0 - 2; A = δ + .25·A of the next step
    assert memory.advantage_lst.tolist() == [-0.0625, -0.25, -1]


def test_return_and_advantage_equal_the_sums_that_define_them(rng):
    memory = memory_of(rng, 200)
    r = np.array(memory.reward_lst)
    v = np.array(memory.value_lst)
    delta = r + 0.99 * np.append(v[1:], 0) - v
    for t in range(200):
        k = np.arange(200 - t)
        assert memory.return_lst[t] == pytest.approx((0.99**k * r[t:]).sum())
        assert memory.advantage_lst[t] == pytest.approx(((0.99 * 0.95) ** k * delta[t:]).sum())


def test_batch_holds_the_episode_with_standardized_advantages_and_empties_the_memory(rng):
    memory = memory_of(rng, 30)
    kept = {**vars(memory)}
    *columns, advantage = memory.get_batch()
    assert not any(len(entries) for entries in vars(memory).values())
    for column, name in zip(columns, ("state", "action", "log_pi", "return"), strict=True):
        np.testing.assert_allclose(column, kept[f"{name}_lst"], rtol=1e-6)
    a = kept["advantage_lst"]
    variance = ((a - a.mean()) ** 2).sum() / 29
    np.testing.assert_allclose(advantage, (a - a.mean()) / variance**0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio, advantage, minimum, slope", [
    (1.1, 2, 2.2, 2), (1.5, 2, 2.4, 0), (0.5, 2, 1.0, 2),
    (0.9, -2, -1.8, -2), (0.5, -2, -1.6, 0), (1.5, -2, -3.0, -2)])
def test_clip_in_its_corners_by_hand_value_and_gradient(ratio, advantage, minimum, slope):
    ratio = tf.constant([ratio])
    with tf.GradientTape() as tape:
        tape.watch(ratio)
        loss = ppo.Agent.loss_of(tf.constant([[0.5, 0.5]]), tf.constant([[3.0]]), ratio,
                                    tf.constant([3.0]), tf.constant([float(advantage)]))
    assert float(loss) == pytest.approx(-minimum - 1e-3 * np.log(2), rel=1e-5)
    assert tape.gradient(loss, ratio).numpy().tolist() == [-slope]


def test_total_loss_of_two_steps_by_hand_each_value_with_its_own_return():
    loss = ppo.Agent.loss_of(
        tf.constant([[0.5, 0.5], [1.0, 0.0]]), tf.constant([[1.0], [3.0]]),
        tf.constant([1.0, 1.0]), tf.constant([2.0, 3.0]), tf.constant([1.0, 3.0]))
    # policy -(1 + 3) / 2, value .9·(1² + 0²) / 2, entropy .001·(log 2 + 0) / 2
    assert float(loss) == pytest.approx(-2 + 0.45 - 0.001 * 0.346574, rel=1e-6)


def test_gradients_equal_finite_differences_of_the_loss_in_numpy(rng, monkeypatch):
    for name, value in ("DROPRATE", 0), ("HID_NUM", 5), ("TRAIN_ITERS", 1):
        monkeypatch.setattr(ppo, name, value)
    model = ppo.PVNet()
    before = [rng.normal(size=w.shape).astype(np.float32) / 2 for w in model.get_weights()]
    model.set_weights(before)
    batch = state, action, log_pi, returns, advantage = memory_of(rng, 12).get_batch()

    def loss(weights):
        terms = []
        for t in range(12):
            pi, v = ppo.Agent.predict(weights, state[t].astype(float))
            ratio = pi[action[t]] / np.exp(log_pi[t])
            clipped = np.clip(ratio, 0.8, 1.2)
            terms.append(-min(ratio * advantage[t], clipped * advantage[t])
                         + 0.9 * (returns[t] - v[0]) ** 2 + 1e-3 * (pi * np.log(pi)).sum())
        return np.mean(terms)

    agent = ppo.Agent(model)
    agent.optimizer = keras.optimizers.SGD(1.0)  # so that a step is minus the gradient
    agent.optimizer.build(model.trainable_variables)
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
                loss = ppo.Agent.loss_of(pi, value, tf.exp(log_ratio), returns, advantage)
            adam.apply(tape.gradient(loss, twin.trainable_variables), twin.trainable_variables)
            if np.mean(log_ratio) > 0.015:
                break
        return step

    steps = []
    for T, start in (50, 0.0149), (9, -1), (20, 0.0151):  # start: the mean at the first step
        state, _, _, returns, _ = memory_of(rng, T).get_batch()
        log_pi = np.log(twin(state)[0].numpy()[:, 0]) - np.float32(start)
        batch = state, np.zeros(T, np.int32), log_pi, returns, np.ones(T, np.float32)
        steps.append(twin_update(*batch))
        agent.update(batch)
        assert agent.optimizer.iterations == sum(steps)
        for weight, expected in zip(agent.weights, twin.get_weights()):
            np.testing.assert_allclose(weight, expected, atol=1e-5)
    assert steps == [2, 80, 1]
    assert agent.train.experimental_get_tracing_count() == 2  # not compiled anew for each T


def test_dropout_is_on_while_learning(rng, monkeypatch):
    monkeypatch.setattr(ppo, "TRAIN_ITERS", 1)
    model = ppo.PVNet()
    start = model.get_weights()
    agent = ppo.Agent(model)
    agent.optimizer = keras.optimizers.SGD(1.0)
    agent.optimizer.build(model.trainable_variables)
    batch = memory_of(rng, 20).get_batch()
    kernels = []
    for _ in range(2):
        model.set_weights(start)
        agent.update(batch)
        kernels.append(agent.weights[2])
    assert not np.array_equal(*kernels)  # other units were left out


def test_weights_start_as_pytorchs_xavier_normal():
    keras.utils.set_random_seed(3)
    weights = ppo.PVNet().get_weights()
    assert [w.shape for w in weights[::2]] == [(4, 64), (64, 64), (64, 2), (64, 1)]
    assert not any(bias.any() for bias in weights[1::2])
    for kernel in weights[:4:2]:
        sigma = np.sqrt(2 / sum(kernel.shape))
        assert kernel.std() == pytest.approx(sigma, rel=0.1)
        assert np.abs(kernel).max() > 2.5 * sigma  # a truncated normal ends at 2.3


def test_actions_are_drawn_by_their_probability_and_come_with_value_and_log_pi(monkeypatch):
    pi = np.array([0.2, 0.8])
    monkeypatch.setattr(ppo.Agent, "predict", lambda *_: (pi, np.array([0.5])))
    agent = ppo.Agent(ppo.PVNet())
    drawn = [agent.get_action(np.zeros(4)) for _ in range(4000)]
    assert np.mean([action for action, _, _ in drawn]) == pytest.approx(0.8, abs=0.03)
    assert set(drawn) == {(0, 0.5, np.log(0.2)), (1, 0.5, np.log(0.8))}


def test_reward_is_1_at_an_end_from_step_195_on_and_minus_1_at_a_fall():
    assert [ppo.reward_modify(step, True) for step in (9, 194, 195, 200)] == [-1, -1, 1, 1]
    assert ppo.reward_modify(195, False) == ppo.reward_modify(10, False) == 0


def run(folder, *arguments):
    """Run the program in this process, and return its exit status."""
    return ppo.main(["--no-render", "--seed", "4", "--out", str(folder), *map(str, arguments)])


def kept(path):
    model = ppo.PVNet()
    model.load_weights(path)
    return model.get_weights()


def test_run_that_does_not_learn_ends_with_1_and_repeats_with_its_seed(tmp_path, capsys):
    for folder in "a", "b":
        assert run(tmp_path / folder, "--max-episodes", 1) == 1
    assert "\nnot learned in " in capsys.readouterr().out
    one, other = [kept(tmp_path / folder / "PPO.unfinished.weights.h5") for folder in "ab"]
    assert all(np.array_equal(w, v) for w, v in zip(one, other))
    keras.utils.set_random_seed(4)
    assert not np.array_equal(one[0], ppo.PVNet().get_weights()[0])  # it was updated


@pytest.mark.parametrize("end, name, expected", [
    (None, "PPO", 4.5), (KeyboardInterrupt, "PPO.unfinished", 2)])
def test_run_keeps_the_mean_of_the_weights_of_ten_episodes_and_interrupted_the_last(
        tmp_path, monkeypatch, end, name, expected):
    def train(agent, *_):
        """Add 1 to all weights; perhaps be interrupted at the third time."""
        updates.append(agent)
        agent.model.set_weights([w + 1 for w in agent.weights])
        if end and len(updates) == 3:
            raise end

    updates = []
    monkeypatch.setattr(ppo.Agent, "train", train)
    monkeypatch.setattr(ppo.gym, "make", lambda *_, **__: FakeEnv(200))
    monkeypatch.setattr(ppo.common, "test", lambda *_: None)
    if end:
        with pytest.raises(end):
            run(tmp_path)
    else:
        assert run(tmp_path) == 0
    keras.utils.set_random_seed(4)
    start = ppo.PVNet().get_weights()
    for weight, w in zip(kept(tmp_path / f"{name}.weights.h5"), start):
        np.testing.assert_allclose(weight, w + expected, atol=1e-5)


def test_run_plays_and_films_its_own_weights_and_refuses_those_of_others(tmp_path, capsys):
    ppo.PVNet().save_weights(tmp_path / "PPO.weights.h5")
    assert run(tmp_path, "--play", tmp_path / "PPO.weights.h5", "--test-episodes", 1) == 0
    assert "test: mean of 1 episodes" in capsys.readouterr().out
    assert len(frames_of(tmp_path / "PPO-episode-0.mp4")) > 5
    a3c.ParameterServer().model.save_weights(tmp_path / "A3C.weights.h5")
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--play", tmp_path / "A3C.weights.h5")
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
