"""What all programs in companions/ promise, with the programs as parameters, and common.py."""

import contextlib
import csv
import importlib
import io
import os
import re
import signal
import sys
import time
import types

import common

import keras
import matplotlib
import numpy as np
import pytest
from conftest import ROOT, frames_of, start_python

SUMMARY = re.compile(r"not learned in (\d+\.\d) s: (\d+) steps, (\d+) episodes, (\d+) workers,"
                     r" (\d+) steps/s")
# Of a3c_ray, whose start takes long, test_ray.py proves the same.
PROGRAMS = {"ppo_cartpole": [], "dqn_cartpole": [], "a3c_two_networks": [],
            "a3c_processes": ["--num-process", "2"]}
WORKERS = {"ppo_cartpole": 1, "dqn_cartpole": 1, "a3c_two_networks": 4, "a3c_processes": 2}


def run_main(name, out, *arguments):
    """Run a program in this process. Return its exit status, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = importlib.import_module(name).main(
            [*PROGRAMS.get(name, []), "--no-render", "--out", str(out), *map(str, arguments)])
    return status, printed.getvalue()


def summary_of(printed):
    """The numbers of the summary line: seconds, steps, episodes, workers, steps/s."""
    summary, = [line for line in printed.splitlines() if line.startswith("not learned in ")]
    return [float(number) for number in SUMMARY.fullmatch(summary).groups()]


def history_of(folder):
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights_file(folder):
    path, = folder.glob("*.weights.h5")
    return path


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A function that runs a program for two episodes, once for all tests.

    It returns the exit status, what was printed, the folder, and the models that play in NumPy.
    """
    runs = {}
    numpy_forward = common.numpy_forward

    def run(name):
        if name not in runs:
            models = []
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(common, "numpy_forward",
                              lambda model: models.append(model) or numpy_forward(model))
                status, printed = run_main(name, folder, "--seed", 5, "--max-episodes", 2,
                                           "--test-episodes", 0)
            runs[name] = status, printed, folder, models
        return runs[name]

    return run


# == The programs ==================================================================================

@pytest.mark.parametrize("name", PROGRAMS)
def test_run_that_does_not_learn_ends_with_1_and_leaves_weights_history_and_picture(
        short_run, name):
    status, printed, folder, _ = short_run(name)
    assert status == 1
    assert len(list(folder.glob("*.unfinished.weights.h5"))) == 1
    assert {path.name for path in folder.iterdir()} == {
        weights_file(folder).name, "history.csv", "learning_curve.png"}

    seconds, steps, episodes, workers, speed = summary_of(printed)
    rows = history_of(folder)
    assert list(rows[0]) == ["worker", "episode", "steps", "mean_of_last_10", "total_steps"]
    assert episodes == len(rows) == 2
    assert workers == WORKERS[name]
    assert sum(int(row["steps"]) for row in rows) <= steps
    assert all(int(row["total_steps"]) <= steps for row in rows)
    # Both the seconds and the steps/s are rounded.
    assert steps / (seconds + .05) - 1 < speed < steps / max(seconds - .05, 1e-9) + 1
    for row in rows:
        mean = float(row["mean_of_last_10"])
        assert (f"{row['worker']}  episode {row['episode']}  steps {row['steps']}"
                f"  mean of last 10 {mean:.1f}\n") in printed


@pytest.mark.parametrize("name", PROGRAMS)
def test_play_tests_and_films_what_a_run_has_left(short_run, tmp_path, name):
    weights = weights_file(short_run(name)[2])
    status, printed = run_main(name, tmp_path, "--play", weights, "--test-episodes", 2)
    steps = [int(n) for n in re.findall(r"^test  episode [12]  steps (\d+)$", printed, re.M)]
    assert status == 0 and len(steps) == 2
    assert printed.endswith(f"test: mean of 2 episodes {np.mean(steps):.1f} steps\n")
    films = sorted(tmp_path.iterdir())
    assert [film.name.split("-")[1:] for film in films] == [["episode", f"{i}.mp4"] for i in (0, 1)]
    assert len(frames_of(films[0])) in (steps[0], steps[0] + 1)     # moviepy rounds


def assert_refused(capsys, name, out, *arguments):
    """The program ends with status 2, one error, and makes no file. Return the error's line."""
    with pytest.raises(SystemExit) as end:
        run_main(name, out, *arguments)
    printed, error = capsys.readouterr()
    assert (end.value.code, printed) == (2, "")
    assert "Traceback" not in error and error.count("error: ") == 1
    assert not out.exists() or not list(out.iterdir())
    return error.splitlines()[-1]


@pytest.mark.parametrize("name", PROGRAMS)
def test_play_refuses_weights_of_another_program_in_one_line(short_run, tmp_path, capsys, name):
    other = "dqn_cartpole" if name == "ppo_cartpole" else "ppo_cartpole"
    weights = weights_file(short_run(other)[2])
    line = assert_refused(capsys, name, tmp_path, "--play", weights)
    assert line.startswith(f"error: {weights} does not hold the weights of this network: ")


