"""Compare the programs of this project: run each of them, and make one table and one picture.

    python -m companions.compare            # five runs of each; table and picture are then in
                                            # movie/comparison
    python -m companions.compare --peers    # Stable-Baselines3's A2C, PPO and DQN as well
    python -m companions.compare --runs 1 --only a3c_cartpole a3c_processes_2

Each program runs as a user would run it, in a process of its own. The table says how often it
learned, how long that took, and how well the learned policy did in the test. The picture shows how
the policies became better.
"""
import argparse
import collections
import contextlib
import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

# `command` is what a user types after "python". {run} is the number of the run, from 1 on: the seed
# of those programs that a seed makes repeatable. `colour` and `line` are for the picture: Okabe and
# Ito's colours, which colour-blind readers can tell apart.
Program = collections.namedtuple("Program", "command env colour line")

V0 = "CartPole-v0"
V1 = "CartPole-v1"
LIMITS = {V0: 200, V1: 500}     # the most steps of an episode

PROGRAMS = {
    "a3c_cartpole": Program("a3c_cartpole.py --no-render", V0, "#0072B2", "-"),
    "a3c_two_networks": Program("-m companions.a3c_two_networks --no-render", V0, "#CC79A7", "-"),
    "a3c_processes": Program("-m companions.a3c_processes --no-render", V0, "#D55E00", "-"),
    "a3c_processes_2": Program(
        "-m companions.a3c_processes --num-process 2 --no-render", V0, "#D55E00", "--"),
    "a3c_processes_1": Program(
        "-m companions.a3c_processes --num-process 1 --no-render", V0, "#D55E00", ":"),
    "a3c_ray": Program("-m companions.a3c_ray --no-render", V0, "#E69F00", "-"),
    "ppo_cartpole": Program(
        "-m companions.ppo_cartpole --seed {run} --no-render", V0, "#009E73", "-"),
    "sb3_a2c": Program("-m companions.sb3_peers A2C --seed {run}", V0, "#56B4E9", "--"),
    "sb3_ppo": Program("-m companions.sb3_peers PPO --seed {run}", V0, "#009E73", "--"),
    "dqn_cartpole": Program(
        "-m companions.dqn_cartpole --seed {run} --no-render", V1, "#000000", "-"),
    "sb3_dqn": Program("-m companions.sb3_peers DQN --seed {run}", V1, "#000000", "--"),
}
DEFAULT = ["a3c_cartpole", "a3c_two_networks", "a3c_processes", "a3c_ray", "ppo_cartpole",
           "dqn_cartpole"]
PEERS = ["sb3_a2c", "sb3_ppo", "sb3_dqn"]

# What a run did. `cold_start` is in seconds, `speed` in steps per second. `history` is a list of
# the rows of history.csv. `test_mean` is None if no test was played.
Run = collections.namedtuple(
    "Run", "is_learned cold_start steps episodes speed test_mean history")

# The two lines that every program prints.
SUMMARY = re.compile(r"(not )?learned in [\d.]+ s: (\d+) steps, (\d+) episodes, \d+ workers,"
                     r" (\d+) steps/s")
TEST = re.compile(r"test: mean of \d+ episodes ([\d.]+) steps")

COLUMNS = ["program", "environment", "learned", "cold start s", "steps", "episodes", "steps/s",
           "test mean"]
CAPTION = ("Medians of the runs that learned; of the test, of all runs that played one. Cold start:"
           " from the start of the process to its line \"learned in\".")


