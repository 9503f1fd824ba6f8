"""The benchmark's own functions, on amounts of work too small to say anything of speed."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import benchmark
import pytest

from companions import peers

LEARNED = "learned in 2.5 s: 100 steps, 7 episodes, 8 workers, 40 steps/s"
GIVEN_UP = "not learned within 7 episodes: 2.5 s, 100 steps, 7 episodes, 8 workers, 40 steps/s"
FAILED = "not learned, x failed after 2.5 s: 100 steps, 7 episodes, 8 workers, 40 steps/s"


def program(line, status=0, stderr="", then="pass"):
    """The command of a program that prints a line and a test's mean, as ours do."""
    return [
        sys.executable,
        "-c",
        f"import sys, time; sys.stderr.write({stderr!r}); print({line!r}, flush=True); {then}; "
        f"print('test: mean of 10 episodes 199.5 steps'); sys.exit({status})",
    ]


def test_cold_start_reads_the_lines_that_the_program_prints():
    figures = peers.cold_start(program(LEARNED))
    assert figures["learned"] and figures["test mean"] == 199.5
    assert (figures["learning s"], figures["steps"], figures["episodes"]) == (2.5, 100, 7)
    assert figures["steps/s"] == 40
    if sys.platform != "win32":
        assert figures["peak MB"] > 1


def test_cold_start_ends_at_the_line_on_learning_and_not_after_the_test():
    began = time.perf_counter()
    figures = peers.cold_start(program(LEARNED, then="time.sleep(2)"))
    assert figures["cold start s"] < time.perf_counter() - began - 1.9


def test_not_having_learned_is_a_result():
    assert peers.cold_start(program(GIVEN_UP, status=1))["learned"] is False


def test_more_on_stderr_than_a_pipe_holds_does_not_stop_the_program():
    much = "sys.stderr.write('x' * 10**6)"
    assert peers.cold_start(program(LEARNED, then=much))["test mean"] == 199.5


@pytest.mark.parametrize(
    "line, status, stderr",
    [
        ("hello", 0, "and nothing of learning"),
        ("hello", 2, "Traceback\nOSError: no such thing"),
        (FAILED, 1, "ValueError: nan"),
        (LEARNED, 1, "test lost: OSError: disk full"),
        (GIVEN_UP, 1, "test lost: OSError: disk full"),
        (GIVEN_UP, 1, "Traceback\nKeyError: 7"),
    ],
)
def test_failed_program_is_named_with_its_last_line(line, status, stderr):
    with pytest.raises(RuntimeError, match=f"status {status}: {stderr.splitlines()[-1]}"):
        peers.cold_start(program(line, status, stderr))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_ends_the_program_that_runs(signals):
    interrupt = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    began = time.perf_counter()
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's `&` has it ignored
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        peers.cold_start(program(LEARNED, then="time.sleep(60)"))
    assert time.perf_counter() - began < 30


def test_peer_stops_when_one_environment_stands_for_ten_episodes():
    rule = peers.StopRule(200)
    model = type("Model", (), {"num_timesteps": 0})()
    for n in range(1, 11):
        model.num_timesteps = 201 * n
        infos = [{"episode": {"l": 200}}, {"episode": {"l": 1}} if n > 5 else {}]
        assert rule({"infos": infos, "self": model}, {}) is (n < 10)
    assert rule.learned and len(rule.history) == 15
    assert rule.history[-2][:5] == ("env1", 10, 200, 200, 2010)
    assert rule.history[-1][:5] == ("env2", 5, 1, 0.5, 2010)


def test_a_run_that_did_not_learn_is_not_pooled_with_those_that_did():
    runs = [{"learned": True, "steps": n} for n in (3, 1, 2)] + [{"learned": False, "steps": 10}]
    assert benchmark.combine({"cold start": {"A2C": runs}})["cold start"] == {
        "A2C": {"learned": "3 of 4", "steps": {"median": 2, "min": 1, "max": 3}},
        "A2C, not learned": {
            "learned": "3 of 4",
            "steps": {"median": 10, "min": 10, "max": 10},
        },
    }


def test_parts_of_a_step_add_up_to_the_whole():
    run = benchmark.apart(benchmark.learning, 1, 400, True)
    parts = [run[part] for part in ("environment", "acting", "update", "the rest")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(1e6 / run["steps/s"])
    assert 0 < run["updates/s"] < run["steps/s"] and 0 < run["set-up s"] < 60


def test_whole_benchmark_prints_its_tables_and_writes_its_json(tmp_path, capsys, monkeypatch):
    run = {"learned": True, "cold start s": 1.0, "steps": 9, "episodes": 3, "steps/s": 18.0}
    commands = []
    monkeypatch.setattr(peers, "cold_start", lambda command: commands.append(command) or run)
    monkeypatch.setattr(peers, "are_installed", lambda: True)
    speeds = {"steps/s": 4000.0, "updates/s": 400.0, "set-up s": 0.5}
    monkeypatch.setattr(benchmark, "apart", lambda *_: speeds)
    file = tmp_path / "figures.json"
    options = "--steps 300 --repeats 1 --workers 1 2 --seeds 2 --peers --json".split()
    assert benchmark.main([*options, str(file)]) == 0
    files = [Path(command[1]).name for command in commands]
    assert files == ["a3c_cartpole.py", "peers.py", "peers.py"] * 2
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert set(figures["speed"]) == {"bare env.step", "1", "2"}
    assert {row: f["learned"] for row, f in figures["cold start"].items()} == {
        "this program": "2 of 2",
        "A2C": "2 of 2",
        "PPO": "2 of 2",
    }
    assert figures["machine"]["cores"] >= 1 and "keras" in figures["machine"]
    printed = capsys.readouterr()
    for words in "By workers", "One step of one worker", "Cold start to learned", "4000 (4000 to":
        assert words in printed.out
    assert "10/10" in printed.err


def test_peers_that_are_not_installed_are_named_with_the_command(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["--peers"]) == 2
    assert "pip install stable-baselines3" in capsys.readouterr().err
