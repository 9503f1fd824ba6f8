"""The benchmark's own functions, on amounts of work too small to say anything of speed."""

import json
import sys

import benchmark
import pytest
from conftest import ROOT


def test_speeds_and_parts_are_positive_and_consistent():
    assert benchmark.bare_environment(500) > 0
    speed = benchmark.learning(2, 600)
    assert 0 < speed["updates/s"] < speed["steps/s"]
    parts = benchmark.split(400)
    assert (
        set(parts) == {"environment", "acting", "update", "bookkeeping"} and min(parts.values()) > 0
    )


def test_setup_of_a_process_takes_some_time_and_not_forever():
    assert 0.01 < benchmark.setup(1) < 60


def test_cold_start_reads_the_line_that_the_program_prints():
    line = "learned in 2.5 s: 100 steps, 7 episodes, 8 workers, 40 steps/s"
    code = f"print({line!r}); print('test: mean of 10 episodes 199.5 steps')"
    figures = benchmark.cold_start([sys.executable, "-c", code])
    assert figures["learned"] and figures["cold start s"] > 0
    assert (figures["learning s"], figures["steps"], figures["episodes"]) == (2.5, 100, 7)
    assert figures["test mean"] == 199.5
    if sys.platform != "win32":
        assert 1 < figures["peak MB"] < 1000
    given_up = line.replace("learned in 2.5 s:", "not learned within 7 episodes: 2.5 s,")
    assert not benchmark.cold_start([sys.executable, "-c", f"print({given_up!r})"])["learned"]
    with pytest.raises(RuntimeError, match="said nothing of learning"):
        benchmark.cold_start([sys.executable, "-c", "print('hello')"])


def test_cold_start_understands_a_real_run(tmp_path):
    command = benchmark.program(1, str(tmp_path), "--max-episodes", "20", "--test-episodes", "0")
    figures = benchmark.cold_start(command)
    assert figures["learned"] is False and figures["episodes"] == 20


def test_combine_gives_median_and_range():
    runs = [{"learned": True, "steps": n} for n in (3, 1, 2)] + [{"learned": False, "steps": 10}]
    assert benchmark.combine(runs) == {
        "runs": 4,
        "learned": 3,
        "steps": {"median": 2.5, "min": 1, "max": 10},
    }


def test_whole_benchmark_prints_its_tables_and_writes_its_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        benchmark,
        "cold_start",
        lambda command: {
            "cold start s": 1.0,
            "learned": True,
            "learning s": 0.5,
            "steps": 9,
            "episodes": 3,
            "steps/s": 18.0,
            "test mean": 200.0,
            "peak MB": 500.0,
        },
    )
    monkeypatch.setattr(benchmark, "setup", lambda workers: 0.1 * workers)
    file = tmp_path / "figures.json"
    status = benchmark.main(
        [
            "--steps",
            "300",
            "--repeats",
            "1",
            "--workers",
            "1",
            "2",
            "--seeds",
            "2",
            "--json",
            str(file),
        ]
    )
    assert status == 0
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert (
        set(figures["workers"]) == {"1", "2"}
        and figures["cold start"]["this program"]["learned"] == 2
    )
    assert figures["machine"]["cores"] >= 1 and "keras" in figures["machine"]
    printed = capsys.readouterr()
    for title in (
        "Steps a second",
        "One step of one worker",
        "Set-up after the imports",
        "Cold start to learned",
    ):
        assert title in printed.out
    assert "[8/8]" in printed.err


def test_peers_that_are_not_installed_are_named_with_the_command(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["--peers"]) == 2
    assert "pip install stable-baselines3" in capsys.readouterr().err
    assert (ROOT / "tests" / "benchmark.py").exists()
