"""companions/ppo_cartpole.py: returns and advantages, the clipped loss, the update, learning."""

import types

import keras
import numpy as np
import ppo_cartpole as ppo
import pytest
from conftest import FakeEnv, finite_differences


def memory_of(rng, steps):
    """A Memory of random steps."""
    memory = ppo.Memory()
    for log_pi in np.log(rng.uniform(.3, .7, steps)):
        memory.add(rng.normal(size=4), int(rng.integers(2)), rng.normal(), rng.normal(), log_pi)
    memory.finish_path()
    return memory


def gradients_of(weights, *batch):
    """The gradients of the loss, which a step of SGD subtracts from the weights."""
    agent = ppo.Agent(ppo.PVNet())
    agent.model.set_weights(weights)
    agent.optimizer = keras.optimizers.SGD(1.)
    agent.optimizer.build(agent.model.trainable_variables)
    agent.train_step(*batch)
    return [before - after for before, after in zip(weights, agent.model.get_weights())]


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
    a = kept["advantage_lst"]
    kept["advantage_lst"] = (a - a.mean()) / (((a - a.mean()) ** 2).sum() / 29) ** .5
    names = ("state", "action", "log_pi", "return", "advantage")
    for column, name in zip(memory.get_batch(), names, strict=True):
        np.testing.assert_allclose(column, kept[f"{name}_lst"], rtol=1e-4, atol=1e-6)
    assert not any(len(entries) for entries in vars(memory).values())


def test_an_episode_of_one_step_teaches_the_value_and_makes_no_nan(rng):
    memory = memory_of(rng, 1)
    [state] = memory.state_lst
    [returns] = memory.return_lst
    agent = ppo.Agent(ppo.PVNet())

    def error():
        return abs(agent.forward(agent.model.get_weights(), state)[1][0] - returns)

    error_before = error()
    agent.update(*memory.get_batch())
    assert error() < error_before       # false if NaN


@pytest.mark.parametrize("ratio, advantage, slope", [
    (1.1, 2, 2), (1.5, 2, 0), (.5, 2, 2), (.9, -2, -2), (.5, -2, 0), (1.5, -2, -2)])
def test_clip_in_its_corners_by_hand(ratio, advantage, slope):
    # With weights of 0 both actions have π = .5 and V is 0. Then the slope of the ratio is
    # ratio·.5 at the chosen action's bias and minus this at the other's, that of the entropy is 0.
    weights = [np.zeros_like(w) for w in ppo.PVNet().get_weights()]
    columns = [np.array(x, np.float32) for x in (np.log([.5 / ratio]), [3], [advantage])]
    *_, pi_bias, _, v_bias = gradients_of(weights, np.zeros((1, 4)), np.array([1]), *columns)
    np.testing.assert_allclose(pi_bias, [slope * ratio / 2, -slope * ratio / 2], rtol=1e-5)
    np.testing.assert_allclose(v_bias, -.9 * 2 * 3, rtol=1e-5)


def test_gradients_equal_finite_differences_of_the_loss_in_numpy(rng, monkeypatch):
    monkeypatch.setattr(ppo, "DROPRATE", 0)
    monkeypatch.setattr(ppo, "HID_NUM", 5)
    model = ppo.PVNet()
    forward = ppo.Agent(model).forward
    weights = [rng.normal(size=w.shape).astype(np.float32) / 2 for w in model.get_weights()]
    batch = state, action, log_pi, returns, advantage = memory_of(rng, 12).get_batch()

    def loss(weights):
        pi, v = forward(weights, state.astype(float))
        ratio = pi[range(12), action] / np.exp(log_pi)
        gain = np.minimum(ratio * advantage, np.clip(ratio, .8, 1.2) * advantage)
        entropy = -(pi * np.log(pi)).sum(axis=1)
        return np.mean(-gain + .9 * (returns - v[:, 0]) ** 2 - 1e-3 * entropy)

    for gradient, expected in zip(gradients_of(weights, *batch), finite_differences(loss, weights)):
        np.testing.assert_allclose(gradient, expected, atol=1e-5)
        assert np.abs(expected).max() > 1e-3


def test_update_equals_a_loop_in_python_of_steps_of_adam_that_ends_by_the_posts_rule(
        rng, monkeypatch):
    monkeypatch.setattr(ppo, "DROPRATE", 0)
    keras.utils.set_random_seed(3)
    agent = ppo.Agent(ppo.PVNet())
    twin = ppo.Agent(ppo.PVNet())
    twin.model.set_weights(agent.model.get_weights())
    twin.optimizer = keras.optimizers.Adam(1e-4, epsilon=1e-8)
    twin.optimizer.build(twin.model.trainable_variables)

    def log_pi_of_action_0(state):
        return np.log(twin.forward(twin.model.get_weights(), state)[0][:, 0])

    steps = []
    for T, first_kl in (50, .0149), (9, -1), (20, .0151):
        state, _, _, returns, _ = memory_of(rng, T).get_batch()
        log_pi = log_pi_of_action_0(state) - np.float32(first_kl)
        batch = state, np.zeros(T, np.int32), log_pi, returns, np.ones(T, np.float32)
        for step in range(1, 81):
            kl = np.mean(log_pi_of_action_0(state) - log_pi)
            twin.train_step(*batch)
            if kl > .015:
                break
        steps.append(step)
        agent.update(*batch)
        for weight, expected in zip(agent.model.get_weights(), twin.model.get_weights()):
            np.testing.assert_allclose(weight, expected, atol=1e-5)
    assert steps == [2, 80, 1] and agent.optimizer.iterations == 83
    assert agent.update.experimental_get_tracing_count() == 2   # not compiled anew for each T


def test_dropout_is_on_while_learning(rng):
    agent = ppo.Agent(ppo.PVNet())
    batch = memory_of(rng, 20).get_batch()
    agent.optimizer.learning_rate = 0
    assert agent.train_step(*batch) != agent.train_step(*batch)     # other units were left out


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
    drawn = [agent.get_action([], np.zeros(4)) for _ in range(4000)]
    assert np.mean([action for action, _, _ in drawn]) == pytest.approx(.8, abs=.03)
    assert set(drawn) == {(0, .5, np.log(.2)), (1, .5, np.log(.8))}


@pytest.mark.parametrize("length, last", [(9, -1), (194, -1), (195, 1), (200, 1)])
def test_reward_is_1_at_the_end_of_195_steps_or_more_and_minus_1_at_a_fall(
        length, last, monkeypatch):
    run = types.SimpleNamespace(steps=0, finish_episode=lambda *_: run.steps > length)
    agent = ppo.Agent(ppo.PVNet())
    batches = []
    agent.update = lambda *batch: batches.append(batch)
    monkeypatch.setattr(ppo.gym, "make", lambda _: FakeEnv(length))
    ppo.learning_loop(agent, run, seed=1)       # it ends after the second episode
    [(state, _, _, returns, _)] = batches
    assert len(state) == length
    np.testing.assert_allclose(returns, last * .99 ** np.arange(length)[::-1], rtol=1e-5)


def test_ppo_learns_the_real_cartpole(tmp_path, capsys):
    assert ppo.main(["--seed", "42", "--no-render", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "\nlearned in " in printed
    assert float(printed.split("test: mean of 10 episodes ")[1].split()[0]) >= 195