@pytest.mark.parametrize("arguments", [
    ["--max-episodes", "0"], ["--seed", "x"], ["--no-such", "3"], ["--play", "nowhere.weights.h5"]])
@pytest.mark.parametrize("name", [*PROGRAMS, "a3c_ray"])
def test_bad_argument_is_refused_in_one_line_that_names_it_before_a_folder_is_made(
        tmp_path, capsys, name, arguments):
    assert arguments[0] in assert_refused(capsys, name, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ppo_cartpole", "dqn_cartpole"])
def test_a_seed_repeats_a_run_to_the_last_bit_and_another_seed_does_not(short_run, tmp_path, name):
    def weights_of(folder):
        model = short_run(name)[3][0]
        model.load_weights(weights_file(folder))
        return np.concatenate([w.ravel() for w in model.get_weights()])

    for seed in 5, 6:
        run_main(name, tmp_path / str(seed), "--seed", seed, "--max-episodes", 2,
                 "--test-episodes", 0)
    first = short_run(name)[2]
    assert history_of(first) == history_of(tmp_path / "5")
    assert weights_of(first).tobytes() == weights_of(tmp_path / "5").tobytes()
    assert (weights_of(first) != weights_of(tmp_path / "6")).any()


def session_of(pid):
    """The processes of a session, except those that have ended but were not waited for."""
    found = []
    for folder in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if folder.isdecimal() and os.getsid(int(folder)) == pid:
                found.append(folder)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_three_signals_in_a_row_end_a_program_and_its_children_with_130(tmp_path):
    # As from a terminal: the program is the first of a session, and all of it gets the signals.
    code = "import os, sys; os.setsid(); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    process = start_python("-c", code, "-u", ROOT / "companions" / "a3c_processes.py",
                           "--num-process", 2, "--out", "out", cwd=tmp_path)
    try:
        assert "  episode 1  steps " in process.stdout.readline()
        for _ in range(3):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(.02)
        printed, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (130, "")
        assert summary_of(printed)[2] == len(history_of(tmp_path / "out")) > 0
        assert weights_file(tmp_path / "out").name.endswith(".unfinished.weights.h5")
        deadline = time.monotonic() + 10
        while session_of(process.pid) and time.monotonic() < deadline:
            time.sleep(.1)
        assert session_of(process.pid) == []
    finally:
        process.kill()


