"""The tools for learners: pictures of a run, one episode in numbers, and experiments."""
import concurrent.futures
import math

import common  # noqa: F401

import a3c_cartpole as a3c

import experiments
import gymnasium as gym
import matplotlib
import microscope
import numpy as np
import pictures
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


def policy(position, velocity, angle, angular_velocity, bias=0):
    """Weights with log p(right) - log p(left) = the sum of these times the state, + bias."""
    weights = [np.zeros_like(w) for w in a3c.ParameterServer().weights]
    weights[0][:, 0] = position, velocity, angle, angular_velocity
    weights[0][:, 1] = -weights[0][:, 0]
    weights[2][0, 1] = weights[2][1, 0] = 1
    weights[3][1] = bias
    return weights


def count_steps(weights):
    """Play the episode that learning.gif shows. Return its number of steps."""
    env = gym.make(a3c.ENV)
    s, _ = env.reset(seed=pictures.START)
    steps = 0
    done = False
    while not done:
        s, _, terminated, truncated, _ = env.step(int(np.argmax(forward(weights, s)[0])))
        done = terminated or truncated
        steps += 1
    return steps


def test_pictures_of_a_run(tmp_path, monkeypatch, capsys):
    policies = [policy(0, 0, 0, 0, -1), policy(0, 0, 1, 0), policy(0, 0, 1, .5, .05)]
    learned = policy(.1, .3, 3, 1)
    lengths = [count_steps(weights) for weights in [*policies, learned]]
    assert len(set(lengths)) == 4 and max(lengths[:3]) < 200 == lengths[3]
    learn = a3c.learn
    notes = []

    def learn_quickly(server, workers, out):
        learn(server, workers, out)
        assert len(server.after_episode) > len(server.history) == 40
        server.after_episode = {0: policies[0], 12: policies[1], 24: policies[2]}
        server.weights = learned
        server.is_learned = True
        notes.extend(server.updates)

    monkeypatch.setattr(pictures, "MAX_EPISODES", 40)
    assert pictures.main([str(tmp_path / "none")]) == 1
    assert "not learned" in capsys.readouterr().out
    assert not list(tmp_path.glob("none/*.png")) and not list(tmp_path.glob("none/*.gif"))

    monkeypatch.setattr(a3c, "learn", learn_quickly)
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "pink"}):
        assert pictures.main([str(tmp_path)]) == 0

    others = np.mean([u.present.number - u.copy.number for u in notes])
    change = np.mean([abs(forward(u.copy.weights, s)[0] - forward(u.present.weights, s)[0]) @ a
                      for u in notes for s, a in zip(u.s, u.a)])
    assert (f"between copy and update: {others:.1f} updates by others on average, p of the chosen"
            f" actions changed by {change:.3f}\n") in capsys.readouterr().out

    # Four panels in steps of two; a panel is dark until its pole has fallen, and then pale.
    frames = [np.array(frame.convert("RGB"))
              for frame in ImageSequence.Iterator(Image.open(tmp_path / "learning.gif"))]
    assert len(frames) == 101
    for i, length in enumerate(lengths):
        left = i * (pictures.PANEL[0] + pictures.GAP)
        panels = [frame[pictures.HEAD:, left:left + pictures.PANEL[0]] for frame in frames]
        dark = [panel.max(axis=-1).min() < 50 for panel in panels]
        assert dark == [2 * k < length or length == 200 for k in range(101)]
        np.testing.assert_array_equal(panels[math.ceil(length / 2)], panels[-1])

    assert (tmp_path / "learning_curve.png").is_file()
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
