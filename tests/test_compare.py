"""companions/compare.py: the table and the picture of histories written by hand, and a real run."""

import csv
import signal
import sys

import numpy as np
import pytest
from conftest import ROOT, run_python
from matplotlib import colors, image

from companions import compare, peers

HEAD = "thread,episode,steps,mean_of_last_10,total_steps,seconds\n"
LEARNED = HEAD + "w1,1,50,5.0,60,0.1\nw2,1,90,9.0,150,0.2\nw1,2,200,199.5,400,0.4\n"
FELL = HEAD + "w1,1,20,2.0,20,0.1\nw1,2,30,5.0,50,0.2\n"
CUT = LEARNED + "w2,2,20"
FIGURES = "100 steps, 7 episodes, 8 workers, 40 steps/s"
SAID = {
    True: f"learned in 2.5 s: {FIGURES}",
    False: f"not learned within 7 episodes: 2.5 s, {FIGURES}",
}
FAMILY = {  # what each program leaves behind, and whether it learned
    "a3c_cartpole": (LEARNED, True),
    "ppo_cartpole": (FELL, False),
    "dqn_cartpole": (HEAD, True),
    "a3c_two_networks": (CUT, True),
    "a3c_processes": (None, False),
}


pytestmark = pytest.mark.usefixtures("signals")


def fake_command(file, _seed, folder):
    """A program that has learned already."""
    history, learned = FAMILY[file.split("/")[-1]]
    code = "import sys; sys.exit('x.py: error: Ray is missing')"
    if history is not None:
        folder.mkdir(parents=True)
        (folder / "history.csv").write_text(history)
        code = f"print({SAID[learned]!r}); print('test: mean of 10 episodes 150.0 steps')"
    return [sys.executable, "-c", code + f"; raise SystemExit({int(not learned)})"]


@pytest.fixture
def family(monkeypatch):
    monkeypatch.setattr(peers, "command", fake_command)


def read_csv(folder):
    with (folder / "comparison.csv").open(newline="", encoding="utf-8") as file:
        return {row["program"]: row for row in csv.DictReader(file)}


def curves(path):
    """Which of our programs have a curve in the picture: their colour is in it."""
    pixels = np.unique((image.imread(path)[..., :3] * 255).round().reshape(-1, 3), axis=0).tolist()
    return {
        file.split("/")[-1]
        for file, (_, _, colour, _) in compare.PROGRAMS.items()
        if [round(255 * c) for c in colors.to_rgb(colour)] in pixels
    }


def test_table_csv_and_picture_of_the_family(tmp_path, capsys, family):
    assert compare.main(["--seeds", "2", "--out", str(tmp_path)]) == 1
    rows, printed = read_csv(tmp_path), capsys.readouterr()
    assert {name: row["learned"] for name, row in rows.items()} == {
        "a3c_cartpole": "2 of 2",
        "ppo_cartpole, not learned": "0 of 2",
        "dqn_cartpole": "2 of 2",
        "a3c_two_networks": "2 of 2",
        "a3c_processes": "0 of 0",
    }
    row = rows["a3c_cartpole"]
    assert 0 <= float(row["cold start s"]) < 60 and int(row["lines of code"]) > 300
    assert [float(row[name]) for name in ("steps", "episodes", "steps/s")] == [100, 7, 40]
    assert row["test mean"] == "150.0" and row["failed"] == ""
    assert rows["a3c_processes"]["failed"] == "seed 1: status 1: x.py: error: Ray is missing"
    for name in rows:
        assert name in printed.out
    assert printed.err.count("Ray is missing") == 1 and "10/10" in printed.err
    assert curves(tmp_path / "comparison.png") == {
        "a3c_cartpole",
        "ppo_cartpole",
        "a3c_two_networks",
    }


def test_history_is_read_up_to_the_line_that_is_cut_off(tmp_path):
    for text, rows in (LEARNED, 3), (CUT, 3), (HEAD, 0), ("", 0), (HEAD[:9], 0):
        (tmp_path / "history.csv").write_text(text)
        history = compare.read_history(tmp_path / "history.csv")
        assert len(history) == rows
    (tmp_path / "history.csv").write_text(CUT)
    assert compare.read_history(tmp_path / "history.csv")[-1] == ("w1", 2, 200, 199.5, 400, 0.4)


def test_curve_is_the_best_workers_mean_as_a_share_of_the_limit(tmp_path):
    (tmp_path / "history.csv").write_text(LEARNED + "w1,3,10,20.0,500,0.5\n")
    history = compare.read_history(tmp_path / "history.csv")
    shares = compare.curve(history, 200, [59, 60, 149, 150, 399, 400, 500, 10**6])
    assert (shares * 200).tolist() == [0, 5, 5, 9, 9, 199.5, 20, 20]


def test_ctrl_c_keeps_what_is_there(tmp_path, monkeypatch, capsys):
    def run_once(file, seed, folder):
        if "ppo" in file:
            signal.raise_signal(signal.SIGINT)
        (tmp_path / "history.csv").write_text(LEARNED)
        history = compare.read_history(tmp_path / "history.csv")
        return {"learned": True, "steps": 400, "history": history}

    monkeypatch.setattr(compare, "run_once", run_once)
    with pytest.raises(SystemExit) as end:
        compare.main(["--out", str(tmp_path)])
    assert end.value.code == 130
    assert {name: row["steps"] for name, row in read_csv(tmp_path).items()} == {
        "a3c_cartpole": "400.0"
    }
    assert curves(tmp_path / "comparison.png") == {"a3c_cartpole"}


@pytest.mark.parametrize("options", [["--only", "sarsa"], ["--seeds", "0"], ["--peers"]])
def test_bad_option_is_one_line_and_status_2(options, capsys, monkeypatch):
    monkeypatch.setattr(peers, "are_installed", lambda: False)
    with pytest.raises(SystemExit) as end:
        compare.main(options)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.count("\n") == 1 and options[0] in errors


def test_two_programs_really_run(tmp_path):
    options = "-m companions.compare --seeds 1 --only a3c_cartpole ppo_cartpole --out".split()
    done = run_python(*options, tmp_path, cwd=ROOT, timeout=300)
    assert (done.returncode, "2/2" in done.stderr) == (0, True), done.stderr
    rows = read_csv(tmp_path)
    assert {row["learned"] for row in rows.values()} == {"1 of 1"} and len(rows) == 2
    assert min(float(row["cold start s"]) for row in rows.values()) > 0.5
    assert curves(tmp_path / "comparison.png") == {"a3c_cartpole", "ppo_cartpole"}