def main(argv=None):
    """Run the programs, then make the table and the picture. Return the exit status."""
    args = read_options(argv)
    runs = {name: [] for name in args.names}        # of each program: Runs, or None if one failed
    try:
        # All programs run once, then all run again, and so on. If the machine is busy with
        # something else for a minute, this disturbs all programs about equally.
        for number in range(1, args.runs + 1):
            for name in args.names:
                print(f"run {number} of {args.runs}, {name}", flush=True)
                folder = args.out / name / f"run{number}"
                runs[name].append(run_once(name, number, folder, args.time_limit))
    finally:
        # After Ctrl-C, too: from the runs that there are.
        rows = [make_row(name, runs[name]) for name in args.names if runs[name]]
        with open(args.out / "comparison.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        draw(runs, args.out / "comparison.png")
        print_table(rows)
        print(f"table and picture are in {args.out}")
    if any(None in some for some in runs.values()):
        return 1
    return 0


# == Running a program =============================================================================

def run_once(name, number, folder, time_limit):
    """Run a program to its end and return its Run, or None if it failed.

    To have tried and not learned is no failure. The clock starts before the process does, and stops
    when the program says that it has learned. So it includes all imports and what is compiled, but
    not the pictures, the test and the films that come afterwards.
    """
    command = PROGRAMS[name].command.format(run=number).split()
    summary = None
    test_mean = None
    started = time.perf_counter()
    # In a session of its own, the program is not reached by Ctrl-C, which would end it twice, and
    # it can be ended together with the processes that it has started.
    with subprocess.Popen([sys.executable, *command, "--out", str(folder)], text=True,
                          errors="replace", stdout=subprocess.PIPE,
                          start_new_session=True) as process:
        timer = threading.Timer(time_limit, end, [process])
        try:
            timer.start()
            for line in process.stdout:
                if match := SUMMARY.match(line):
                    cold_start = time.perf_counter() - started
                    summary = match
                    print(f"    {match[0]}", flush=True)
                if match := TEST.match(line):
                    test_mean = float(match[1])
                    print(f"    {match[0]}", flush=True)
            status = process.wait()
        finally:
            timer.cancel()
            end(process)

    is_learned = summary is not None and summary[1] is None
    expected_status = 0 if is_learned else 1
    if time.perf_counter() - started > time_limit:
        print(f"    failed: ended after {time_limit} s")
        return None
    if summary is None or status != expected_status:
        print(f"    failed with status {status}")       # stderr, which is shown, says why
        return None
    with open(folder / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    return Run(is_learned, cold_start, int(summary[2]), int(summary[3]), int(summary[4]), test_mean,
               history)


def end(process):
    """End a program if it still runs, and the processes that it has started."""
    process.terminate()                         # like Ctrl-C: it should end them itself
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    if hasattr(os, "killpg"):                   # Windows does not have it
        with contextlib.suppress(OSError):      # nearly always, none is left
            os.killpg(process.pid, signal.SIGKILL)


# == The table =====================================================================================

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


def print_table(rows):
    """Print the table."""
    table = Table(caption=CAPTION, caption_justify="left")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = max(110, Console().width)       # into a file, rich would write only 80 columns
    Console(width=width).print(table)


# == The picture ===================================================================================

def draw(runs, path):
    """Draw the curves of all programs, with one panel for each environment."""
    envs = sorted({PROGRAMS[name].env for name in runs})
    figure = Figure(figsize=(8, 1 + 3 * len(envs)), dpi=100, layout="constrained")
    panels = figure.subplots(len(envs), sharex=True, squeeze=False)[:, 0]
    for env, axes in zip(envs, panels):
        axes.set(title=f"{env}: at most {LIMITS[env]} steps per episode", xscale="log",
                 ylim=(0, 1.05 * LIMITS[env]), ylabel="steps per episode")
        axes.grid(color="0.9")
        for name in runs:
            if PROGRAMS[name].env == env:
                draw_program(axes, name, [run.history for run in runs[name] if run])
    panels[-1].set_xlabel("environment steps of all workers together")
    figure.suptitle("The best worker's mean of its last ten episodes: median of the runs,\n"
                    "shaded from the worst run to the best. Dot: the median has learned.",
                    fontsize="medium")
    figure.savefig(path)


def draw_program(axes, name, histories):
    """Draw the median of a program's runs, and the range between the worst and the best of them."""
    histories = [h for h in histories if any(int(e["episode"]) >= 10 for e in h)]
    if not histories:
        return
    _, env, colour, line = PROGRAMS[name]
    steps = np.array(sorted({int(e["total_steps"]) for history in histories for e in history}))
    means = np.array([best_mean(history, steps) for history in histories])      # (runs, steps)
    median = np.median(means, axis=0)                   # NaN until every run has a mean
    learned = np.flatnonzero(median > LIMITS[env] - 1)
    axes.plot(steps, median, line, color=colour, label=name, drawstyle="steps-post",
              marker="o", markevery=learned[:1].tolist())
    axes.fill_between(steps, means.min(axis=0), means.max(axis=0), step="post",
                      color=colour, alpha=.12, linewidth=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, .5), frameon=False, handlelength=3)


def best_mean(history, steps):
    """Find the best worker's mean of its last ten episodes, after each number in `steps` (N,).

    The main file's rule looks at this mean: learning ends when one worker's is high enough. `steps`
    are environment steps of all workers together. A worker counts from its tenth episode, because
    before that its mean still contains zeros. Where there is no such worker yet, the result is NaN.
    After the last episode it stays as it was.
    """
    latest = {}             # of each worker: its mean
    changes = []            # when the best mean may have changed, in steps
    best = [np.nan]         # the best mean before the first change, after it, after the second, …
    for e in sorted(history, key=lambda e: int(e["total_steps"])):
        if int(e["episode"]) >= 10:
            latest[e["thread"]] = float(e["mean_of_last_10"])
            changes.append(int(e["total_steps"]))
            best.append(max(latest.values()))
    passed = np.searchsorted(changes, steps, side="right")
    return np.array(best)[passed]


# == Options, signals ==============================================================================

def read_options(argv):
    """Read the command line. `names` in the result are the programs to run."""
    parser = argparse.ArgumentParser(
        description="Run the programs of this project, and compare what came of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each program")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=DEFAULT, metavar="NAME",
                        help=f"run only these, of {', '.join(PROGRAMS)}")
    parser.add_argument("--peers", action="store_true",
                        help=f"run Stable-Baselines3 as well: {', '.join(PEERS)}")
    parser.add_argument("--time-limit", type=int, default=300, metavar="SECONDS",
                        help="a run that takes longer is ended, and has failed")
    parser.add_argument("--out", type=Path, default=Path("movie/comparison"),
                        help="where the files go")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error("argument --runs: must be at least 1")
    wanted = args.only + PEERS if args.peers else args.only
    args.names = [name for name in PROGRAMS if name in wanted]
    if set(args.names) & set(PEERS) and importlib.util.find_spec("stable_baselines3") is None:
        parser.error("Stable-Baselines3 is not installed. Install it by: python -m pip install"
                     " stable-baselines3")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"argument --out: cannot write there: {error}")
    return args


# Ctrl-C, kill, and the closing of the terminal, which Windows does not have.
SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}


def interrupt(*_):
    """End `main` by KeyboardInterrupt. A second signal must not interrupt the end."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def run_program():
    """Call `main` and end with the exit status it returns; with 130 after one of the signals."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:      # as it is after `nohup`
            signal.signal(number, interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_program()
