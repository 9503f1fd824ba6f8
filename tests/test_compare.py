"""companions/compare.py: table, csv and picture of invented runs, and failures among them."""

import csv
import math
import os
import signal
import sys

import numpy as np
import pytest
from matplotlib import colors, image

import a3c_cartpole as a3c
from companions import compare

HEAD = "thread,episode,steps,mean_of_last_10,total_steps,seconds\n"
SUMMARY = "learned in 2.5 s: 400 steps, 7 episodes, 8 workers, 160 steps/s"
TEST = "test: mean of 10 episodes 150.0 steps"


def write_history(folder, limit=200, fraction=1.0):
    """Two workers that become better; w1 reaches a fraction of the limit after 4000 steps."""
    lines = [HEAD]
    for episode in range(1, 21):
        mean = fraction * limit * episode / 20
        lines.append(f"w1,{episode},20,{mean},{200 * episode},0.1\n")
        lines.append(f"w2,{episode},10,{mean / 2},{200 * episode + 100},0.1\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.csv").write_text("".join(lines))


def python(code):
    return [sys.executable, "-I", "-S", "-c", code]


def program(*lines, status=0):
    """A program that prints some lines and ends at once."""
    return python(f"print({chr(10).join(lines)!r}); raise SystemExit({status})")


@pytest.fixture
def family(monkeypatch):
    """In place of the programs: four that learn, one that does not, and one that fails."""

    def make_command(name, seed, folder):
        if name == "a3c_ray":
            return python("import sys; sys.exit('Traceback\\nValueError: theta is nan')")
        if name == "ppo_cartpole":
            write_history(folder, fraction=0.5)
            return program("not " + SUMMARY, status=1)
        write_history(folder, limit=500 if name == "dqn_cartpole" else 200)
        return program("w1  episode 1", SUMMARY, TEST)

    monkeypatch.setattr(compare, "make_command", make_command)
    monkeypatch.setattr(compare, "is_installed", lambda package: True)