def test_run_by_path_from_another_folder_into_head_completes_all_files(short_run, tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")     # matplotlib looks here, too
    process = start_python(ROOT / "companions" / "ppo_cartpole.py", "--max-episodes", 2,
                           "--test-episodes", 1, cwd=tmp_path)
    assert process.stdout.readline().startswith("agent  episode 1  steps ")
    process.stdout.close()
    error = process.stderr.read()
    assert (process.wait(timeout=60), error) == (1, "")
    out = tmp_path / "movie" / "ppo_cartpole"
    assert len(history_of(out)) == 2
    assert len(frames_of(out / "ppo_cartpole-episode-0.mp4")) > 5
    assert (out / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    short_run("ppo_cartpole")[3][0].load_weights(weights_file(out))


# == numpy_forward =================================================================================

def assert_equals_keras(model, rng):
    """Compare with random weights, of which none is 0, and of which the variances are positive."""
    for layer in model.layers:
        weights = [rng.normal(size=w.shape, scale=.5) for w in layer.get_weights()]
        if isinstance(layer, keras.layers.Normalization):
            weights[1:] = np.abs(weights[1]) + .1, np.array(1)
        layer.set_weights(weights)
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()              # or Keras goes on with the old mean and variance
    forward = common.numpy_forward(model)
    batch = rng.normal(size=(7, model.input_shape[1])).astype(np.float32)
    for ours, one, theirs in zip(*map(keras.tree.flatten, (
            forward(model.get_weights(), batch), forward(model.get_weights(), batch[3]),
            model(batch))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        np.testing.assert_allclose(one, theirs[3], atol=1e-5)


@pytest.mark.parametrize("name, n_models", [
    ("ppo_cartpole", 1), ("dqn_cartpole", 1), ("a3c_two_networks", 2), ("a3c_processes", 1)])
def test_each_program_plays_in_numpy_what_its_keras_model_computes(short_run, rng, name, n_models):
    models = {model.name: model for model in short_run(name)[3]}
    assert len(models) == n_models
    for model in models.values():
        assert_equals_keras(model, rng)


def test_normalization_of_a_number_that_never_changed_equals_keras():
    scaler = keras.layers.Normalization()
    scaler.adapt(np.array([[1, 5], [3, 5]], np.float32))        # the second has variance 0
    model = keras.Sequential([keras.Input((2,)), scaler])
    x = np.array([[2, 5], [4, 6]], np.float32)
    y = common.numpy_forward(model)(model.get_weights(), x)
    np.testing.assert_allclose(y, model(x), rtol=1e-6)
    np.testing.assert_allclose(y, [[0, 0], [2, 1e7]], rtol=1e-6)


def test_network_that_numpy_forward_cannot_compute_is_refused_by_name():
    x = keras.Input((4,))
    towers = [keras.layers.Dense(1)(keras.layers.Dense(4, "relu")(x)) for _ in range(2)]
    gelu = keras.layers.Dense(1, "gelu", name="hidden")(x)
    for outputs, name in (towers, "two"), (gelu, "hidden"):
        with pytest.raises(TypeError, match=name):
            common.numpy_forward(keras.Model(x, outputs, name="two"))


# == Run and draw_learning_curve ===================================================================

LIMIT = 200


@pytest.fixture
def make_run(tmp_path):
    """A function that makes a Run of a model with one weight, and an environment that falls."""
    class Env:
        spec = types.SimpleNamespace(max_episode_steps=LIMIT)

    def make(workers=("agent",), max_episodes=1000):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)],
                                 name="tiny")
        args = types.SimpleNamespace(out=tmp_path, max_episodes=max_episodes, test_episodes=0,
                                     seed=None, play=None, render=False)
        return common.Run(model, Env(), "tiny", args, workers)

    return make


def weights_of(number):
    return [np.full((1, 1), number, np.float32)]


def test_learning_ends_when_the_last_ten_of_one_worker_are_above_the_limit_minus_1(make_run):
    run = make_run(["a", "b"])
    assert not run.finish_episode("a", 190, weights_of(0))
    for _ in range(9):
        assert not run.finish_episode("a", 200, weights_of(0))      # at the end the mean is 199.0
        assert not run.finish_episode("b", 200, weights_of(0))      # nine in b's last ten
    assert not run.is_learned
    assert run.finish_episode("a", 200, weights_of(0)) and run.is_learned
    assert run.finish_episode("b", 1, weights_of(0)) and run.is_learned


def test_run_gives_up_after_max_episodes_of_all_workers(make_run):
    run = make_run(["a", "b"], max_episodes=3)
    assert [run.finish_episode(w, 200, weights_of(0)) for w in "aba"] == [False, False, True]
    assert not run.is_learned


def test_history_and_kept_weights_equal_those_computed_plainly(make_run, tmp_path, rng):
    run = make_run(["a", "b"])
    played = {"a": [], "b": []}         # steps and weight
    best = -1
    with run:
        for i in range(60):
            worker = "ab"[rng.integers(2)]
            steps = int(rng.integers(1, 150))
            run.steps += steps
            run.finish_episode(worker, steps, weights_of(i))
            played[worker].append((steps, i))
            mean = np.sum([s for s, _ in played[worker][-10:]]) / 10
            if mean >= best:
                best = mean
                kept = np.mean([weight for _, weight in played[worker][-10:]])
            assert run.history[-1] == (worker, len(played[worker]), steps, pytest.approx(mean),
                                       run.steps)
    run.model.set_weights(weights_of(-1))
    run.model.load_weights(tmp_path / "tiny.unfinished.weights.h5")
    assert run.model.get_weights()[0].item() == pytest.approx(kept)
    assert len(history_of(tmp_path)) == 60


def test_an_error_while_learning_costs_no_results_though_ctrl_c_follows_while_they_are_saved(
        make_run, tmp_path, monkeypatch, capsys):
    def press_and_save(*arguments):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            save(*arguments)

    save = common.Run.save
    monkeypatch.setattr(common.Run, "save", press_and_save)
    with pytest.raises(ZeroDivisionError), make_run() as run:
        run.finish_episode("agent", 20, weights_of(0))
        1 / 0
    assert summary_of(capsys.readouterr().out)[2] == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiny.unfinished.weights.h5", "history.csv", "learning_curve.png"}


def test_a_picture_that_fails_does_not_disturb(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "draw_learning_curve", lambda *_: 1 / 0)
    with make_run() as run:
        for _ in range(10):
            run.finish_episode("agent", 200, weights_of(0))
    printed = capsys.readouterr().out
    assert "\nlearned in " in printed and "division by zero" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.weights.h5", "history.csv"}


def test_pictures_do_not_depend_on_the_users_settings(tmp_path):
    history = [common.Episode(f"w{i % 2}", i // 2 + 1, i, i / 2, 10 * i) for i in range(60)]
    for length in 0, 3, 60:
        common.draw_learning_curve(history[:length], tmp_path / "plain.png", 200, "title")
        with matplotlib.rc_context({"text.usetex": True, "font.size": 40, "savefig.dpi": 10,
                                    "axes.facecolor": "black"}):
            common.draw_learning_curve(history[:length], tmp_path / "mine.png", 200, "title")
        assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "mine.png").read_bytes()
