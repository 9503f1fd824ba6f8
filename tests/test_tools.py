"""The tools for learners: pictures of a run, one episode in numbers, and experiments."""
import concurrent.futures
import math
from types import SimpleNamespace

import common  # noqa: F401

import a3c_cartpole as a3c
import experiments
import microscope
import pictures

import gymnasium as gym
import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageSequence


def forward(weights, s):
    """Compute p and V of one state, each sum by hand."""
    kernel, bias, p_kernel, p_bias, v_kernel, v_bias = [np.asarray(w, float) for w in weights]
    hidden = [max(0, sum(s * kernel[:, i]) + bias[i]) for i in range(16)]
    z = [sum(hidden * p_kernel[:, i]) + p_bias[i] for i in range(2)]
    return np.exp(z) / sum(np.exp(z)), sum(hidden * v_kernel[:, 0]) + v_bias[0]


# == pictures ======================================================================================

def test_notes_have_the_updates_by_others_and_the_change_of_p_between_copy_and_update(rng):
    server = pictures.NotingServer(learning_rate=.5)
    brains = {name: a3c.LocalBrain(server) for name in "ABC"}
    threads = {name: concurrent.futures.ThreadPoolExecutor(1, name) for name in "ABC"}
    changes = []

    # a small letter copies, a capital letter updates
    for letter in "a b c  B b  C c  A a  A  a B  C".replace(" ", ""):
        name = letter.upper()
        brain = brains[name]
        if letter != name:
            threads[name].submit(brain.pull_parameter_server).result(10)
            continue
        for _ in range(rng.integers(5, 9)):
            s, a = rng.normal(size=4), int(rng.integers(2))
            p_copy, _ = forward(brain.weights, s)
            p_present, _ = forward(server.weights, s)
            changes.append(abs(p_copy[a] - p_present[a]))
            brain.train_push(s, np.eye(2)[a], rng.normal(), rng.normal(size=4))
        threads[name].submit(brain.update_parameter_server).result(10)
    server.stop.set()       # an update after the end does not count
    threads["A"].submit(server.apply_gradients, server.mean_squares).result(10)

    noted = [(u.thread[0], u.copy.number, u.present.number, pictures.by_others(u))
             for u in server.updates]
    assert noted == [("B", 0, 0, 0), ("C", 0, 1, 1), ("A", 0, 2, 2), ("A", 3, 3, 0),
                     ("B", 1, 4, 3), ("C", 2, 5, 3)]
    assert max(changes) > .05
    np.testing.assert_allclose(pictures.changes_of_p(server.model, server.updates), changes,
                               atol=1e-5)
    assert all(u.copy.time < u.present.time for u in server.updates)


def test_learning_gif_has_four_episodes_and_pales_where_the_pole_has_fallen(tmp_path):
    def policy(position, velocity, angle, angular_velocity, bias=0):
        """Weights with log p(right) - log p(left) = bias + the sum of these times the state."""
        weights = [np.zeros_like(w) for w in model.get_weights()]
        weights[0][:, 0] = position, velocity, angle, angular_velocity
        weights[0][:, 1] = -weights[0][:, 0]
        weights[2][:2, 1] = 1, -1
        weights[3][1] = bias
        return weights

    def count_steps(weights):
        env = gym.make(a3c.ENV)
        s, _ = env.reset(seed=pictures.START)
        for step in range(1, 201):
            p, _ = forward(weights, s)
            s, _, terminated, _, _ = env.step(int(p.argmax()))
            if terminated:
                break
        return step

    model = a3c.ParameterServer().model
    policies = [policy(0, 0, 0, 0, -1), policy(0, 0, 1, 0), policy(0, 0, 1, .5, .05),
                policy(.1, .3, 3, 1)]
    lengths = [count_steps(weights) for weights in policies]
    assert len(set(lengths)) == 4 and max(lengths[:3]) < 200 == lengths[3]
    after_episode = {0: policies[0], 12: policies[1], 24: policies[2]}      # of 40
    server = SimpleNamespace(model=model, history=[None] * 40, after_episode=after_episode,
                             weights=policies[3])

    pictures.draw_learning(server, tmp_path / "learning.gif")

    frames = [np.array(frame.convert("RGB"))
              for frame in ImageSequence.Iterator(Image.open(tmp_path / "learning.gif"))]
    assert len(frames) == 101       # every second step
    for i, length in enumerate(lengths):
        left = i * (pictures.PANEL[0] + pictures.GAP)
        panel = [frame[pictures.HEAD:, left:left + pictures.PANEL[0]] for frame in frames]
        is_dark = [picture.max(axis=-1).min() < 50 for picture in panel]
        assert is_dark == [2 * k < length or length == 200 for k in range(101)]
        np.testing.assert_array_equal(panel[math.ceil(length / 2)], panel[-1])


