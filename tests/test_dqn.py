"""companions/dqn_cartpole.py: targets, updates, exploration, memory, and what is handed over."""

import contextlib
import csv
import io
import random

import numpy as np
import pytest

from companions import dqn_cartpole
from companions.dqn_cartpole import DQN, GAMMA, MB_SIZE, MEMORY_SIZE, keras

FILES = {
    "DQN-episode-0.mp4",
    "DQN.unfinished.weights.h5",
    "history.csv",
    "learning_curve.png",
    "training_scores.png",
}


@pytest.fixture(scope="module")
def learned():
    """An agent that has learned for three episodes.

    Tests may change its weights Q except those of the scaler, and nothing else.
    """
    agent = DQN(n_episodes=3, seed=11)
    agent.learn()
    return agent


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The program's run with the same seed and episodes: its folder, exit status and lines."""
    folder = tmp_path_factory.mktemp("short_run")
    keras.utils.set_random_seed(random.SystemRandom().randrange(999))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = dqn_cartpole.main(
            ["--episodes", "3", "--seed", "11", "--test-episodes", "1", "--no-render"]
            + ["--out", str(folder)]
        )
    return folder, status, printed.getvalue()


def random_network(agent, seed):
    """Random weights for the agent's network, no bias 0; the scaler stays as it is."""
    rng = np.random.default_rng(seed)
    scaler = agent.Q[:3]
    return scaler + [rng.normal(size=w.shape, scale=0.5).astype(np.float32) for w in agent.Q[3:]]


def keras_network(agent, network):
    """A Keras model of its own with these weights."""
    model = keras.models.clone_model(agent.model)
    model.set_weights(network)
    model.get_layer("scaler").finalize_state()
    return model


class FakeEnv:
    """An environment whose episodes last as given, and end by a fall or by the time limit."""

    def __init__(self, lengths, by_time_limit=False, at_step=lambda: None):
        self.lengths = iter(lengths)
        self.by_time_limit = by_time_limit
        self.at_step = at_step

    def reset(self):
        self.steps_left = next(self.lengths)
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.at_step()
        self.steps_left -= 1
        ends = self.steps_left == 0
        terminated = ends and not self.by_time_limit
        truncated = ends and self.by_time_limit
        return np.ones(4, np.float32), 1.0, terminated, truncated, {}


def test_prediction_in_numpy_is_that_of_the_keras_model(learned):
    network = random_network(learned, seed=1)
    agent_hists = np.random.default_rng(3).normal(size=(50, 16)).astype(np.float32)
    expected = keras_network(learned, network)(agent_hists).numpy()
    np.testing.assert_allclose(learned._predict(network, agent_hists), expected, atol=1e-5)
    for agent_hist, q in zip(agent_hists, expected):
        observations = agent_hist.reshape(4, 4)
        assert learned._get_optimal_action(network, observations) == q.argmax()


def test_scaler_has_mean_and_variance_of_the_first_32_histories_and_is_not_trained(learned):
    agent = DQN(seed=11)
    agent_hists = np.array([sample.agent_hist for sample in agent.memory])
    assert agent_hists.shape == (32, 16)
    for network in agent.Q, learned.Q:
        mean, variance, *_ = network
        np.testing.assert_allclose(mean, agent_hists.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(variance, agent_hists.var(axis=0), rtol=1e-4)


def test_target_is_the_reward_alone_at_an_end_and_else_adds_gamma_times_the_target_networks_max():
    agent = DQN(seed=1)
    agent.target_Q = random_network(agent, seed=2)
    agent.Q = None  # targets do not depend on it
    rng = np.random.default_rng(4)
    agent.memory.clear()
    for number in range(MB_SIZE):
        observations = rng.normal(size=(5, 4)).astype(np.float32)
        agent._remember(observations[:4], number % 2, number, observations[4], number % 3 == 0)
    agent_hists, Y = agent._get_samples()

    model = keras_network(agent, agent.target_Q)
    for agent_hist, y in zip(agent_hists, Y):
        [sample] = [s for s in agent.memory if (s.agent_hist == agent_hist).all()]
        next_hist = np.concatenate([agent_hist[4:], sample.new_state])
        target = sample.reward
        if not sample.done:
            target += GAMMA * model(next_hist[np.newaxis]).numpy().max()
        other = 1 - sample.action
        assert y[sample.action] == pytest.approx(target, abs=1e-4)
        assert y[other] == pytest.approx(model(agent_hist[np.newaxis]).numpy()[0, other], abs=1e-4)


def test_a_replay_equals_32_calls_of_train_on_batch_with_one_sample_each(learned):
    twin = keras_network(learned, learned.Q)
    twin.compile(optimizer="adam", loss="mse")
    twin.optimizer.build(twin.trainable_variables)
    assert learned.optimizer.learning_rate == twin.optimizer.learning_rate
    twin.optimizer.set_weights([v.numpy() for v in learned.optimizer.variables])
    before = learned.Q
    agent_hists, Y = learned._get_samples()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "_get_samples", lambda: (agent_hists, Y))
        learned._replay()
    for agent_hist, y in zip(agent_hists, Y):
        twin.train_on_batch(agent_hist[np.newaxis], y[np.newaxis])
    for new, expected in zip(learned.Q, twin.get_weights()):
        np.testing.assert_allclose(new, expected, atol=1e-5)
    assert learned.optimizer.iterations == twin.optimizer.iterations
    assert np.abs(learned.Q[-1] - before[-1]).max() > 1e-3


