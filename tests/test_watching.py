"""What a watcher gets: the live table, history.csv, the learning curve, the network's picture."""

import csv
import io
import re
import sys

import matplotlib.image
import pytest
from conftest import PROGRAM, run_python
from matplotlib.figure import Figure
from rich.console import Console

import a3c_cartpole as a3c

EPISODE = re.compile(r"(local_thread\d+)  episode (\d+)  steps (\d+)  mean of last 10 (\d+\.\d)")


def test_history_has_a_row_for_each_printed_episode_with_the_same_figures(learned):
    run, folder = learned
    printed = [match.groups() for match in EPISODE.finditer(run.stdout)]
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["thread", "episode", "steps", "mean_of_last_10", "total_steps", "seconds"]
    assert list(rows[0]) == columns and len(rows) == len(printed) > 10
    for row, (thread, episode, steps, mean) in zip(rows, printed):
        assert (row["thread"], row["episode"], row["steps"]) == (thread, episode, steps)
        assert float(row["mean_of_last_10"]) == pytest.approx(float(mean), abs=0.051)
    for column in "total_steps", "seconds":
        values = [float(row[column]) for row in rows]
        assert values == sorted(values)
    seconds, total = re.search(r"learned in (\S+) s: (\d+) steps", run.stdout).groups()
    assert sum(int(row["steps"]) for row in rows) <= int(rows[-1]["total_steps"]) <= int(total)
    assert float(rows[-1]["seconds"]) <= float(seconds) + 0.05


def coloured_points(path):
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (500, 800)
    return int((image[..., :3].max(axis=2) - image[..., :3].min(axis=2) > 0.2).sum())


def test_learning_curve_is_a_picture_of_800_by_500_with_curves_in_it(learned, tmp_path):
    a3c.draw_learning_curve([], tmp_path / "empty.png", 200, "nothing")
    assert coloured_points(tmp_path / "empty.png") < 100
    assert coloured_points(learned[1] / "learning_curve.png") > 1000


def test_learning_curve_has_one_curve_a_thread_and_the_winners_alone_is_strong(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    wanted = [(1, 50, 90), (2, 60, 199.5), (3, 120, 199)]
    history = [a3c.Episode(f"local_thread{thread}", i, 0, means[i], 100 * i + thread, 0.0)
               for i in range(3) for thread, means in enumerate(wanted)]
    for rows in history[:-3], history:
        a3c.draw_learning_curve(rows, "anywhere", 200, "a title")
    unfinished, finished = [figure.axes[0] for figure in figures]
    assert finished.get_title() == "a title"
    widths = []
    for axes, count in (unfinished, 2), (finished, 3):
        curves = {tuple(line.get_ydata()): line for line in axes.lines}
        drawn = [curves[means[:count]] for means in wanted]
        assert len(axes.lines) == 3 + 1  # and the rule
        for thread, line in enumerate(drawn):
            assert list(line.get_xdata()) == [100 * i + thread for i in range(count)]
        widths.append([line.get_linewidth() for line in drawn])
    assert len(set(widths[0])) == 1
    assert widths[1][1] > 2 * widths[1][0] == 2 * widths[1][2]
    (text,) = [t.get_text() for t in finished.get_legend().get_texts() if "thread" in t.get_text()]
    assert "local_thread1" in text


def test_network_is_drawn_or_its_absence_is_said(given_up):
    run, folder = given_up
    if (folder / "A3C.png").exists():
        image = matplotlib.image.imread(folder / "A3C.png")
        assert min(image.shape[:2]) > 50 and image.std() > 0.01
        assert "no A3C.png" not in run.stdout
    else:
        assert re.search("^no A3C.png: .*(pydot|graphviz)", run.stdout, re.M)


@pytest.mark.parametrize("won", [True, False])
@pytest.mark.parametrize("workers", [1, 8, 16, 64])
def test_live_table_is_whole_at_80_columns_and_24_lines_and_stars_the_winner(workers, won):
    mean = [499.5 if won and i == 0 else 499.0 - i for i in range(workers)]
    history = [a3c.Episode(f"local_thread{i + 1}", 12345, 500, mean[i], 12_345_678, 99.0)
               for i in reversed(range(workers))]
    live = a3c.live_table(history, 500, lambda: "ε 0.37")
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    console.print(live.get_renderable())
    lines = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 24
    rows = [line for line in lines if "local_thread" in line]
    threads = [int(re.search(r"local_thread(\d+) ", row)[1]) for row in rows]
    assert threads == list(range(1, min(workers, 16) + 1))  # the best, in their order
    assert all(re.search(r"local_thread\d+ +12345 +500 +\d{3}\.\d +━", row) for row in rows)
    assert [thread for thread, row in zip(threads, rows) if "★" in row] == [1] * won
    counted = rf"12345678 steps {workers} episodes \d+ steps/s \d+\.\d s ε 0\.37$"
    assert re.search(counted, " ".join(" ".join(lines).split()))


def test_live_table_stands_before_the_first_episode_and_follows_its_list():
    history = []
    live = a3c.live_table(history, 200, lambda: "")
    console = Console(file=io.StringIO(), width=80)
    console.print(live.get_renderable())
    history.append(a3c.Episode("local_thread3", 1, 17, 1.7, 17, 0.1))
    console.print(live.get_renderable())
    before, after = console.file.getvalue().split(" 0 episodes ")
    assert "local_thread" not in before and re.search(r"local_thread3 +1 +17 +1\.7", after)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("arguments", [[], ["--log"]])
def test_terminal_gets_the_table_and_log_gets_the_lines(tmp_path, arguments):
    code = (
        "import os, pty, sys; os.environ.update(TERM='xterm', COLUMNS='80', LINES='24');"
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    )
    program = sys.executable, PROGRAM, "--max-episodes", "40", *arguments
    done = run_python("-c", code, *program, cwd=tmp_path)
    assert done.returncode == 1 and "not learned within 40 episodes" in done.stdout
    assert len(EPISODE.findall(done.stdout)) == (40 if arguments else 0)
    for part in "last steps", "━", " 40 episodes  ":
        assert (part in done.stdout) == (not arguments)
