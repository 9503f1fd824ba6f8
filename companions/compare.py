"""Compare the programs of this project: run each of them, and make one table and one picture.

    python companions/compare.py            # five runs of each; table and picture are then in
                                            # movie/comparison
    python companions/compare.py --peers    # Stable-Baselines3's A2C, PPO and DQN as well
    python companions/compare.py --runs 1 --only a3c_cartpole a3c_processes_2

Each program runs as a user would run it, in a process of its own. The table says how often it
learned, how long that took, and how well the learned policy did in the test. The picture shows how
the policies became better.
"""
import argparse
import collections
import csv
import dataclasses
import importlib.util
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import common

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

V0 = "CartPole-v0"
V1 = "CartPole-v1"
LIMITS = {V0: 200, V1: 500}     # the most steps of an episode

# `command` is what a user types after "python companions/". {run} is the number of the run, from 1
# on: the seed of those programs that a seed makes repeatable. `colour` and `line` are for the
# picture: Okabe and Ito's colours, which colour-blind readers can tell apart.
Program = collections.namedtuple("Program", "command env colour line")
PROGRAMS = {
    "a3c_cartpole": Program("../a3c_cartpole.py --no-render", V0, common.BLUE, "-"),
    "a3c_two_networks": Program("a3c_two_networks.py --no-render", V0, "#CC79A7", "-"),
    "a3c_processes": Program("a3c_processes.py --no-render", V0, common.ORANGE, "-"),
    "a3c_processes_2": Program(
        "a3c_processes.py --num-process 2 --no-render", V0, common.ORANGE, "--"),
    "a3c_processes_1": Program(
        "a3c_processes.py --num-process 1 --no-render", V0, common.ORANGE, ":"),
    "a3c_ray": Program("a3c_ray.py --no-render", V0, "#E69F00", "-"),
    "ppo_cartpole": Program("ppo_cartpole.py --seed {run} --no-render", V0, common.GREEN, "-"),
    "dqn_cartpole": Program("dqn_cartpole.py --seed {run} --no-render", V1, "#000000", "-"),
    "sb3_a2c": Program("sb3_peers.py A2C --seed {run}", V0, "#56B4E9", "--"),
    "sb3_ppo": Program("sb3_peers.py PPO --seed {run}", V0, common.GREEN, "--"),
    "sb3_dqn": Program("sb3_peers.py DQN --seed {run}", V1, "#000000", "--"),
}
DEFAULT = ["a3c_cartpole", "a3c_two_networks", "a3c_processes", "a3c_ray", "ppo_cartpole",
           "dqn_cartpole"]
PEERS = ["sb3_a2c", "sb3_ppo", "sb3_dqn"]

# The two lines that every program prints.
SUMMARY = re.compile(r"(?P<outcome>learned|not learned) in [\d.]+ s: (?P<steps>\d+) steps,"
                     r" (?P<episodes>\d+) episodes, \d+ workers, (?P<speed>\d+) steps/s")
TEST = re.compile(r"test: mean of \d+ episodes (?P<mean>[\d.]+) steps")


@dataclasses.dataclass
class Run:
    """What a run of a program did."""

    is_learned: bool
    cold_start: float           # seconds from the start of the process to the summary line
    steps: int
    episodes: int
    speed: int                  # steps per second
    test_mean: float | None     # None if no test was played
    history: list               # the rows of history.csv, as dicts


def main(argv=None):
    """Run the programs, then make the table and the picture. Return the exit status."""
    args = read_options(argv)
    runs = {name: [] for name in args.names}        # of each program: Runs, or None if one failed
    try:
        # All programs run once, then all run again, and so on. If the machine is busy with
        # something else for a minute, this disturbs all programs about equally.
        for number in range(1, args.runs + 1):
            for name in args.names:
                common.say(f"run {number} of {args.runs}, {name}")
                folder = args.out / name / f"run{number}"
                runs[name].append(run_once(name, number, folder, args.time_limit))
    finally:
        with common.uninterrupted():        # after Ctrl-C, too: from the runs that there are
            make_table(runs, args.out / "comparison.csv")
            draw(runs, args.out / "comparison.png")
            common.say(f"table and picture are in {args.out}")
    return 1 if any(None in some for some in runs.values()) else 0