@pytest.fixture(scope="module", autouse=True)
def signals():
    """Give the signal handlers back, and let Ctrl-C work even if the shell has it ignored."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read_csv(folder):
    with (folder / "comparison.csv").open(newline="") as file:
        return {row["program"]: row for row in csv.DictReader(file)}


def drawn(path):
    """The programs with a curve in the picture: those whose colour is in it.

    This cannot be told of DQN, because the text is black, too.
    """
    pixels = np.unique((image.imread(path)[..., :3] * 255).round().reshape(-1, 3), axis=0).tolist()
    return {name for name, program in compare.PROGRAMS.items()
            if name != "dqn_cartpole"
            and [round(255 * c) for c in colors.to_rgb(program.colour)] in pixels}  # fmt: skip


def test_table_csv_and_picture_of_all_programs(tmp_path, capsys, family):
    assert compare.main(["--seeds", "2", "--out", str(tmp_path)]) == 1
    rows = read_csv(tmp_path)
    printed = capsys.readouterr()
    assert {name: row["learned"] for name, row in rows.items()} == {
        "a3c_cartpole": "2 of 2",
        "a3c_two_networks": "2 of 2",
        "a3c_processes": "2 of 2",
        "a3c_ray": "0 of 2",
        "ppo_cartpole": "0 of 2",
        "dqn_cartpole": "2 of 2",
    }
    row = rows["a3c_cartpole"]
    assert [row[name] for name in ("steps", "episodes", "steps/s")] == ["400", "7", "160"]
    assert 0 <= float(row["cold start s"]) < 60
    assert row["test mean"] == "150.0"
    assert rows["ppo_cartpole"]["steps"] == ""
    for name in rows:
        assert name in printed.out
    assert drawn(tmp_path / "comparison.png") == set(rows) - {"a3c_ray", "dqn_cartpole"}


def test_dqn_on_cartpole_v1_has_a_panel_of_its_own(tmp_path):
    write_history(tmp_path)
    run = compare.Run(True, 1.0, 400, 7, 160, 150.0, compare.read_history(tmp_path / "history.csv"))
    heights = []
    for names in (["a3c_cartpole"], ["a3c_cartpole", "dqn_cartpole"]):
        compare.draw({name: [run] for name in names}, tmp_path / "comparison.png")
        height, width, _ = image.imread(tmp_path / "comparison.png").shape
        assert width == 800
        heights.append(height)
    assert heights[1] > 1.5 * heights[0]


def test_failed_program_is_named_with_its_last_line_and_the_others_go_on(
    tmp_path, capsys, family
):
    options = ["--seeds", "2", "--only", "a3c_ray", "a3c_processes", "--out", str(tmp_path)]
    assert compare.main(options) == 1
    lines = capsys.readouterr().err.splitlines()
    for seed in 1, 2:
        assert f"a3c_ray, seed {seed}: failed with status 1: ValueError: theta is nan" in lines
    assert "4/4" in lines[-1]       # the progress bar
    assert read_csv(tmp_path)["a3c_processes"]["learned"] == "2 of 2"


def test_programs_take_turns_seed_by_seed_and_dqn_is_last_in_the_table(tmp_path, monkeypatch):
    order = []

    def run_once(name, seed, folder):
        order.append((name, seed))
        return compare.Run(False, 1.0, 9, 3, 9, None, [])

    monkeypatch.setattr(compare, "run_once", run_once)
    names = ["dqn_cartpole", "a3c_cartpole"]
    assert compare.main(["--seeds", "2", "--only", *names, "--out", str(tmp_path)]) == 0
    assert order == [(name, seed) for seed in (1, 2) for name in names]
    assert list(read_csv(tmp_path)) == ["a3c_cartpole", "dqn_cartpole"]
    assert drawn(tmp_path / "comparison.png") == set()      # no run has played ten episodes


@pytest.mark.parametrize(
    "lines, status, learned",
    [
        ((SUMMARY, TEST), 0, True),
        (("not " + SUMMARY,), 1, False),
    ],
)
def test_not_having_learned_is_a_result(tmp_path, monkeypatch, lines, status, learned):
    write_history(tmp_path)
    monkeypatch.setattr(compare, "make_command", lambda *_: program(*lines, status=status))
    assert compare.run_once("a3c_cartpole", 1, tmp_path).learned is learned


@pytest.mark.parametrize(
    "lines, status",
    [
        ((), 0),                                                # nothing of learning
        ((SUMMARY,), 1),                                        # its test has failed
        (("not learned, w1 failed, in" + SUMMARY[10:],), 1),    # one of its threads has failed
        (("not " + SUMMARY,), -signal.SIGTERM),
    ],
)  # fmt: skip
def test_failure_is_told_from_not_having_learned(tmp_path, monkeypatch, lines, status):
    write_history(tmp_path)
    command = program(*lines, status=status)
    if status < 0:
        command = python(f"print({lines[0]!r}, flush=True); import os; os.kill(os.getpid(), 15)")
    monkeypatch.setattr(compare, "make_command", lambda *_: command)
    with pytest.raises(RuntimeError, match=f"status {status}"):
        compare.run_once("a3c_cartpole", 1, tmp_path)


def test_cold_start_ends_at_the_line_on_learning_and_not_after_the_test(tmp_path, monkeypatch):
    write_history(tmp_path)
    code = f"import time; print({SUMMARY!r}, flush=True); time.sleep(.5); print({TEST!r})"
    monkeypatch.setattr(compare, "make_command", lambda *_: python(code))
    started = compare.time.perf_counter()
    run = compare.run_once("a3c_cartpole", 1, tmp_path)
    assert run.cold_start < compare.time.perf_counter() - started - 0.4


def test_each_worker_counts_from_its_tenth_episode():
    history = [
        compare.Episode("w1", 9, 200, 180.0, 900, 0.1),
        compare.Episode("w2", 10, 50, 40.0, 1000, 0.1),
        compare.Episode("w1", 10, 100, 110.0, 1100, 0.1),
        compare.Episode("w2", 11, 50, 45.0, 1200, 0.1),
        compare.Episode("w1", 11, 10, 30.0, 1300, 0.1),
    ]
    best = compare.best_mean(history, [900, 999, 1000, 1099, 1100, 1200, 1300, 10**6]).tolist()
    assert math.isnan(best[0]) and math.isnan(best[1])
    assert best[2:] == [40, 40, 110, 110, 45, 45]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_ends_the_program_and_keeps_what_is_there(tmp_path, monkeypatch, capsys):
    def make_command(name, seed, folder):
        write_history(folder)
        if name == "a3c_cartpole":
            return program(SUMMARY, TEST)
        pid = tmp_path / "pid"
        return python(
            "import os, signal, time\n"
            f"open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
            "os.kill(os.getppid(), signal.SIGINT)\n"
            "time.sleep(60)\n"
        )

    monkeypatch.setattr(compare, "make_command", make_command)
    options = ["compare.py", "--only", "a3c_cartpole", "ppo_cartpole", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)
    with pytest.raises(SystemExit) as end:
        compare.run_program()
    assert end.value.code == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert {name: row["steps"] for name, row in read_csv(tmp_path).items()} == {
        "a3c_cartpole": "400"
    }
    assert "a3c_cartpole" in capsys.readouterr().out
    assert "a3c_cartpole" in drawn(tmp_path / "comparison.png")


@pytest.mark.parametrize(
    "options, why",
    [
        (["--only", "sarsa"], "sarsa"),
        (["--seeds", "0"], "'0' is not a whole number from 1 on"),
        (["--peers"], "pip install stable-baselines3"),
        (["--only", "sb3_ppo"], "pip install stable-baselines3"),
        (["--out", __file__], "cannot write there"),
    ],
)
def test_bad_option_says_why_and_ends_with_status_2(options, why, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "is_installed", lambda package: False)
    with pytest.raises(SystemExit) as end:
        compare.main(options)
    assert end.value.code == 2
    assert why in capsys.readouterr().err


def test_without_ray_its_program_is_left_out_with_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "is_installed", lambda package: False)
    args = compare.read_options(["--out", str(tmp_path)])
    assert args.names == [name for name in compare.PROGRAMS if name != "a3c_ray"]
    assert "a3c_ray is left out" in capsys.readouterr().err


def test_peers_are_run_beside_the_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "is_installed", lambda package: True)
    args = compare.read_options(["--only", "ppo_cartpole", "--peers", "--out", str(tmp_path)])
    assert args.names == ["ppo_cartpole", "sb3_a2c", "sb3_ppo", "sb3_dqn"]


def test_peer_stops_when_one_environment_stands_for_ten_episodes():
    rule = compare.StopRule(200)
    model = type("Model", (), {"num_timesteps": 0})()
    for n in range(1, 11):
        model.num_timesteps = 201 * n
        infos = [{"episode": {"l": 200}}, {"episode": {"l": 1}} if n > 5 else {}]
        assert rule({"infos": infos, "self": model}, {}) is (n < 10)
    assert rule.learned
    assert len(rule.history) == 15
    assert rule.history[-2][:5] == ("env1", 10, 200, 200, 2010)
    assert rule.history[-1][:5] == ("env2", 5, 1, 0.5, 2010)


def test_the_main_files_line_and_history_are_understood(tmp_path, capsys):
    progress = a3c.Progress("CartPole-v0", 20_000)
    progress.workers = 8
    progress.finish_episode("local_thread1", 1, 20, 2.0, 20, False)
    for is_learned in True, False:
        a3c.keep({}, progress, is_learned, 1000, "title", tmp_path)
        summary = compare.SUMMARY.match(capsys.readouterr().out)
        assert (summary[1] is None, summary[2], summary[3]) == (is_learned, "1000", "1")
    a3c.play(lambda: 200, 10)
    lines = capsys.readouterr().out.splitlines()
    assert compare.TEST.match(lines[-1])[1] == "200.0"
    assert compare.read_history(tmp_path / "history.csv") == progress.history
    assert compare.Episode._fields == a3c.Episode._fields
