"""The program as its user runs it: options, printed lines, exit status, files, pictures, films."""

import csv
import io
import re
import shutil
import threading

import keras
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, frames_of, run_python
from rich.console import Console

import a3c_cartpole as a3c

EPISODE = re.compile(r"local_thread(\d+)  episode (\d+)  steps (\d+)  mean of last 10 (\d+\.\d)")
FIGURES = r"(\d+) steps, (\d+) episodes, (\d+) workers, (\d+) steps/s"
UNFINISHED = "A3C.unfinished.weights.h5"


def episodes_of(printed):
    """Thread, its count, steps and mean of each episode that a run has printed."""
    found = [EPISODE.fullmatch(line) for line in printed.splitlines()]
    return [(int(m[1]), int(m[2]), int(m[3]), float(m[4])) for m in found if m]


def history_of(folder):
    """The rows of history.csv without the seconds."""
    with open(folder / "history.csv", newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def weights_of(path):
    """All weights of a file as one vector."""
    model = a3c.ParameterServer().model
    model.load_weights(path)
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


def run_main(out, *arguments):
    """Run the program in this process; return its exit status."""
    return a3c.main([*map(str, arguments), "--out", str(out), "--no-render"])


@pytest.fixture(scope="module")
def given_up(tmp_path_factory):
    """The folder of a run of eight workers that ended at its limit of three episodes."""
    folder = tmp_path_factory.mktemp("given_up")
    assert run_main(folder, "--seed", 3, "--max-episodes", 3) == 1
    return folder


def test_importing_starts_and_prints_nothing_and_changes_no_signal():
    code = """
import gc, signal, sys, threading
import gymnasium as gym
sys.path.insert(0, sys.argv[1])
gym.make = lambda *a, **k: sys.exit("environment built")
before = gc.isenabled(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
import a3c_cartpole as a3c
after = gc.isenabled(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
assert before == after and threading.active_count() == 1
import tensorflow as tf
assert not tf.config.get_visible_devices("GPU")
"""
    done = run_python("-c", code, ROOT, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_run_that_learned_says_so_in_the_one_line_that_tools_read(learned):
    run, _ = learned
    episodes = episodes_of(run.stdout)
    (line,) = [line for line in run.stdout.splitlines() if "learned" in line]
    seconds, steps, count, workers, speed = map(
        float, re.fullmatch(r"learned in (\d+\.\d) s: " + FIGURES, line).groups())
    assert (count, workers) == (len(episodes), 8)
    # beside the steps of finished episodes there are only those of the episodes cut short
    assert 0 <= steps - sum(steps for _, _, steps, _ in episodes) < 8 * 200
    assert speed == pytest.approx(steps / seconds, rel=0.1)
    assert (run.returncode, run.stderr) == (0, "")


def test_each_line_has_the_mean_of_its_threads_last_10_and_the_last_meets_the_rule(learned):
    episodes = episodes_of(learned[0].stdout)
    played = {thread: [0] * 10 for thread in range(1, 9)}
    for thread, count, steps, mean in episodes:
        played[thread].append(steps)
        assert count == len(played[thread]) - 10
        assert mean == pytest.approx(np.mean(played[thread][-10:]), abs=0.051)
    assert all(len(steps) > 10 for steps in played.values())  # all eight took part
    assert [mean > 199 for *_, mean in episodes] == [False] * (len(episodes) - 1) + [True]


def test_history_has_a_row_for_each_printed_episode(learned):
    run, folder = learned
    printed = episodes_of(run.stdout)
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "thread", "episode", "steps", "mean_of_last_10", "total_steps", "seconds"]
    assert [(row["thread"], int(row["episode"]), int(row["steps"])) for row in rows] == [
        (f"local_thread{thread}", episode, steps) for thread, episode, steps, _ in printed]
    for column in "total_steps", "seconds":
        values = [float(row[column]) for row in rows]
        assert values == sorted(values)


def test_run_leaves_its_products_and_no_more(learned):
    products = {"A3C.weights.h5", "history.csv", "learning_curve.png", "three_as.png"}
    films = {f"A3C-episode-{number}.mp4" for number in (0, 1, 8)}
    written = {path.name for path in learned[1].iterdir()}
    assert products | films <= written <= products | films | {"A3C.png"}


def test_films_show_the_pole_upright_a_frame_for_each_step(learned):
    run, folder = learned
    steps = [int(n) for n in re.findall(r"test  episode \d+  steps (\d+)", run.stdout)]
    assert len(steps) == 9 and np.mean(steps) >= 195
    assert f"test: mean of 9 episodes {np.mean(steps):.1f} steps" in run.stdout
    for episode in 0, 1, 8:
        frames = frames_of(folder / f"A3C-episode-{episode}.mp4")
        assert len(frames) in (steps[episode], steps[episode] + 1)  # moviepy rounds
        assert frames[0].shape == (400, 600, 3)
        for frame in frames[::20]:
            r, g, b = (frame[..., i].astype(int) for i in range(3))
            ys, xs = np.nonzero((r > 150) & (r - b > 50) & (g > 100))  # the brown pole
            assert len(ys) > 300 and np.ptp(ys) > 80 and np.ptp(ys) > np.ptp(xs)


def assert_panels_are_drawn(path):
    """three_as.png: two rows of two panels, each with something coloured in it."""
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape == (800, 1000, 3)
    for rows in image[:400], image[400:]:
        for panel in rows[:, :500], rows[:, 500:]:
            colour = panel.max(axis=2) - panel.min(axis=2)
            assert (colour > 0.2).sum() > 300


def assert_curve_is_drawn(path, coloured):
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape == (500, 800, 3)
    colour = image.max(axis=2) - image.min(axis=2)
    assert (image.max(axis=2) < 0.9).sum() > 2000  # axes, words, points
    assert ((colour > 0.2).sum() > 500) == coloured


def test_pictures_of_a_run_that_learned(learned):
    assert_panels_are_drawn(learned[1] / "three_as.png")
    assert_curve_is_drawn(learned[1] / "learning_curve.png", coloured=True)


def test_pictures_and_weights_of_a_run_of_three_episodes_that_did_not_learn(given_up):
    assert_panels_are_drawn(given_up / "three_as.png")
    # no thread has played its tenth episode, so there is no curve yet, only three points
    assert_curve_is_drawn(given_up / "learning_curve.png", coloured=False)
    assert [path.name for path in given_up.glob("*.h5")] == [UNFINISHED]
    assert (weights_of(given_up / UNFINISHED) != a3c.ParameterServer(seed=3).theta).any()


def test_pictures_and_summary_of_a_run_with_one_worker(tmp_path, capsys):
    assert run_main(tmp_path, "--workers", 1, "--max-episodes", 30) == 1
    assert_panels_are_drawn(tmp_path / "three_as.png")
    assert_curve_is_drawn(tmp_path / "learning_curve.png", coloured=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "learned" in line]
    figures = re.fullmatch(r"not learned in \d+\.\d s: " + FIGURES, line).groups()
    assert figures[1:3] == ("30", "1")


def test_sixty_four_workers_learn_together_and_all_end(tmp_path, capsys):
    assert run_main(tmp_path, "--seed", 1, "--workers", 64, "--max-episodes", 300) == 1
    printed = capsys.readouterr().out
    assert {thread for thread, *_ in episodes_of(printed)} == set(range(1, 65))
    assert ", 300 episodes, 64 workers, " in printed
    assert not [t for t in threading.enumerate() if t.name.startswith("local_thread")]


def test_seeded_runs_are_equal_to_the_last_bit_and_another_seed_gives_another_run(tmp_path):
    for folder, seed in ("one", 5), ("two", 5), ("other", 6):
        run_main(tmp_path / folder, "--seed", seed, "--workers", 3, "--max-episodes", 60)
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    assert history_of(one) == history_of(two) != history_of(other)
    assert weights_of(one / UNFINISHED).tobytes() == weights_of(two / UNFINISHED).tobytes()
    assert (weights_of(one / UNFINISHED) != weights_of(other / UNFINISHED)).any()


def test_play_tests_the_weights_of_a_run_without_learning(learned, tmp_path, capsys):
    weights = learned[1] / "A3C.weights.h5"
    assert run_main(tmp_path, "--play", weights, "--test-episodes", 1) == 0
    printed = capsys.readouterr().out
    assert "local_thread" not in printed and "learned in" not in printed
    assert int(re.search(r"test  episode 1  steps (\d+)", printed)[1]) >= 195
    assert [path.name for path in tmp_path.iterdir()] == ["A3C-episode-0.mp4"]


def test_network_that_was_changed_in_one_of_two_places_ends_the_program_before_learning(
        tmp_path, monkeypatch):
    def with_tanh(_seed):
        s = keras.Input((4,))
        hidden = keras.layers.Dense(16, "tanh")(s)
        outputs = keras.layers.Dense(2, "softmax")(hidden), keras.layers.Dense(1)(hidden)
        return keras.Model(s, outputs)

    def with_two_hidden_layers(_seed):
        s = keras.Input((4,))
        hidden = keras.layers.Dense(8, "relu")(keras.layers.Dense(16, "relu")(s))
        outputs = keras.layers.Dense(2, "softmax")(hidden), keras.layers.Dense(1)(hidden)
        return keras.Model(s, outputs)

    for build in with_tanh, with_two_hidden_layers:
        monkeypatch.setattr(a3c.ParameterServer, "_build_model", staticmethod(build))
        with pytest.raises(SystemExit, match="_build_model.*predict_p"):
            run_main(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_error_in_a_thread_is_shown_once_ends_all_and_keeps_what_was_learned(
        tmp_path, monkeypatch, capsys):
    def broken(self, s, greedy=False):
        if self.parameter_server.frames > 500 and not greedy:
            raise RuntimeError("the pole broke")
        return 0

    for arguments in [], ["--seed", 1]:
        shown = []
        monkeypatch.setattr(threading, "excepthook", shown.append)
        monkeypatch.setattr(a3c.Agent, "act", broken)
        assert run_main(tmp_path / f"out{len(arguments)}", *arguments) == 1
        (error,) = shown
        assert str(error.exc_value) == "the pole broke"
        assert f"not learned, {error.thread.name} failed, in " in capsys.readouterr().out
        assert not [t for t in threading.enumerate() if t.name.startswith("local_thread")]
        assert np.isfinite(weights_of(tmp_path / f"out{len(arguments)}" / UNFINISHED)).all()


def assert_refused(capsys, arguments, *parts):
    """The program ends with status 2 and one line of error, which has these parts."""
    with pytest.raises(SystemExit) as end:
        a3c.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    line = err.splitlines()[-1]
    assert "error: " in line and all(part in line for part in parts), line
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments, right", [
    ("--env Acrobot-v1", "CartPole-v1"), ("--workers 0", "whole number from 1"),
    ("--workers 2.5", "whole number from 1"), ("--workers", "expected one argument"),
    ("--seed -1", "whole number from 0"), ("--seed 4294967296", "whole number from 0"),
    ("--max-episodes 0", "whole number from 1"), ("--test-episodes many", "whole number from 0"),
    ("--no-such 3", "unrecognized"), ("--play nowhere.weights.h5", "no file"),
])
def test_bad_argument_is_refused_in_one_line_that_names_it(
        tmp_path, monkeypatch, capsys, arguments, right):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, arguments.split(), arguments.split()[0], right)