def run_once(name, number, folder, time_limit):
    """Run a program to its end and return its Run, or None if it failed.

    To have tried and not learned is no failure. The cold start includes all imports and what is
    compiled, but not the pictures, the test and the films, which come after the summary line.
    """
    file, *options = PROGRAMS[name].command.format(run=number).split()
    path = Path(__file__).resolve().parent / file
    command = [sys.executable, str(path), *options, "--out", str(folder)]
    summary = None
    test = None
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        timer = threading.Timer(time_limit, process.kill)
        timer.start()
        try:
            for line in process.stdout:     # each line when it is printed, so that it can be timed
                if match := SUMMARY.match(line):
                    cold_start = time.perf_counter() - started
                    summary = match
                    common.say(f"    {match[0]}")
                if match := TEST.match(line):
                    test = match
                    common.say(f"    {match[0]}")
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()                  # (it may still run after Ctrl-C)

    if time.perf_counter() - started > time_limit:
        common.say(f"    failed: ended after {time_limit} s")
        return None
    is_learned = summary is not None and summary["outcome"] == "learned"
    expected_status = 0 if is_learned else 1
    if summary is None or status != expected_status:
        common.say(f"    failed with status {status}")      # stderr, which is shown, says why
        return None
    with open(folder / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    return Run(is_learned, cold_start, int(summary["steps"]), int(summary["episodes"]),
               int(summary["speed"]), float(test["mean"]) if test else None, history)


# == The table =====================================================================================

COLUMNS = ["program", "environment", "learned", "cold start s", "steps", "episodes", "steps/s",
           "test mean"]
CAPTION = ("Medians of the runs that learned; of the test, of all runs that played one. Cold start:"
           " from the start of the process to its line \"learned in\".")


def make_table(runs, path):
    """Save the table and print it, with a row for each program."""
    rows = [make_row(name, runs[name]) for name in runs if runs[name]]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    table = Table(*COLUMNS, caption=CAPTION, caption_justify="left")
    for row in rows:
        table.add_row(*row)
    width = max(110, Console().width)       # into a file, rich would write only 80 columns
    Console(width=width).print(table)


def make_row(name, runs):
    """Make a row of the table, a text for each of COLUMNS. A run that failed has not learned."""
    learned = [run for run in runs if run and run.is_learned]
    tests = [run.test_mean for run in runs if run and run.test_mean is not None]
    return [name, PROGRAMS[name].env, f"{len(learned)} of {len(runs)}",
            median_text([run.cold_start for run in learned], 1),
            median_text([run.steps for run in learned]),
            median_text([run.episodes for run in learned]),
            median_text([run.speed for run in learned]),
            median_text(tests, 1)]


def median_text(values, digits=0):
    """Write the median with this number of digits after the point; nothing if there is no value."""
    return f"{np.median(values):.{digits}f}" if values else ""


# == The picture ===================================================================================

@matplotlib.rc_context(matplotlib.rcParamsDefault)      # whatever the user's matplotlibrc says
def draw(runs, path):
    """Draw a curve for each run of each program, with one panel for each environment."""
    envs = sorted({PROGRAMS[name].env for name in runs})
    figure = Figure(figsize=(8, 1 + 3 * len(envs)), layout="constrained")
    panels = figure.subplots(len(envs), sharex=True, squeeze=False)[:, 0]
    for env, axes in zip(envs, panels):
        axes.set(title=f"{env}: at most {LIMITS[env]} steps per episode", xscale="log",
                 ylim=(0, 1.05 * LIMITS[env]), ylabel="steps per episode")
        axes.grid(color="0.9")
        for name, some in runs.items():
            _, program_env, colour, line = PROGRAMS[name]
            if program_env != env:
                continue
            axes.plot([], [], line, color=colour, label=name)       # for the legend
            for run in some:
                if run:
                    steps, means = best_means(run.history)
                    axes.step(steps, means, line, color=colour, linewidth=1, where="post")
                    if run.is_learned:
                        axes.plot(steps[-1], means[-1], "o", color=colour, markersize=4)
        axes.legend(loc="center left", bbox_to_anchor=(1, .5), frameon=False, handlelength=3)
    panels[-1].set_xlabel("environment steps of all workers together")
    figure.suptitle("The best mean of ten successive episodes of one worker so far: a line for each"
                    "\nrun, with a dot at its end if it has learned", fontsize="medium")
    figure.savefig(path)


def best_means(history):
    """Find the best mean of ten successive episodes of one worker so far.

    Return steps, those of all workers together, and the best mean after each of them. A worker
    counts from its tenth episode, because before that its mean still contains zeros.
    """
    complete = [e for e in history if int(e["episode"]) >= 10]
    complete.sort(key=lambda e: int(e["total_steps"]))
    steps = [int(e["total_steps"]) for e in complete]
    means = [float(e["mean_of_last_10"]) for e in complete]
    return steps, np.maximum.accumulate(means)


# ==================================================================================================

def read_options(argv):
    """Read the command line. `names` in the result are the programs to run."""
    parser = argparse.ArgumentParser(
        description="Run the programs of this project, and compare what came of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", type=common.positive_number, default=5, help="of each program")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=DEFAULT, metavar="NAME",
                        help=f"run only these, of {', '.join(PROGRAMS)}")
    parser.add_argument("--peers", action="store_true",
                        help=f"run Stable-Baselines3 as well: {', '.join(PEERS)}")
    parser.add_argument("--time-limit", type=common.positive_number, default=300, metavar="SECONDS",
                        help="a run that takes longer is ended, and has failed")
    parser.add_argument("--out", type=Path, default=Path("movie/comparison"),
                        help="where the files go")
    args = parser.parse_args(argv)
    wanted = args.only + PEERS if args.peers else args.only
    args.names = [name for name in PROGRAMS if name in wanted]
    if set(args.names) & set(PEERS) and importlib.util.find_spec("stable_baselines3") is None:
        parser.error("Stable-Baselines3 is not installed. Install it by: python -m pip install"
                     " stable-baselines3")
    common.make_folder(parser, args.out)
    return args


if __name__ == "__main__":
    common.run_program(main)
