"""companions/dqn_cartpole.py: its aims, its updates and its clock, against twins and by hand."""

import csv
import random
import signal
import sys

import numpy as np
import pytest
from conftest import ROOT, run_python

sys.path.append(str(ROOT))
from companions import dqn_cartpole  # noqa: E402
from companions.dqn_cartpole import AGENT_HIST_LEN, DQN, MB_SIZE, MEMORY_SIZE, keras  # noqa: E402

FILES = {"DQN.unfinished.weights.h5", "history.csv", "learning_curve.png", "training_scores.png"}


@pytest.fixture(scope="module")
def compiled():
    """One agent that has compiled its update, for all tests that replay."""
    agent = DQN(seed=5, n_episodes=3)
    agent.learn()
    return agent


def test_target_is_reward_alone_at_the_end_and_else_reward_plus_gamma_times_best_q():
    agent = DQN(seed=1)
    hist, state = np.arange(16) / 10, np.array([9.0, 8, 7, 6])
    agent.target_Q = agent._clone_network(agent.Q)
    agent.unpack = lambda theta, names={id(agent.target_Q): "target"}: names[id(theta)]
    agent._predict = lambda weights, hists: np.stack([hists.sum(-1), -hists[..., 0]], axis=-1)
    agent.memory.clear()
    agent.memory.extend([(hist, 1, 1.0, state, True)] * (MB_SIZE // 2))
    agent.memory.extend([(hist, 0, 1.0, state, False)] * (MB_SIZE // 2))
    hists, Y = agent._get_samples()
    assert (hists == hist).all() and hists.shape == (MB_SIZE, 16)
    # the sum of 0, .1 … 1.5 is 12; of the next history 12 - (0 + .1 + .2 + .3) + 30 = 41.4
    ended = Y[:, 1] == 1.0
    assert ended.sum() == MB_SIZE // 2
    np.testing.assert_allclose(Y[ended], [[12, 1]] * 16)
    np.testing.assert_allclose(Y[~ended], [[1 + 0.99 * 41.4, 0]] * 16)


def test_next_history_is_the_history_one_state_further_on():
    agent, seen = DQN(seed=1), []
    agent._predict = lambda weights, hists: seen.extend(hists) or np.zeros((2, MB_SIZE, 2))
    agent.memory.clear()
    for i in range(MB_SIZE):
        states = i + np.arange(5)[:, None] * np.ones(4) / 10
        agent._remember(states[:4], 0, 1.0, states[4], done=False)
    agent._get_samples()
    now, following = seen
    np.testing.assert_array_equal(following[:, :12], now[:, 4:])
    np.testing.assert_allclose(following[:, 12:], now[:, 12:] + 0.1)


def test_replay_equals_32_calls_of_train_on_batch_one_sample_each(compiled):
    twin = keras.models.clone_model(compiled.model)
    twin.set_weights(compiled.model.get_weights())
    twin.get_layer("scaler").finalize_state()
    compiled.Q = compiled.pack(compiled.model.get_weights())
    compiled.adam = np.zeros_like(compiled.adam)
    twin.compile(optimizer="adam", loss="mse")
    hists, Y = compiled._get_samples()
    compiled._get_samples = lambda: (hists, Y)
    try:
        compiled._replay()
    finally:
        del compiled._get_samples
    for hist, y in zip(hists, Y):
        twin.train_on_batch(hist[None], y[None])
    expected = compiled.pack(twin.get_weights())
    np.testing.assert_allclose(compiled.Q, expected, atol=1e-5)
    assert compiled.adam[-1] == MB_SIZE
    assert np.abs(expected - compiled.pack(compiled.model.get_weights())).max() > 1e-3


def test_prediction_in_numpy_is_the_keras_models(compiled):
    hists = np.random.default_rng(3).normal(size=(50, 16)).astype(np.float32)
    compiled.model.set_weights(compiled.unpack(compiled.best))
    q = compiled._predict(compiled.unpack(compiled.best), hists)
    np.testing.assert_allclose(q, compiled.model(hists).numpy(), atol=1e-5)
    for hist, values in zip(hists, q):
        states = hist.reshape(AGENT_HIST_LEN, 4)
        assert compiled._get_optimal_action(compiled.best, states) == values.argmax()


def test_scale_is_mean_and_deviation_of_the_first_32_memories():
    agent = DQN(seed=2)
    hists = np.array([memory[0] for memory in agent.memory])
    assert hists.shape == (32, 16)
    np.testing.assert_allclose(agent.unpack(agent.Q)[0], hists.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(agent.unpack(agent.Q)[1], hists.var(axis=0), rtol=1e-4)


def test_target_follows_at_steps_0_100_200_of_each_episode_after_the_replay_and_only_then():
    class Line:
        """An environment of 250 steps, then of 50."""

        lengths = iter([250, 50, 50])

        def reset(self, **_):
            self.left = next(self.lengths)
            return np.zeros(4), {}

        def step(self, _):
            self.left -= 1
            return np.zeros(4), 1.0, self.left == 0, False, {}

    agent, clones, replays = DQN(seed=1, n_episodes=2), [], []
    agent.env = Line()
    agent._build_graph = lambda: None
    agent._replay = lambda: replays.append(agent.memory[-1])
    agent._clone_network = lambda nn: clones.append(len(replays)) or nn
    agent.learn()
    # no replay at steps 0, 1, 2, for four states are not stacked yet: 98 by step 100, 198 by 200
    assert clones == [0, 98, 198, 247]
    assert len(replays) == 247 + 47 and replays[246][4] and not replays[245][4]


def test_epsilon_falls_from_1_to_1e_4_over_1000_choices_of_the_network_and_stays():
    agent, hist = DQN(seed=1), [np.zeros(4)] * 4
    expected = {0: 1.0, 500: 0.50005, 1000: 1e-4, 1500: 1e-4}
    for step in range(1501):
        if step in expected:
            assert agent.eps == pytest.approx(expected[step], rel=1e-9)
        agent._get_action(hist)
    agent.eps = 0.7
    assert agent._get_action() in (0, 1) and agent.eps == 0.7


def test_memory_never_exceeds_2000_and_drops_its_oldest():
    agent = DQN(seed=1)
    for i in range(MEMORY_SIZE + 10):
        agent._remember([np.full(4, i)] * 4, 0, 1.0, np.zeros(4), False)
        assert len(agent.memory) <= MEMORY_SIZE
    assert agent.memory[0][0][0] == 10 and agent.memory[-1][0][0] == MEMORY_SIZE + 9


def test_a_seed_repeats_a_run_to_the_last_bit_whatever_the_global_generators_do():
    def learned():
        random.seed(), np.random.seed(), keras.utils.set_random_seed(random.randrange(999))
        agent = DQN(seed=11, n_episodes=3)
        agent.learn()
        return agent

    one, two = learned(), learned()
    assert [e.steps for e in one.history] == [e.steps for e in two.history]
    assert (one.Q == two.Q).all() and (one.best == two.best).all()


def test_a_run_too_short_to_learn_writes_its_files_says_so_and_its_weights_can_be_played(tmp_path):
    out = tmp_path / "movie" / "dqn_cartpole"
    done = run_python(
        "-m", "companions.dqn_cartpole", "--episodes", 3, "--seed", 1, "--test-episodes", 1,
        "--no-render", "--out", out, cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "\nnot learned within 3 episodes: " in done.stdout
    assert FILES | {"DQN-episode-0.mp4"} <= {path.name for path in out.iterdir()}
    rows = list(csv.DictReader((out / "history.csv").open()))
    assert [row["episode"] for row in rows] == ["1", "2", "3"]
    assert int(rows[2]["total_steps"]) == sum(int(row["steps"]) for row in rows)
    played = run_python(
        ROOT / "companions" / "dqn_cartpole.py", "--play", out / "DQN.unfinished.weights.h5",
        "--test-episodes", 2, "--no-render", "--out", tmp_path / "again", cwd=tmp_path,
    )
    assert (played.returncode, played.stderr) == (0, "")
    assert "test: mean of 2 episodes" in played.stdout


def test_learning_that_diverges_costs_a_line_and_status_1_but_no_weights(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay as they are
    monkeypatch.setattr(DQN, "_build_graph", lambda self: lambda packed: packed * np.nan)
    status = dqn_cartpole.main(["--out", str(tmp_path), "--no-render", "--test-episodes", "0"])
    out, err = capsys.readouterr()
    assert status == 1
    assert err == "learning lost: FloatingPointError: a weight is not finite in episode 1\n"
    assert "not learned, learning failed after" in out
    model = dqn_cartpole.a3c.load_weights(
        DQN(seed=1).model, tmp_path / "DQN.unfinished.weights.h5"
    )
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@pytest.mark.parametrize(
    "arguments", [["--episodes", "0"], ["--seed", "-1"], ["--play", "none.h5"], ["--C", "9"]]
)
def test_a_bad_argument_costs_one_line_and_status_2(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        dqn_cartpole.main([*arguments, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and arguments[0] in error
