"""The program as its user runs it: options, printed lines, exit status, files, films, faults."""

import csv
import re
import shutil
import signal
import threading
import time

import a3c_cartpole as a3c

import conftest
import keras
import numpy as np
import pytest
from conftest import PROGRAM, ROOT, frames_of, run_python, start_python

EPISODE = re.compile(r"local_thread(\d+)  episode (\d+)  steps (\d+)  mean of last 10 (\d+\.\d)")
SUMMARY = re.compile(r"learned in (\d+\.\d) s: (\d+) steps, (\d+) episodes, (\d+) workers,"
                     r" (\d+) steps/s")
UNFINISHED = "A3C.unfinished.weights.h5"


def history_of(folder):
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights_of(path):
    """All weights of a file as one vector."""
    model = a3c.ParameterServer().model
    model.load_weights(path)
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


def run_main(out, *arguments):
    """Run the program in this process; return its exit status."""
    return a3c.main([*map(str, arguments), "--out", str(out), "--no-render"])


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run with all defaults, in a process of its own, in a folder of its own."""
    folder = tmp_path_factory.mktemp("learned")
    run = run_python(PROGRAM, cwd=folder)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout, folder / "movie" / "A3C"


def test_default_run_prints_an_episode_a_line_and_the_summary_and_the_test(learned):
    printed, folder = learned
    episodes = [EPISODE.fullmatch(line) for line in printed.splitlines()]
    episodes = [(int(m[1]), int(m[2]), int(m[3]), float(m[4])) for m in episodes if m]
    played = {thread: [0] * 10 for thread in range(1, 9)}
    for thread, count, steps, mean in episodes:
        played[thread].append(steps)
        assert count == len(played[thread]) - 10
        assert mean == pytest.approx(np.mean(played[thread][-10:]), abs=0.051)
    assert all(len(steps) > 10 for steps in played.values())  # all eight took part
    assert [mean > 199 for *_, mean in episodes] == [False] * (len(episodes) - 1) + [True]

    (line,) = [line for line in printed.splitlines() if "learned" in line]
    seconds, steps, count, workers, speed = map(float, SUMMARY.fullmatch(line).groups())
    assert (count, workers) == (len(episodes), 8)
    assert 0 <= steps - sum(steps for _, _, steps, _ in episodes) < 8 * 200
    assert speed == pytest.approx(steps / seconds, rel=0.1)

    rows = [(int(row["worker"].removeprefix("local_thread")), int(row["episode"]),
             int(row["steps"])) for row in history_of(folder)]
    assert rows == [episode[:3] for episode in episodes]


def test_films_show_the_pole_upright_a_frame_for_each_step(learned):
    printed, folder = learned
    steps = [int(n) for n in re.findall(r"test  episode \d+  steps (\d+)", printed)]
    assert len(steps) == 10 and np.mean(steps) >= 195
    assert f"test: mean of 10 episodes {np.mean(steps):.1f} steps" in printed
    films = {f"A3C-episode-{number}.mp4" for number in (0, 1, 8)}
    assert {path.name for path in folder.iterdir()} == films | {"A3C.weights.h5", "history.csv"}
    for episode in 0, 1, 8:
        frames = frames_of(folder / f"A3C-episode-{episode}.mp4")
        assert len(frames) in (steps[episode], steps[episode] + 1)  # moviepy rounds
        assert frames[0].shape == (400, 600, 3)
        for frame in frames[::20]:
            r, g, b = (frame[..., i].astype(int) for i in range(3))
            ys, xs = np.nonzero((r > 150) & (r - b > 50) & (g > 100))  # the brown pole
            assert len(ys) > 300 and np.ptp(ys) > 80 and np.ptp(ys) > np.ptp(xs)


def test_play_tests_the_weights_of_a_run_without_learning_in_any_thread(
        learned, tmp_path, capsys):
    weights = learned[1] / "A3C.weights.h5"
    status = []
    arguments = tmp_path, "--play", weights, "--test-episodes", 1
    thread = threading.Thread(target=lambda: status.append(run_main(*arguments)))
    thread.start()
    thread.join()
    printed = capsys.readouterr().out
    assert status == [0] and "learned" not in printed
    assert int(re.search(r"test  episode 1  steps (\d+)", printed)[1]) >= 195
    assert [path.name for path in tmp_path.iterdir()] == ["A3C-episode-0.mp4"]


def test_one_worker_with_a_seed_repeats_to_the_last_bit_and_another_seed_does_not(tmp_path):
    for folder, seed in ("one", 5), ("two", 5), ("other", 6):
        status = run_main(tmp_path / folder, "--seed", seed, "--workers", 1, "--max-episodes", 40)
        assert status == 1
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    assert history_of(one) == history_of(two) != history_of(other)
    assert weights_of(one / UNFINISHED).tobytes() == weights_of(two / UNFINISHED).tobytes()
    assert (weights_of(one / UNFINISHED) != weights_of(other / UNFINISHED)).any()


def test_sixty_four_workers_learn_together_and_all_end(tmp_path, capsys):
    assert run_main(tmp_path, "--workers", 64, "--max-episodes", 300) == 1
    assert "not learned in" in (printed := capsys.readouterr().out)
    assert ", 300 episodes, 64 workers, " in printed
    assert len({row["worker"] for row in history_of(tmp_path)}) > 32
    assert not [t for t in threading.enumerate() if t.name.startswith("local_thread")]


@pytest.mark.parametrize("env, rate", [("CartPole-v0", 5e-3), ("CartPole-v1", 2e-3)])
def test_each_environment_has_its_learning_rate(tmp_path, monkeypatch, env, rate):
    rates = []
    monkeypatch.setattr(a3c, "learn", lambda server, *_: rates.append(server.learning_rate))
    run_main(tmp_path, "--env", env, "--workers", 1)
    assert rates == [rate]


def network(activation="relu", bias=True, units=(16,)):
    """A function that builds a network, as ParameterServer._build_model does."""
    def build(_):
        hidden = s = keras.Input((4,))
        for n in units:
            hidden = keras.layers.Dense(n, activation, use_bias=bias)(hidden)
        return keras.Model(s, [keras.layers.Dense(2, "softmax")(hidden),
                               keras.layers.Dense(1)(hidden)])
    return build


@pytest.mark.parametrize("change", [
    {"activation": "tanh"}, {"bias": False}, {"units": (8, 16)}])
def test_network_that_was_changed_in_one_of_two_places_ends_the_program_before_learning(
        tmp_path, monkeypatch, change):
    monkeypatch.setattr(a3c.ParameterServer, "_build_model", network(**change))
    with pytest.raises(SystemExit, match="_build_model and LocalBrain.predict"):
        run_main(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_error_in_a_worker_is_shown_by_python_ends_all_and_keeps_what_was_learned(
        tmp_path, monkeypatch, capsys):
    def broken(self, s):
        if self.parameter_server.frames > 500:
            raise RuntimeError("the pole broke")
        return 0

    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    monkeypatch.setattr(a3c.Agent, "act", broken)
    assert run_main(tmp_path) == 1
    assert {str(error.exc_value) for error in shown} == {"the pole broke"}
    assert "not learned in " in capsys.readouterr().out
    assert not [t for t in threading.enumerate() if t.name.startswith("local_thread")]
    assert np.isfinite(weights_of(tmp_path / UNFINISHED)).all()


def test_three_signals_in_a_row_end_the_program_and_keep_what_was_reached(tmp_path):
    # The folder has a name that stdout cannot encode.
    process = start_python(PROGRAM, "--env", "CartPole-v1", "--out", "棒", cwd=tmp_path,
                           PYTHONIOENCODING="ascii")
    for line in process.stdout:
        if line.startswith("local_thread1  episode 3"):
            break
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGINT:
        process.send_signal(number)
        time.sleep(.005)  # all of them while threads end and results are saved
    out, err = process.communicate(timeout=60)
    assert err == "" and process.returncode in (130, -signal.SIGINT)  # a shell says 130 of both
    (line,) = [line for line in out.splitlines() if line.startswith("not learned in ")]
    assert f" {len(history_of(tmp_path / '棒'))} episodes, " in line
    assert np.isfinite(weights_of(tmp_path / "棒" / UNFINISHED)).all()


def assert_refused(capsys, *arguments):
    """The program ends with status 2 and one line of error; return this line."""
    with pytest.raises(SystemExit) as end:
        a3c.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert "Traceback" not in err and err.count("error: ") == 1
    return err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [
    "--env Acrobot-v1", "--workers 0", "--workers 2.5", "--seed -1", "--seed x",
    "--seed 4294967296", "--max-episodes 0", "--test-episodes -2", "--no-such 3",
    "--play nowhere.weights.h5", "--play .", "--play requirements.txt"])
def test_bad_argument_is_refused_in_one_line_that_names_it(monkeypatch, capsys, arguments):
    monkeypatch.chdir(ROOT)
    assert arguments.split()[0] in assert_refused(capsys, *arguments.split())


def test_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    for folder in tmp_path / "taken", tmp_path / "taken" / "below":
        assert str(folder) in assert_refused(capsys, "--out", folder)


@pytest.mark.parametrize("kind", ["truncated", "another network", "text", "another name"])
def test_play_refuses_a_file_that_does_not_hold_its_weights(tmp_path, learned, capsys, kind):
    path = tmp_path / "bad.weights.h5"
    shutil.copy(learned[1] / "A3C.weights.h5", path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "another network":
        keras.Sequential([keras.Input((7,)), keras.layers.Dense(3)]).save_weights(path)
    elif kind == "text":
        path.write_text("no weights at all")
    else:
        path = path.rename(tmp_path / "bad.weights (1).h5")
    assert str(path) in assert_refused(capsys, "--play", path, "--out", tmp_path / "out")


def test_importing_starts_and_prints_nothing_and_changes_no_signal():
    assert conftest.PRINTED_AT_IMPORT.getvalue() == ""
    assert conftest.HANDLERS_AFTER == conftest.HANDLERS
    assert conftest.THREADS_AFTER == ["MainThread"]
