"""What a watcher gets: the live table, history.csv, the learning curve, the network's picture."""

import argparse
import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import PROGRAM, program_environment, run_program
from moviepy import VideoFileClip
from rich.console import Console

import a3c_cartpole as a3c

EPISODE = re.compile(r"(local_thread\d+)  episode (\d+)  steps (\d+)  mean of last 10 (\d+\.\d)")


def rows_of(folder):
    with open(folder / "movie" / "A3C" / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def given_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given_up")
    return run_program("--max-episodes", 120, "--workers", 3, "--log", cwd=folder), folder


def test_history_has_a_row_for_each_printed_episode_with_the_same_figures(given_up):
    run, folder = given_up
    printed = [EPISODE.fullmatch(line) for line in run.stdout.splitlines()]
    printed = [(m[1], int(m[2]), int(m[3]), float(m[4])) for m in printed if m]
    rows = rows_of(folder)
    assert list(rows[0]) == [
        "thread",
        "episode",
        "steps",
        "mean_of_last_10",
        "total_steps",
        "seconds",
    ]
    assert len(rows) == len(printed) == 120
    for row, (thread, episode, steps, mean) in zip(rows, printed):
        assert (row["thread"], int(row["episode"]), int(row["steps"])) == (thread, episode, steps)
        assert float(row["mean_of_last_10"]) == pytest.approx(mean, abs=0.051)
    for column in "total_steps", "seconds":
        values = [float(row[column]) for row in rows]
        assert values == sorted(values)
    total = int(re.search(r"(\d+) steps, 120 episodes", run.stdout)[1])
    assert int(rows[-1]["total_steps"]) <= total
    assert sum(int(row["steps"]) for row in rows) <= total


def test_history_counts_each_threads_episodes_from_1_without_a_gap(given_up):
    episodes = {}
    for row in rows_of(given_up[1]):
        episodes.setdefault(row["thread"], []).append(int(row["episode"]))
    assert set(episodes) == {"local_thread1", "local_thread2", "local_thread3"}
    assert all(counted == list(range(1, len(counted) + 1)) for counted in episodes.values())


def test_history_survives_a_full_disk_without_costing_the_run(tmp_path, capsys, monkeypatch):
    server = a3c.ParameterServer()
    lost = []
    args = argparse.Namespace(log=True, out=tmp_path)

    class Full:
        def writerows(self, _):
            raise OSError(28, "No space left on device")

    watch = a3c.Watch(
        server, args, lambda name, make, *a: a3c.attempt_product(lost, name, make, *a)
    )
    monkeypatch.setattr(a3c.csv, "writer", lambda *_, **__: Full())
    for i in range(3):
        server.finish_episode("local_thread1", i + 1, 20, 2.0)
        watch.look()
    printed = capsys.readouterr()
    assert (
        lost == ["history.csv"] and len(printed.err.splitlines()) == 1 and "No space" in printed.err
    )
    assert len(printed.out.splitlines()) == 3


def test_learning_curve_opens_has_its_size_and_is_not_blank(given_up):
    image = matplotlib.image.imread(given_up[1] / "movie" / "A3C" / "learning_curve.png")
    assert image.shape[:2] == (500, 800)
    inner = image[40:440, 80:780, :3].reshape(-1, 3)
    assert len(np.unique(inner.round(2), axis=0)) > 20
    gold = (inner[:, 0] > 0.95) & (inner[:, 2] < 0.8) & (inner[:, 1] > 0.85)
    assert gold.mean() > 0.05  # the fall of ε takes a good part of so short a run


def test_learning_curve_shows_the_winner_strong(tmp_path):
    server = a3c.ParameterServer()
    with open(tmp_path / "history.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(a3c.Episode._fields)
        for i in range(1, 50):
            writer.writerow(["local_thread1", i, 200, 4 * i, i * 200, i])
            writer.writerow(["local_thread2", i, 100, 2 * i, i * 200, i])
    sizes = []
    for winner in None, "local_thread1":
        server.winner = winner
        a3c.draw_learning_curve(server, tmp_path)
        image = matplotlib.image.imread(tmp_path / "learning_curve.png")[60:330, 80:780, :3]
        sizes.append((image[..., 2] - image[..., 0] > 0.3).sum())  # the first curve is blue
    assert sizes[1] > 1.5 * sizes[0] > 100


def test_network_is_drawn_or_its_absence_is_said_never_a_failure(given_up):
    run, folder = given_up
    if (folder / "movie" / "A3C" / "A3C.png").exists():
        image = matplotlib.image.imread(folder / "movie" / "A3C" / "A3C.png")
        assert min(image.shape[:2]) > 50 and image.std() > 0.01
    else:
        assert sum("pydot and Graphviz" in line for line in run.stdout.splitlines()) == 1
        assert "hidden (Dense)" in run.stdout
    assert run.stderr == ""


def test_film_goes_to_its_file_frame_by_frame_and_is_held_nowhere(tmp_path):
    env = a3c.gym.make("CartPole-v0", render_mode="rgb_array")
    env = a3c.Film(env, tmp_path, lambda name, make, *arguments: make(*arguments))
    for length in 30, 12:
        env.reset(seed=1)
        for i in range(length):
            env.unwrapped.state = np.zeros(4)
            env.step(i % 2)
            assert env.recorded_frames == [] and env.frames == i + 2
    env.close()
    films = sorted(tmp_path.iterdir())
    assert [film.name for film in films] == ["A3C-episode-0.mp4", "A3C-episode-1.mp4"]
    for film, length in zip(films, (30, 12)):
        with VideoFileClip(str(film)) as clip:
            assert sum(1 for _ in clip.iter_frames()) == length + 1


def table_lines(workers, width, winner=None):
    """The live table of this many workers as it stands in a console of this width."""
    server = a3c.ParameterServer(workers=workers, env="CartPole-v1")
    watch = a3c.Watch(server, argparse.Namespace(log=False, out=Path()), lambda *_: None)
    for i in range(workers):
        watch.last[f"local_thread{i + 1}"] = a3c.Episode(
            f"local_thread{i + 1}", 12345, 500, 499.0 - i, 10**7, 99.0
        )
    server.frames, server.episodes, server.winner = 12_345_678, 1_234_567, winner
    server.started -= 1234
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(watch.table())
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("workers", [1, 8, 16, 64])
def test_live_table_is_whole_at_80_columns_and_24_lines(workers):
    lines = table_lines(workers, 80, winner="local_thread1")
    assert max(map(len, lines)) <= 80 and len(lines) <= 23
    rows = [line for line in lines if "local_thread" in line]
    assert len(rows) == min(workers, 16)
    assert all(re.search(r"local_thread\d+ +12345 +500 +\d{3}\.\d +━", row) for row in rows)
    footer = " ".join(lines[-1].split())
    assert re.fullmatch(r"12345678 steps 1234567 episodes \d+ steps/s \d+\.\d s ε \d\.\d\d", footer)
    marked = [row for row in rows if "★" in row]
    assert len(marked) == 1 and "local_thread1 " in marked[0]


def in_a_terminal(*arguments, cwd):
    """What the program prints when its output is a terminal of 80 columns."""
    code = (
        "import os, pty, sys; os.environ.update(TERM='xterm', COLUMNS='80', LINES='24');"
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, str(PROGRAM), *arguments],
        cwd=cwd,
        capture_output=True,
        env=program_environment(),
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    return done.stdout.decode()


def test_terminal_gets_the_table_and_log_gets_the_lines(tmp_path):
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals")
    table = in_a_terminal("--max-episodes", "40", cwd=tmp_path)
    assert "mean of last 10" in table and "━" in table and not EPISODE.search(table)
    assert "not learned within 40 episodes" in table
    lines = in_a_terminal("--max-episodes", "40", "--log", cwd=tmp_path)
    assert len(EPISODE.findall(lines)) == 40 and "last steps" not in lines
