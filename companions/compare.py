"""Five ways to balance a pole, side by side: runs each of them, draws one picture and one table.

`python -m companions.compare` runs the main file and its four companions as a user would, with
each of some seeds, and writes comparison.png and comparison.csv. `--peers` adds A2C, PPO and DQN
of Stable-Baselines3. What to look at: `curve`, what the picture shows of a run; `table`.
"""
import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # to run it by its path too
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

import a3c_cartpole as base
from companions import peers

# file: the name that a reader knows, the limit of its environment in steps, colour, line;
# the colours are Okabe and Ito's, which a colour-blind reader can tell apart
PROGRAMS = {
    "a3c_cartpole": ("A3C, threads", 200, "#0072B2", "-"),
    "companions/ppo_cartpole": ("PPO", 200, "#009E73", "-"),
    "companions/dqn_cartpole": ("DQN", 500, "#D55E00", "-"),
    "companions/a3c_two_networks": ("A3C, two networks", 200, "#CC79A7", "-"),
    "companions/a3c_processes": ("A3C, processes", 200, "#E69F00", "-")}
PEERS = {
    "A2C": ("A2C, Stable-Baselines3", 200, "#56B4E9", "--"),
    "PPO": ("PPO, Stable-Baselines3", 200, "#000000", "--"),
    "DQN": ("DQN, Stable-Baselines3", 500, "#999999", "--")}
COLUMNS = ["program", "learned", "cold start s", "steps", "episodes", "steps/s", "test mean",
           "lines of code", "failed"]


def parse_arguments(argv):
    """Read the options; a bad one: one line, exit status 2."""
    parser = argparse.ArgumentParser(
        description="Run the five programs, and compare what came of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = base.refuse
    names = [Path(file).name for file in PROGRAMS]
    parser.add_argument("--seeds", type=base.from_1, default=5, metavar="N", help="seeds 1 to N")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME",
                        help="run these alone")
    parser.add_argument("--out", type=Path, default=Path("movie/comparison"), metavar="DIR",
                        help="where files go")
    parser.add_argument("--peers", action="store_true", help="run Stable-Baselines3, too")
    args = parser.parse_args(argv)
    if args.peers and not peers.are_installed():
        base.refuse(peers.INSTALL)
    return args


def main(argv=None):
    """Run, draw, print; return 0 if no run failed. One that did not learn has not failed."""
    args = parse_arguments(argv)
    files = [file for file in PROGRAMS if Path(file).name in args.only]
    runs, failed = {file: [] for file in files + list(PEERS if args.peers else ())}, {}
    run = base.Run(args.out)
    try:
        run_all(runs, failed, args.seeds, args.out.resolve())
    finally:
        with run.uninterrupted():
            rows = table(runs, failed)
            with run.attempt("comparison.csv"):
                write_csv(rows, args.out / "comparison.csv")
            with run.attempt("comparison.png"):
                draw(runs, args.out / "comparison.png")
            show(rows)
    return 1 if failed or run.lost else 0


def run_all(runs, failed, seeds, folder):
    """Fill `runs`, {file: a dict of figures for each run}, and `failed`, {file: why}.

    In turns, so that a noisy minute touches all alike; who has failed has no further turn.
    """
    console = Console(stderr=True)
    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=seeds * len(runs))
        for seed in range(1, seeds + 1):
            for file in runs:
                progress.update(task, description=f"{Path(file).name}, seed {seed}")
                if file not in failed:
                    try:
                        runs[file].append(run_once(file, seed, folder / Path(file).name))
                    except Exception as error:
                        failed[file] = " ".join(f"seed {seed}: {error}".split())[:300]
                        console.print(f"{file} failed, {failed[file]}", markup=False,
                                      highlight=False, soft_wrap=True)
                progress.advance(task)


