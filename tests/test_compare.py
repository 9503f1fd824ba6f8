"""companions/compare.py with small programs in place of ours, and the peers' rule."""

import csv
import math
import signal
import sys
import time
from pathlib import Path

import a3c_cartpole as a3c
from companions import common, compare, sb3_peers

import pytest
from conftest import start_python

# In place of a program. A line before these says `what` it does.
FAKE = """
import pathlib, subprocess, sys, time
out = pathlib.Path(sys.argv[-1])
out.mkdir(parents=True)
rows = [f"w1,{n},20,{10 * n},{20 * n}" for n in range(1, 21)]
(out / "history.csv").write_text("\\n".join(
    ["thread,episode,steps,mean_of_last_10,total_steps", *rows]))
summary = "learned in 2.5 s: 400 steps, 20 episodes, 1 workers, 160 steps/s"
if what == "learns":
    print(summary, flush=True)
    time.sleep(.3)
    print("test: mean of 10 episodes 150.0 steps")
if what == "does not learn":
    print("not " + summary)
    print("test: mean of 10 episodes 50.0 steps")
    sys.exit(1)
if what == "fails":
    print(summary)
    sys.exit("ValueError: theta is nan")
if what == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("hangs", file=sys.stderr, flush=True)
    child.wait()
"""


@pytest.fixture
def family(tmp_path, monkeypatch):
    """A folder with such programs: family(ppo_cartpole="fails") puts one there, by that name."""
    monkeypatch.chdir(tmp_path)
    Path("companions").mkdir()

    def make(**doing):
        for name, what in doing.items():
            folder = "." if name == "a3c_cartpole" else "companions"
            Path(folder, f"{name}.py").write_text(f"what = {what!r}\n{FAKE}")
        return ["--out", "out", "--only", *doing]

    return make


def read_table():
    with open("out/comparison.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_programs_take_turns_and_a_failed_run_is_no_result(family, capfd):
    options = family(a3c_cartpole="learns", ppo_cartpole="fails", dqn_cartpole="does not learn")
    assert compare.main(["--runs", "2", *options]) == 1
    printed = capfd.readouterr()
    turns = [f"run {run} of 2, {name}" for run in (1, 2) for name in options[3:]]
    assert [line for line in printed.out.splitlines() if line.startswith("run ")] == turns
    assert printed.out.count("failed with status 1") == 2
    assert "ValueError: theta is nan" in printed.err
    assert [row["learned"] for row in read_table()] == ["2 of 2", "0 of 2", "0 of 2"]
    assert [row["test mean"] for row in read_table()] == ["150.0", "", "50.0"]
    assert Path("out/comparison.png").exists()


def test_cold_start_ends_at_the_line_on_learning_and_not_after_the_test(family):
    family(a3c_cartpole="learns")
    started = time.perf_counter()
    run = compare.run_once("a3c_cartpole", 1, Path("out"), time_limit=60)
    assert run.cold_start < time.perf_counter() - started - 0.2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not have these signals")
def test_time_limit_and_signals_end_a_program_with_its_child_and_the_table_is_made(family):
    options = ["--runs", "1", "--time-limit", "2",
               *family(a3c_cartpole="hangs", ppo_cartpole="hangs")]
    started = time.perf_counter()
    process = start_python("-m", "companions.compare", *options, cwd=".")
    for _ in range(2):          # the first was over the limit, the second has begun
        assert process.stderr.readline() == "hangs\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    # The children hold this stderr, too. It is at its end when they have ended.
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    assert time.perf_counter() - started < 50       # alone, they end after 60 s
    assert out.count("failed: ended after 2 s") == 1
    assert [row["learned"] for row in read_table()] == ["0 of 1"]
    assert Path("out/comparison.png").exists()


def test_row_has_medians_of_the_runs_that_learned_and_of_all_tests():
    learned = [compare.Run(True, 9.04, 100, 10, 50, 200.0, []),
               compare.Run(True, 3.0, 400, 30, 70, 190.0, [])]
    not_learned = [compare.Run(False, 99.0, 9000, 900, 1, test, []) for test in (20.0, None)]
    row = compare.make_row("dqn_cartpole", [*learned, *not_learned, None])
    assert row[2:] == ["2 of 5", "6.0", "250", "20", "60", "190.0"]


def test_best_mean_counts_each_worker_from_its_tenth_episode():
    columns = ("thread", "episode", "mean_of_last_10", "total_steps")
    rows = [("w1", 9, 180.0, 900), ("w2", 10, 40.0, 1000), ("w1", 10, 110.0, 1100),
            ("w2", 11, 45.0, 1200), ("w1", 11, 30.0, 1300)]
    history = [dict(zip(columns, map(str, row))) for row in rows]
    best = compare.best_mean(history, [900, 999, 1000, 1099, 1100, 1200, 1300, 10**6]).tolist()
    assert math.isnan(best[0]) and math.isnan(best[1])
    assert best[2:] == [40, 40, 110, 110, 45, 45]


@pytest.mark.parametrize("options, why", [
    (["--only", "sarsa"], "sarsa"),
    (["--runs", "0"], "must be at least 1"),
    (["--peers"], "pip install stable-baselines3"),
    (["--out", __file__], "cannot write there"),
])
def test_bad_option_says_why_and_ends_with_status_2(options, why, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)     # as if not installed
    with pytest.raises(SystemExit) as end:
        compare.main(options)
    assert end.value.code == 2
    assert why in capsys.readouterr().err


def test_peers_stop_when_one_environment_meets_the_rule():
    rule = sb3_peers.StopRule(200)
    model = type("Model", (), {"num_timesteps": 0})()
    for n in range(1, 12):
        model.num_timesteps = 200 * n
        infos = [{"episode": {"l": 190 if n == 1 else 200}},
                 {"episode": {"l": 1}} if n > 5 else {}]
        # The first ten have a mean of 199 steps, which is not above 199.
        assert rule({"infos": infos, "self": model}, {}) is (n < 11)
    assert rule.is_learned
    assert rule.history[-2:] == [("env1", 11, 200, 200, 2200), ("env2", 6, 1, 0.6, 2200)]


def test_lines_and_columns_of_the_programs_are_understood(tmp_path, capsys):
    a3c.main(["--max-episodes", "1", "--workers", "1", "--no-render", "--out", str(tmp_path)])
    with common.Run("title", 200, tmp_path) as run:
        run.record("agent", 20, 2.0)
    run.keep({})
    summaries = [compare.SUMMARY.match(line) for line in capsys.readouterr().out.splitlines()]
    assert [(found[1], found[3]) for found in summaries if found] == [("not ", "1")] * 2
    assert sb3_peers.Episode._fields == a3c.Episode._fields