@pytest.mark.parametrize("is_learned", [True, False])
def test_pictures_are_drawn_and_p_is_measured_if_it_has_learned(is_learned, tmp_path, monkeypatch,
                                                               capsys):
    learn = a3c.learn
    servers = []

    def learn_quickly(server, workers, out):
        learn(server, workers, out)
        assert len(server.after_episode) > len(server.history) == 40
        server.is_learned = is_learned
        servers.append(server)

    monkeypatch.setattr(pictures, "MAX_EPISODES", 40)
    monkeypatch.setattr(a3c, "learn", learn_quickly)
    monkeypatch.setattr(pictures, "draw_learning", lambda server, path: path.touch())
    with matplotlib.rc_context({"text.usetex": True}):      # the user's settings do no harm
        status = pictures.main([str(tmp_path)])
    printed = capsys.readouterr().out
    drawn = {path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".gif")}

    if not is_learned:
        assert status == 1 and not drawn and "It has not learned" in printed
        return
    assert status == 0 and drawn == {"learning.gif", "three_as.png", "learning_curve.png"}
    updates = servers[0].updates
    others = np.mean([u.present.number - u.copy.number for u in updates])
    change = np.mean([abs(forward(u.copy.weights, s)[0] - forward(u.present.weights, s)[0]) @ a
                      for u in updates for s, a in zip(u.s, u.a)])
    assert (f"between copy and update: {others:.1f} updates by others on average, p of the chosen"
            f" actions changed by {change:.3f}\n") in printed
    three_as = np.array(Image.open(tmp_path / "three_as.png").convert("RGB"), int)
    is_coloured = np.ptp(three_as, axis=-1) > 80
    middle = len(three_as) // 2
    assert is_coloured[:middle].sum() > 20_000 and is_coloured[middle:].sum() > 20_000


# == microscope ====================================================================================

def test_numbers_of_the_microscope_are_those_of_the_equations(server):
    server.seed = 1
    before = server.weights
    rows = microscope.look(server)

    # The same episode once more, by its actions
    environment = a3c.Environment("local_thread1", "learning", server)
    s, _ = environment.env.reset()
    states = [s]
    for _, a, *_ in rows:
        s, _, is_over, _, _ = environment.env.step(a)
        states.append(s)
    assert is_over and len(rows) > 5

    for t, (_, a, r, *numbers) in enumerate(rows):
        assert r == (-1 if t == len(rows) - 1 else 0)
        R_n = sum(.99 ** k * row[2] for k, row in enumerate(rows[t:t + 5]))
        mask = t < len(rows) - 5
        p, v = forward(before, states[t])
        _, v_ = forward(before, states[t + 5] if mask else np.zeros(4))
        R = R_n + .99 ** 5 * v_ if mask else R_n
        p_after, v_after = forward(server.weights, states[t])
        np.testing.assert_allclose(numbers, [R_n, mask, v, v_, R, R - v, p[a], p_after[a], v_after],
                                   atol=1e-5)
        assert abs(v_after - v) > 1e-4


def test_microscope_prints_an_episode_with_one_update(capsys):
    assert microscope.main([]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()
               if line[:4].strip().isdecimal()]
    rows = microscope.look(a3c.ParameterServer(microscope.SEED))
    assert len(rows) == a3c.T_MAX
    np.testing.assert_allclose(np.array(printed, float), np.array(rows, float), atol=.0051)


# == experiments ===================================================================================

@pytest.mark.parametrize("change", experiments.CHANGES, ids=lambda change: change.name)
def test_each_change_fits_the_main_file(change):
    source = experiments.PROGRAM.read_text(encoding="utf-8")
    changed = experiments.change_source(source, change)
    compile(changed, "changed", "exec")
    differences = [line for line in changed.splitlines() if line not in source.splitlines()]
    assert len(differences) == len(change.replacements)


def test_a_text_that_is_not_there_once_is_status_2_before_any_run(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "run", pytest.fail)
    for text, times in ("no such text", 0), ("import ", None):
        change = experiments.Change("mine", [], {text: ""})
        monkeypatch.setattr(experiments, "CHANGES", [experiments.CHANGES[0], change])
        with pytest.raises(SystemExit) as end:
            experiments.main([])
        assert end.value.code == 2
        assert f"mine: {text.strip()} stands in the main file" in capsys.readouterr().err


def test_table_counts_runs_and_takes_the_median_of_those_that_learned(monkeypatch, capsys):
    results = iter([("learned", 900), ("not learned", 3000), ("learned", 500),
                    ("not learned", 3000), ("failed", 0), ("not learned", 3000),
                    ("learned", 700)])
    given = []

    def run(source, options):
        given.append((source.count("\nLOSS_V = 0."), options))
        try:
            return next(results)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(experiments, "run", run)
    with pytest.raises(KeyboardInterrupt):      # Ctrl-C during the last row
        experiments.main(["--runs", "3", "--only", "nothing", "LOSS_V", "workers"])
    assert given == [(0, [])] * 3 + [(1, [])] * 3 + [(0, ["--workers", "1"])] * 2
    assert capsys.readouterr().out.splitlines() == [
        "| change | learned | episodes (median of these) |", "|---|---|---|",
        "| nothing | 2 of 3 | 700 |", "| `LOSS_V = 0.` | 0 of 3 (1 failed) | – |",
        "| `--workers 1` | 1 of 1 | 700 |"]


@pytest.mark.parametrize("outcome, episodes, result", [
    ("learned", 41, ("learned", 41)), ("not learned", 3000, ("not learned", 3000)),
    ("not learned", 17, ("failed", 0)), ("no such line", 5, ("failed", 0))])
def test_a_run_that_ends_early_has_failed_and_has_not_unlearned(outcome, episodes, result):
    program = f"print('a line\\n{outcome} in 1.0 s: 9 steps, {episodes} episodes, 8 workers, 9')"
    assert experiments.run(program, []) == result