def run_once(file, seed, folder):
    """Run a program to its end; return its figures and, as "history", its Episodes."""
    folder = folder / f"seed{seed}"
    history = folder / "history.csv"
    history.unlink(missing_ok=True)     # of an earlier run
    figures = peers.cold_start(peers.command(file, seed, folder))
    return {**figures, "history": read_history(history)}


def read_history(path):
    """Read a history.csv into Episodes; a last line that is cut off does not count."""
    _, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    rows = csv.reader(line for line in lines if line.endswith("\n"))
    return [base.Episode(thread, int(episode), int(steps), float(mean), int(total), float(seconds))
            for thread, episode, steps, mean, total, seconds in rows]


def curve(history, limit, steps):
    """Share of the limit reached after so many `steps` (N,) of all workers → (N,).

    It is the mean of the last ten episodes of the worker that is best just then, at which the
    stop rule looks. Before the first episode ends it is 0; after the last one it stays as it was.
    """
    latest, best = {}, [0]
    for e in history:
        latest[e.thread] = e.mean_of_last_10
        best.append(max(latest.values()) / limit)
    ended = np.searchsorted([e.total_steps for e in history], steps, side="right")
    return np.array(best)[ended]


def draw(runs, path):
    """Draw a line a program, the median of its seeds, in the shade of their range."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(8, 5), dpi=200, layout="constrained").add_subplot()
    for file, some in runs.items():
        histories = [run["history"] for run in some if run["history"]]
        if not histories:
            continue
        label, limit, colour, line = {**PROGRAMS, **PEERS}[file]
        first = min(history[0].total_steps for history in histories)
        last = max(history[-1].total_steps for history in histories)
        steps = np.geomspace(first, last, 400).round()
        shares = [curve(history, limit, steps) for history in histories]
        axes.fill_between(steps, np.min(shares, axis=0), np.max(shares, axis=0), color=colour,
                          alpha=.12, linewidth=0)
        axes.plot(steps, np.median(shares, axis=0), line, color=colour, marker="o",
                  markevery=[-1], label=f"{label} (limit {limit})")
    axes.set(xscale="log", xlim=(100, None), xlabel="steps of the environment, of all workers",
             ylim=(0, 1.02), ylabel="share of the limit that the pole stands")
    axes.set_title("Mean of the best worker's last ten episodes: median of the seeds, and range")
    if axes.lines:
        axes.legend(loc="upper left")
    axes.figure.savefig(path)


def lines_of_code(file):
    """Lines of a program that are neither blank nor a comment; a library's are not counted."""
    if file in PEERS:
        return None
    lines = map(str.strip, (peers.ROOT / f"{file}.py").read_text(encoding="utf-8").splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def table(runs, failed):
    """Rows under COLUMNS, medians; runs that did not learn have one of their own."""
    rows = []
    for file, some in runs.items():
        name = Path(file).name
        learned = sum(run["learned"] for run in some)
        outcomes = peers.by_outcome(name, some) or ({name: []} if file in failed else {})
        for title, alike in outcomes.items():
            figures = [median(alike, figure) for figure in COLUMNS[2:7]]
            count = None if learned and title != name else f"{learned} of {len(some)}"  # said above
            rows.append([title, count, *figures, lines_of_code(file), failed.get(file)])
    return rows


def median(some, figure):
    """Median of a figure over the runs that have it; None if none has."""
    values = [run[figure] for run in some if figure in run]
    return round(float(np.median(values)), 1) if values else None


def write_csv(rows, path):
    """Write the table; what there is not stays empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def show(rows):
    """Print the table, at the end why a program failed."""
    console = Console()
    console.width = max(120, console.width)
    shown = COLUMNS if any(row[-1] for row in rows) else COLUMNS[:-1]
    table = Table(*[Column(name, no_wrap=name != "failed") for name in shown], box=None)
    for row in rows:
        cells = ["-" if cell is None else f"{cell:.9g}" if isinstance(cell, float) else str(cell)
                 for cell in row]
        table.add_row(*cells[:len(shown)])
    console.print(table, markup=False)


if __name__ == "__main__":
    sys.exit(main())
