"""companions/compare.py with small programs in place of ours, and the peers' rule."""
import csv
import sys
import time
import types
from pathlib import Path

import common

import a3c_cartpole as a3c

import compare
import gymnasium as gym
import matplotlib
import pytest
import sb3_peers

# In place of a program. A line before these says `what` it does.
FAKE = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[-1])
out.mkdir(parents=True)
rows = [f"w1,{n},20,{10 * n},{20 * n}" for n in range(1, 21)]
(out / "history.csv").write_text("\\n".join(
    ["worker,episode,steps,mean_of_last_10,total_steps", *rows]))
if what == "hangs":
    time.sleep(60)
print("not " * (what == "does not learn")
      + "learned in 2.5 s: 400 steps, 20 episodes, 1 workers, 160 steps/s", flush=True)
if what == "fails":
    sys.exit("ValueError: theta is nan")
time.sleep(.3)
print("test: mean of 10 episodes 150.0 steps")
sys.exit(what == "does not learn")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put programs in place of ours: fake(ppo_cartpole="fails") makes one of that name."""
    monkeypatch.chdir(tmp_path)

    def make(**doing):
        for name, what in doing.items():
            Path(f"{name}.py").write_text(f"what = {what!r}\n{FAKE}")
            program = compare.PROGRAMS[name]._replace(command=f"{tmp_path}/{name}.py")
            monkeypatch.setitem(compare.PROGRAMS, name, program)
        return ["--out", "out", "--only", *doing]

    return make


def read_table():
    assert Path("out/comparison.png").exists()
    with open("out/comparison.csv", newline="") as file:
        return {row["program"]: (row["learned"], row["test mean"]) for row in csv.DictReader(file)}


def test_programs_take_turns_and_a_run_that_fails_or_takes_too_long_is_no_result(
        fake, capfd, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)   # as in someone's matplotlibrc
    options = fake(a3c_cartpole="learns", a3c_ray="hangs", ppo_cartpole="fails",
                   dqn_cartpole="does not learn")
    assert compare.main(["--runs", "2", "--time-limit", "2", *options]) == 1
    out, err = capfd.readouterr()
    turns = [f"run {run} of 2, {name}" for run in (1, 2) for name in options[3:]]
    assert [line for line in out.splitlines() if line.startswith("run ")] == turns
    assert out.count("failed with status 1") == out.count("failed: ended after 2 s") == 2
    assert "ValueError: theta is nan" in err
    assert read_table() == {"a3c_cartpole": ("2 of 2", "150.0"), "ppo_cartpole": ("0 of 2", ""),
                            "a3c_ray": ("0 of 2", ""), "dqn_cartpole": ("0 of 2", "150.0")}


def test_cold_start_ends_at_the_line_on_learning_and_not_after_the_test(fake):
    fake(a3c_cartpole="learns")
    started = time.perf_counter()
    run = compare.run_once("a3c_cartpole", 1, Path("out"), time_limit=60)
    assert run.cold_start < time.perf_counter() - started - .2


def test_after_ctrl_c_the_table_has_the_runs_that_there_are(fake, monkeypatch):
    def run_once(*_):
        if len(runs) == 3:
            raise KeyboardInterrupt
        last = {"episode": "10", "mean_of_last_10": "199.5", "total_steps": "400"}
        runs.append(compare.Run(True, 3., 400, 30, 70, 190., [last]))
        return runs[-1]

    runs = []
    monkeypatch.setattr(compare, "run_once", run_once)
    with pytest.raises(KeyboardInterrupt):
        compare.main(fake(a3c_cartpole="", ppo_cartpole=""))
    assert read_table() == {"a3c_cartpole": ("2 of 2", "190.0"),
                            "ppo_cartpole": ("1 of 1", "190.0")}


def test_row_has_medians_of_the_runs_that_learned_and_of_all_tests():
    learned = [compare.Run(True, 9.04, 100, 10, 50, 200., []),
               compare.Run(True, 3., 400, 30, 70, 190., [])]
    not_learned = [compare.Run(False, 99., 9000, 900, 1, test, []) for test in (20., None)]
    row = compare.make_row("dqn_cartpole", [*learned, *not_learned, None])
    assert row[2:] == ["2 of 5", "6.0", "250", "20", "60", "190.0"]


def test_best_means_count_each_worker_from_its_tenth_episode():
    columns = ("worker", "episode", "mean_of_last_10", "total_steps")
    rows = [("w1", 9, 180., 900), ("w1", 10, 110., 1100), ("w1", 11, 30., 1300),
            ("w2", 10, 40., 1000), ("w2", 11, 120., 1200)]
    history = [dict(zip(columns, map(str, row))) for row in rows]
    steps, means = compare.best_means(history)
    assert (steps, means.tolist()) == ([1000, 1100, 1200, 1300], [40, 110, 120, 120])


@pytest.mark.parametrize("options, why", [
    (["--only", "sarsa"], "sarsa"), (["--runs", "0"], "'0' is not a whole number from 1"),
    (["--peers"], "pip install stable-baselines3"),
    (["--out", __file__], f"cannot write to the folder {__file__}")])
def test_bad_option_says_why_and_ends_with_status_2(options, why, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)     # as if not installed
    with pytest.raises(SystemExit) as end:
        compare.main(options)
    assert end.value.code == 2 and why in capsys.readouterr().err


def test_lines_and_columns_of_the_programs_are_understood(tmp_path, capsys):
    args = types.SimpleNamespace(out=tmp_path, max_episodes=9, test_episodes=1, seed=None,
                                 play=None, render=False)
    env = gym.make("CartPole-v1", render_mode="rgb_array")
    run = common.Run(a3c.ParameterServer().model, env, "title", args)
    with run:
        run.finish_episode("agent", 20, run.model.get_weights())
    run.test(lambda weights, s: 0)
    lines = capsys.readouterr().out.splitlines()
    summary, = filter(None, map(compare.SUMMARY.match, lines))
    assert (summary["outcome"], summary["episodes"]) == ("not learned", "1")
    assert sum(compare.TEST.match(line) is not None for line in lines) == 1
    assert sb3_peers.Episode._fields == a3c.Episode._fields


def test_peers_stop_when_one_environment_meets_the_rule():
    rule = sb3_peers.StopRule(200)
    model = types.SimpleNamespace(num_timesteps=0)
    for n in range(1, 12):
        model.num_timesteps = 200 * n
        infos = [{"episode": {"l": 190 if n == 1 else 200}},
                 {"episode": {"l": 1}} if n > 5 else {}]
        # The first ten have a mean of 199 steps, which is not above 199.
        assert rule({"infos": infos, "self": model}, {}) is (n < 11)
    assert rule.is_learned
    assert rule.history[-2:] == [("env1", 11, 200, 200, 2200), ("env2", 6, 1, 0.6, 2200)]
