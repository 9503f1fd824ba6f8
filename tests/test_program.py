"""The program as its user runs it: a process, its lines, its exit status, its files."""

import csv
import re
import shutil

import numpy as np
import pytest
from conftest import MOVIE, ROOT, frames_of, patched, run_program, run_python

import a3c_cartpole as a3c

EPISODE = re.compile(r"local_thread(\d+)  episode (\d+)  steps (\d+)  mean of last 10 (\d+\.\d)")
FIGURES = r"(\d+) steps, (\d+) episodes, (\d+) workers, (\d+) steps/s"
LEARNED = re.compile(r"learned in (\d+\.\d) s: " + FIGURES)


def episodes_of(run):
    """Thread, its count, steps and mean of each episode that a run has printed."""
    found = [EPISODE.fullmatch(line) for line in run.stdout.splitlines()]
    return [(int(m[1]), int(m[2]), int(m[3]), float(m[4])) for m in found if m]


def played_steps(run):
    return [int(n) for n in re.findall(r"test_thread  episode \d+  steps (\d+)", run.stdout)]


def history_of(folder):
    """The rows of history.csv without the seconds."""
    with open(folder / "history.csv", newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def weights_of(path):
    """All weights of a file as one vector."""
    model = a3c.ParameterServer().model
    model.load_weights(path)
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


def test_importing_sets_no_flag_thread_or_signal_and_starts_and_prints_nothing():
    code = """
import gc, os, signal, sys, threading
import gymnasium as gym
sys.path.insert(0, sys.argv[1])
gym.make = lambda *a, **k: sys.exit("environment built")
before = {**os.environ}, gc.isenabled(), signal.getsignal(signal.SIGINT), gym.logger.min_level
import a3c_cartpole as a3c
after = {**os.environ}, gc.isenabled(), signal.getsignal(signal.SIGINT), gym.logger.min_level
assert before[1:] == after[1:] and threading.active_count() == 1
assert not [k for k, v in vars(a3c).items() if isinstance(v, (gym.Env, a3c.ParameterServer))]
changed = {k for k in after[0] if after[0][k] != before[0].get(k)}
assert not [k for k in changed if k.startswith(("XLA", "TF_NUM", "SDL", "OMP"))], changed
"""
    done = run_python("-c", code, ROOT, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_learns_and_says_so_in_the_one_line_that_tools_read(learned):
    run, _ = learned
    lines, episodes = run.stdout.splitlines(), episodes_of(run)
    summary = LEARNED.fullmatch(lines[len(episodes)])
    assert [line for line in lines if "learned" in line] == [summary[0]]
    seconds, steps, count, workers, speed = map(float, summary.groups())
    assert (count, workers) == (len(episodes), 8)
    # beside the finished episodes' steps there are only those that each thread had begun
    assert 0 <= steps - sum(steps for _, _, steps, _ in episodes) < 8 * 200
    assert speed == pytest.approx(steps / seconds, rel=0.1)
    assert run.stderr == ""


def test_each_line_has_the_mean_of_its_threads_last_10_and_the_last_meets_the_stop_rule(learned):
    episodes = episodes_of(learned[0])
    played = {thread: [0] * 10 for thread in range(1, 9)}
    for thread, count, steps, mean in episodes:
        played[thread].append(steps)
        assert count == len(played[thread]) - 10
        assert mean == pytest.approx(np.mean(played[thread][-10:]), abs=0.051)
    assert all(len(steps) > 10 for steps in played.values())  # all eight took part
    assert [mean > 199 for *_, mean in episodes] == [False] * (len(episodes) - 1) + [True]


def test_test_episodes_stand_and_are_printed_and_filmed_one_frame_a_step(learned):
    run, folder = learned
    steps = played_steps(run)
    assert len(steps) == 2 and min(steps) >= 195
    assert f"test: mean of 2 episodes {np.mean(steps):.1f} steps" in run.stdout
    for episode, count in enumerate(steps):
        frames = frames_of(folder / f"A3C-episode-{episode}.mp4")
        # moviepy rounds, and may leave the last one out
        assert len(frames) in (count, count + 1) and frames[0].shape == (400, 600, 3)
        for frame in frames[::10]:
            assert_shows_upright_pole(frame)


def assert_shows_upright_pole(frame):
    """The brown pole stands over the black cart, higher than wide."""
    r, g, b = (frame[..., i].astype(int) for i in range(3))
    ys, xs = np.nonzero((r > 150) & (r - b > 50) & (g > 100))
    assert len(ys) > 300 and np.ptp(ys) > 80 and np.ptp(ys) > np.ptp(xs)
    assert (frame[290:310].max(axis=2) < 80).sum() > 200


def test_run_leaves_its_products_and_no_more_and_says_where(learned):
    run, folder = learned
    products = {"A3C.weights.h5", "history.csv", "learning_curve.png"}
    films = {"A3C-episode-0.mp4", "A3C-episode-1.mp4"}
    written = {path.name for path in folder.iterdir()}
    assert products | films <= written <= products | films | {"A3C.png"}
    assert f"\nall files are in {MOVIE}\n" in run.stdout


def test_play_tests_the_weights_of_a_run_without_learning_and_replaces_its_films(learned, tmp_path):
    folder = tmp_path / MOVIE
    shutil.copytree(learned[1], folder)
    film, weights = folder / "A3C-episode-0.mp4", folder / "A3C.weights.h5"
    film.write_text("an earlier film")
    before = weights.read_bytes(), (folder / "history.csv").read_bytes()
    run = run_program("--play", MOVIE / weights.name, "--test-episodes", 1, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert "local_thread" not in run.stdout and "learned in" not in run.stdout
    (steps,) = played_steps(run)
    assert steps >= 195  # an untrained policy falls within 60
    assert len(frames_of(film)) in (steps, steps + 1)
    assert (weights.read_bytes(), (folder / "history.csv").read_bytes()) == before


def test_seeded_run_repeats_to_the_bit_whatever_an_earlier_run_left_there(learned, tmp_path):
    folder = tmp_path / MOVIE
    folder.mkdir(parents=True)
    earlier = [a3c.Episode("local_thread9", i, 150, 150.0, 150 * i, i) for i in range(1, 99)]
    lines = [",".join(map(str, row)) + "\n" for row in [a3c.Episode._fields, *earlier]]
    (folder / "history.csv").write_text("".join(lines))
    patch = """
push = a3c.LocalBrain.push_parameter_server
def keeping(self):
    push(self)
    self.theta.tofile("pushed")
a3c.LocalBrain.push_parameter_server = keeping"""
    run = run_python(*patched(patch), "--seed", 3, "--test-episodes", 0, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert episodes_of(run) == episodes_of(learned[0])
    assert history_of(folder) == history_of(learned[1])
    theta = weights_of(folder / "A3C.weights.h5")
    assert theta.tobytes() == weights_of(learned[1] / "A3C.weights.h5").tobytes()
    assert theta.tobytes() == (tmp_path / "pushed").read_bytes()  # once, by the winner
    for name in "A3C.weights.h5", "learning_curve.png":
        assert (folder / name).read_bytes() == (learned[1] / name).read_bytes()
    assert (tmp_path / "alive").read_text() == "MainThread"


def test_other_seed_gives_another_run(given_up, learned, tmp_path):
    run = run_python(*patched(""), "--seed", 4, "--max-episodes", 40, cwd=tmp_path)
    assert run.returncode == 1 and len(episodes_of(run)) == 40
    assert history_of(tmp_path / MOVIE) != history_of(given_up[1])
    name = "A3C.unfinished.weights.h5"
    assert (weights_of(tmp_path / MOVIE / name) != weights_of(given_up[1] / name)).any()
    assert history_of(given_up[1]) == history_of(learned[1])[:41]
    assert (tmp_path / "alive").read_text() == "MainThread"


def test_what_is_not_learned_within_max_episodes_is_said_and_kept_as_unfinished(given_up):
    run, folder = given_up
    assert (run.returncode, run.stderr) == (1, "")
    lines = run.stdout.splitlines()
    assert len(episodes_of(run)) == 40
    assert re.fullmatch(rf"not learned within 40 episodes: \d+\.\d s, {FIGURES}", lines[40])
    assert ", 40 episodes, 8 workers, " in lines[40]
    assert not [line for line in lines if line.startswith("test")]
    assert len(history_of(folder)) == 41
    assert [path.name for path in folder.glob("*.h5")] == ["A3C.unfinished.weights.h5"]
    reached = weights_of(folder / "A3C.unfinished.weights.h5")
    assert (reached != a3c.ParameterServer(seed=3).theta).any()


def test_64_workers_take_part_in_cartpole_v1_and_all_end(tmp_path):
    arguments = "--env", "CartPole-v1", "--workers", 64, "--max-episodes", 192, "--seed", 1
    (tmp_path / "pydot.py").write_text("raise ImportError('as where it is not installed')")
    run = run_python(*patched(""), *arguments, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (1, "")
    # in turns, no thread can be passed by
    assert {thread for thread, *_ in episodes_of(run)} == set(range(1, 65))
    assert ", 192 episodes, 64 workers, " in run.stdout
    assert (tmp_path / "alive").read_text() == "MainThread"
    assert re.search("^no A3C.png: .*pydot", run.stdout, re.M)
    assert not (tmp_path / MOVIE / "A3C.png").exists()


def test_help_gives_every_option_one_line_with_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    for screen in "DISPLAY", "WAYLAND_DISPLAY":
        monkeypatch.delenv(screen, raising=False)
    with pytest.raises(SystemExit) as end:
        a3c.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out.replace("\\", "/")
    defaults = {"env": "CartPole-v0", "workers": 8, "seed": None, "test-episodes": 10, "play": None}
    defaults |= {"max-episodes": 20000, "out": MOVIE, "render": "", "log": ""}
    for option, default in defaults.items():
        entry = text.split(f"\n  --{option}", 1)[1].split("\n  -")[0]
        assert f"(default: {default}" in entry and len(entry.splitlines()) <= 2