def test_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    for folder in "taken", "taken/below":
        assert_refused(capsys, ["--out", tmp_path / folder], "--out", str(tmp_path / "taken"))


@pytest.mark.filterwarnings("ignore:.*__array__")
@pytest.mark.parametrize("kind", ["truncated", "another network", "text"])
def test_play_refuses_a_file_that_does_not_hold_its_weights(tmp_path, learned, capsys, kind):
    path = tmp_path / "bad.weights.h5"
    shutil.copy(learned[1] / "A3C.weights.h5", path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "another network":
        keras.Sequential([keras.Input((7,)), keras.layers.Dense(3)]).save_weights(path)
    else:
        path.write_text("no weights at all")
    assert_refused(capsys, ["--play", path, "--out", tmp_path / "out"], "--play", str(path))


def test_help_gives_every_option_with_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as end:
        a3c.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out.replace("\\", "/")
    defaults = {"env": "CartPole-v0", "workers": 8, "seed": None, "test-episodes": 10,
                "max-episodes": 20000, "out": "movie/A3C", "play": None, "render": "", "log": ""}
    for option, default in defaults.items():
        entry = text.split(f"\n  --{option}", 1)[1].split("\n  -")[0]
        assert f"(default: {default}" in entry


@pytest.mark.parametrize("workers", [1, 8, 64])
def test_table_is_whole_in_a_terminal_of_80_by_24(workers):
    progress = a3c.Progress("CartPole-v1", 20_000)
    progress.history += [
        a3c.Episode(f"local_thread{i + 1}", 12345, 500, 499.0 - i, 12_345_678, 99.0)
        for i in range(workers)]
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    console.print(progress.table())
    lines = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 24
    rows = [re.match(r" *local_thread(\d+) +12345 +500 +\d{3}\.\d +━", line) for line in lines]
    assert [int(row[1]) for row in rows if row] == list(range(1, min(workers, 16) + 1))
    assert "12345678 steps" in " ".join(lines) and f"{workers} episodes" in " ".join(lines)
