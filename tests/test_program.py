"""The program as its user runs it: a process, its lines, its exit status, its films."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROGRAM, ROOT, program_environment, run_program, run_python
from moviepy import VideoFileClip

EPISODE = re.compile(r"local_thread(\d+)  episode (\d+)  steps (\d+)  mean of last 10 (\d+\.\d)")
FIGURES = r"(\d+) steps, (\d+) episodes, (\d+) workers, (\d+) steps/s"
LEARNED = re.compile(r"learned in (\d+\.\d) s: " + FIGURES)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """One run of one worker with a seed that learns, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("learned")
    return run_program("--workers", 1, "--seed", 1, "--test-episodes", 2, cwd=folder), folder


def test_importing_starts_nothing_builds_nothing_and_prints_nothing():
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[1]); import gymnasium as gym;"
        "gym.make = lambda *a, **k: sys.exit('environment built'); import a3c_cartpole as a3c;"
        "assert threading.active_count() == 1;"
        "kinds = (gym.Env, a3c.ParameterServer);"
        "assert not [k for k, v in vars(a3c).items() if isinstance(v, kinds)];"
        "assert not {'matplotlib', 'moviepy', 'pygame'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("switch", ["enable", "disable"])
def test_importing_leaves_the_garbage_collector_as_it_was(switch):
    code = (
        "import gc, sys; sys.path.insert(0, sys.argv[1]);"
        f"gc.{switch}(); import a3c_cartpole; print(gc.isenabled())"
    )
    done = run_python("-c", code, ROOT, cwd=ROOT)
    assert done.stdout.strip() == str(switch == "enable"), done.stderr


def test_learns_and_says_so_in_the_one_line_that_tools_read(learned):
    run, _ = learned
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    episodes = [EPISODE.fullmatch(line) for line in lines]
    count = sum(bool(match) for match in episodes)
    summary = LEARNED.fullmatch(lines[count])
    assert summary and [line for line in lines if LEARNED.match(line)] == [lines[count]]
    assert int(summary[2]) == sum(int(match[3]) for match in episodes if match)
    assert (int(summary[3]), int(summary[4])) == (count, 1)
    assert int(summary[5]) == pytest.approx(int(summary[2]) / float(summary[1]), rel=0.1)
    assert 100 < count < 2000


def test_each_line_has_the_mean_of_the_last_10_and_the_last_meets_the_stop_rule(learned):
    matches = [EPISODE.fullmatch(line) for line in learned[0].stdout.splitlines()]
    rows = [(int(m[2]), int(m[3]), float(m[4])) for m in matches if m]
    steps = [0] * 10 + [steps for _, steps, _ in rows]
    for i, (episode, _, mean) in enumerate(rows):
        assert episode == i + 1
        assert mean == pytest.approx(np.mean(steps[i + 1 : i + 11]), abs=0.051)
    assert [mean > 199 for _, _, mean in rows] == [False] * (len(rows) - 1) + [True]


def test_nothing_but_faults_is_said_on_stderr(learned):
    assert learned[0].stderr == ""


def test_test_episodes_are_printed_and_filmed_one_frame_a_step(learned):
    run, folder = learned
    steps = [int(n) for n in re.findall(r"test_thread  episode \d+  steps (\d+)", run.stdout)]
    assert len(steps) == 2
    assert f"test: mean of 2 episodes {np.mean(steps):.1f} steps" in run.stdout
    for episode, count in enumerate(steps):
        with VideoFileClip(str(folder / "movie" / "A3C" / f"A3C-episode-{episode}.mp4")) as clip:
            frames = [frame.copy() for frame in clip.iter_frames()]
        assert abs(len(frames) - count) <= 1 and frames[0].shape == (400, 600, 3)
        for frame in frames[::10]:
            assert_shows_upright_pole(frame)