def test_target_network_is_renewed_after_the_replay_at_steps_0_100_200_of_each_episode():
    agent = DQN(n_episodes=2, seed=1)
    replays = []
    seen = []

    def replay():
        replays.append(agent.memory[-1])
        agent.Q = [*agent.Q[:-1], np.full(2, len(replays))]  # the last bias counts the replays

    agent.env = FakeEnv([250, 50], at_step=lambda: seen.append(agent.target_Q[-1][0]))
    agent._replay = replay
    agent.learn()
    # Three steps pass until there are four observations, so there are 98 replays by step 100.
    assert seen[1:250] == [0] * 100 + [98] * 100 + [198] * 49
    assert seen[251:] == [247] * 49
    assert len(replays) == 247 + 47


@pytest.mark.parametrize("by_time_limit", [False, True])
def test_a_fall_ends_the_return_and_the_time_limit_does_not(by_time_limit):
    agent = DQN(n_episodes=1, seed=1)
    agent._replay = lambda: None
    agent.env = FakeEnv([20], by_time_limit)
    agent.memory.clear()
    agent.learn()
    assert [sample.done for sample in agent.memory] == [False] * 16 + [not by_time_limit]


def test_epsilon_falls_from_1_to_1e_4_over_1000_choices_of_the_network_and_stays():
    agent = DQN(seed=1)
    agent_hist = [np.zeros(4)] * 4
    expected = {0: 1.0, 500: 0.50005, 1000: 1e-4, 1500: 1e-4}
    for step in range(1501):
        if step in expected:
            assert agent.eps == pytest.approx(expected[step], rel=1e-9)
        agent._get_action(agent_hist)
    agent.eps = 0.7
    assert agent._get_action() in (0, 1)  # without a history
    assert agent.eps == 0.7


def test_memory_holds_2000_steps_and_forgets_the_oldest():
    agent = DQN(seed=1)
    for number in range(MEMORY_SIZE + 10):
        agent._remember([np.full(4, number)] * 4, 0, 1.0, np.zeros(4), False)
    assert len(agent.memory) == MEMORY_SIZE
    assert agent.memory[0].agent_hist[0] == 10
    assert agent.memory[-1].agent_hist[0] == MEMORY_SIZE + 9


def test_a_run_that_did_not_learn_keeps_its_files_and_is_tested_and_says_so(short_run):
    folder, status, printed = short_run
    assert status == 1
    assert "\nnot learned in " in printed
    assert "test: mean of 1 episodes" in printed
    assert FILES <= {path.name for path in folder.iterdir()}
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["episode"] for row in rows] == ["1", "2", "3"]
    assert int(rows[2]["total_steps"]) == sum(int(row["steps"]) for row in rows)


def test_a_seed_repeats_a_run_to_the_last_bit_whatever_the_global_generators_do(short_run, learned):
    folder, _, _ = short_run
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [int(row["steps"]) for row in rows] == [e.steps for e in learned.progress.history]
    agent = DQN(seed=2)  # with a scaler of its own, which the file replaces
    network = dqn_cartpole.base.load_weights(agent.model, folder / "DQN.unfinished.weights.h5")
    for one, other in zip(network, learned.best):
        np.testing.assert_array_equal(one, other)


def test_weights_of_a_run_can_be_played_again(short_run, tmp_path, capsys):
    folder, _, _ = short_run
    weights = folder / "DQN.unfinished.weights.h5"
    status = dqn_cartpole.main(
        ["--play", str(weights), "--test-episodes", "1", "--no-render", "--out", str(tmp_path)]
    )
    assert status == 0
    assert "test: mean of 1 episodes" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_weights_that_are_not_finite_end_the_run_with_status_1_and_are_not_kept(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        DQN, "_train", lambda self, *_: [keras.ops.full(w.shape, np.nan) for w in self.Q]
    )
    status = dqn_cartpole.main(["--out", str(tmp_path), "--no-render", "--seed", "1"])
    assert status == 1
    printed = capsys.readouterr().out
    assert "not learned, DQN failed, in " in printed
    assert "test  episode" not in printed
    network = dqn_cartpole.base.load_weights(
        DQN(seed=1).model, tmp_path / "DQN.unfinished.weights.h5"
    )
    assert all(np.isfinite(weight).all() for weight in network)


@pytest.mark.parametrize("arguments", [["--episodes", "0"], ["--play", "none.h5"], ["--C", "9"]])
def test_a_bad_argument_is_named_and_ends_with_status_2(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        dqn_cartpole.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