def assert_shows_upright_pole(frame):
    """The brown pole stands over the black cart, higher than wide."""
    r, g, b = (frame[..., i].astype(int) for i in range(3))
    pole = (r > 150) & (r - b > 50) & (g > 100)
    ys, xs = np.nonzero(pole)
    assert len(ys) > 300
    assert np.ptp(ys) > 80 and np.ptp(ys) > np.ptp(xs)
    assert (frame[290:310].max(axis=2) < 80).sum() > 200


def test_last_lines_are_the_paths_written_and_they_exist(learned):
    run, folder = learned
    lines = run.stdout.splitlines()
    paths = [line.removeprefix("wrote ") for line in lines if line.startswith("wrote ")]
    assert lines[-len(paths) :] == [f"wrote {path}" for path in paths]
    names = {path.split("/")[-1] for path in paths}
    assert {"A3C.weights.h5", "A3C-episode-0.mp4", "A3C-episode-1.mp4"} <= names
    assert all((folder / path).stat().st_size for path in paths)
    assert {p.name for p in (folder / "movie" / "A3C").iterdir()} == names


def test_earlier_films_are_replaced_without_a_word(learned):
    run, folder = learned
    film = folder / "movie" / "A3C" / "A3C-episode-0.mp4"
    film.write_text("an earlier film")
    again = run_program("--play", "movie/A3C/A3C.weights.h5", "--test-episodes", 1, cwd=folder)
    assert (again.returncode, again.stderr) == (0, "")
    with VideoFileClip(str(film)) as clip:
        assert clip.n_frames > 100


def test_one_worker_with_a_seed_repeats_itself_to_the_step(learned, tmp_path):
    def episodes(run):
        return [line for line in run.stdout.splitlines() if EPISODE.match(line)]

    again = run_program("--workers", 1, "--seed", 1, "--test-episodes", 0, cwd=tmp_path)
    assert again.returncode == 0
    assert episodes(again) == episodes(learned[0])
    other = run_program("--workers", 1, "--seed", 2, "--max-episodes", 20, cwd=tmp_path)
    assert episodes(other) != episodes(learned[0])[:20]


def test_what_cannot_be_learned_within_max_episodes_is_said_with_status_1(tmp_path):
    run = run_program("--max-episodes", 20, cwd=tmp_path)
    assert run.returncode == 1
    lines = run.stdout.splitlines()
    assert sum(bool(EPISODE.fullmatch(line)) for line in lines) == 20
    said = [line for line in lines if line.startswith("not learned")]
    assert len(said) == 1
    assert re.fullmatch(
        r"not learned within 20 episodes: \d+\.\d s, \d+ steps, 20 episodes, 8 workers,"
        r" \d+ steps/s",
        said[0],
    )
    assert not [line for line in lines if line.startswith("test")]
    assert not (tmp_path / "movie" / "A3C" / "A3C.weights.h5").exists()


def test_eight_workers_take_part_in_cartpole_v1(tmp_path):
    run = run_program("--env", "CartPole-v1", "--max-episodes", 80, "--seed", 1, cwd=tmp_path)
    assert run.returncode == 1
    threads = {
        EPISODE.fullmatch(line)[1] for line in run.stdout.splitlines() if EPISODE.match(line)
    }
    assert threads == {str(i) for i in range(1, 9)}


def test_help_gives_every_option_one_line_with_its_default():
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env=program_environment(COLUMNS="110"),
    )
    assert done.returncode == 0
    for option, default in (
        ("--env", "CartPole-v0"),
        ("--workers", "8"),
        ("--seed", "None"),
        ("--test-episodes", "10"),
        ("--max-episodes", "20000"),
        ("--out", "movie/A3C"),
        ("--render", "where there is a screen)"),
    ):
        entry = done.stdout.split(f"\n  {option}", 1)[1].split("\n  -")[0].replace("\\", "/")
        assert (
            f"(default: {default}" in entry and len(entry.split(" (default")[0].splitlines()) <= 2
        )
