"""How fast the program is on this machine, and where the time goes.

    python tests/benchmark.py              a few minutes: cold starts, speeds, set-up, memory
    python tests/benchmark.py --peers      beside Stable-Baselines3's A2C and PPO, if installed
    python tests/benchmark.py --json FILE  all figures, to keep

It measures and asserts nothing. All speeds are environment steps in a second of wall-clock time.
Nothing here imports TensorFlow but the processes that it starts: a process counts its peak memory
from what its parent held when it began.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gymnasium as gym  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from companions import peers  # noqa: E402

PROGRAM = "this program"
COLD_START = ["cold start s", "learning s", "steps", "episodes", "steps/s", "test mean", "peak MB"]
PACKAGES = ["tensorflow", "tensorflow-cpu", "keras", "gymnasium", "numpy", "stable-baselines3",
            "torch"]  # fmt: skip


def spread(runs):
    """Median, least and greatest of each figure over some runs, {figure: value} each."""
    figures = {}
    for name in {name: None for run in runs for name in run if name != "learned"}:
        values = [run[name] for run in runs if name in run]
        figures[name] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
    return figures


def bare_environment(steps):
    """Steps a second of CartPole alone, reset as it ends: the limit for one thread."""
    env = gym.make("CartPole-v1", disable_env_checker=True)
    env.reset(seed=0)
    started = time.perf_counter()
    for i in range(steps):
        _, _, terminated, truncated, _ = env.step(i & 1)
        if terminated or truncated:
            env.reset()
    return {"steps/s": steps / (time.perf_counter() - started)}


def apart(function, *arguments):
    """Call a function of this file in a Python of its own, so that TensorFlow starts anew there."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def learning(workers, steps, parts=False):
    """Set-up, in seconds, and speed of a whole run of the program that ends after so many steps.

    "set-up s": from the end of the imports to workers that are ready for their first step.
    `parts`, for one worker: also how many µs of a step go where, as "environment", "acting", …
    """
    import a3c_cartpole as a3c

    figures, spent, learn, started = {}, {}, a3c.learn, time.perf_counter()

    def learn_without_end(server, threads, run):
        figures["set-up s"] = time.perf_counter() - started
        end_after(server, steps)
        if parts:
            time_parts(threads[0].environment, spent)
        learn(server, threads, run)
        figures["updates"] = server.updates

    said = io.StringIO()
    with (
        mock.patch.object(a3c, "learn", learn_without_end),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(said),
    ):
        options = f"--workers {workers} --seed 1 --log --no-render".split()
        a3c.main([*options, "--out", folder])
    line = next(filter(peers.SUMMARY.match, said.getvalue().splitlines()))
    if "failed" in line:
        raise RuntimeError(line)
    *_, frames, _, speed = peers.SUMMARY.match(line).groups()
    figures["steps/s"] = float(speed)
    figures["updates/s"] = figures.pop("updates") / int(frames) * float(speed)
    if parts:
        figures |= {part: seconds / int(frames) * 1e6 for part, seconds in spent.items()}
        figures["the rest"] = 1e6 / float(speed) - sum(spent.values()) / int(frames) * 1e6
    return figures


def end_after(server, steps):
    """Let learning end after so many steps, and not because a worker has learned."""

    def finish_episode(*_):
        if server.frames >= steps:
            server.stop.set()
        return False

    server.finish_episode = finish_episode


def time_parts(environment, spent):
    """Let the parts of an environment's step add up the seconds that they take in `spent`."""
    agent = environment.agent
    for owner, name, part in (
        (environment.env, "step", "environment"),
        (environment.env, "reset", "environment"),
        (agent, "act", "acting"),
        (agent.brain, "update_parameter_server", "update"),
    ):

        def timed(*arguments, method, part, **keywords):
            started = time.perf_counter()
            result = method(*arguments, **keywords)
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - started
            return result

        method = getattr(owner, name)
        setattr(owner, name, functools.partial(timed, method=method, part=part))


def plan(args, folder):
    """All that is to be measured: which table, which row, and what returns {figure: value}.

    In turns, so that a noisy minute touches all alike.
    """
    names = {PROGRAM: "a3c_cartpole", **({"A2C": "A2C", "PPO": "PPO"} if args.peers else {})}
    for seed in range(1, args.seeds + 1):
        for row, name in names.items():
            command = peers.command(name, seed, folder)
            yield "cold start", row, functools.partial(peers.cold_start, command)
    for _ in range(args.repeats):
        yield "speed", "bare env.step", functools.partial(bare_environment, args.steps)
        for n in args.workers:
            yield "speed", str(n), functools.partial(apart, learning, n, args.steps)
        yield "µs a step", "1", functools.partial(apart, learning, 1, args.steps, True)


def measure(args):
    """Carry out the plan with a progress bar; return the figures of each run by table and row."""
    taken = {"cold start": {}, "speed": {}, "µs a step": {}}
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        jobs = list(plan(args, folder))
        task = progress.add_task("", total=len(jobs))
        for table, row, function in jobs:
            progress.update(task, description=f"{table}: {row}")
            taken[table].setdefault(row, []).append(function())
            progress.advance(task)
    return taken


def combine(taken):
    """Spread of each figure by table and row; runs that did not learn have rows of their own."""
    figures = {table: {row: spread(runs) for row, runs in rows.items()}
               for table, rows in taken.items() if table != "cold start"}  # fmt: skip
    figures["cold start"] = {
        title: {"learned": f"{sum(run['learned'] for run in runs)} of {len(runs)}", **spread(alike)}
        for row, runs in taken["cold start"].items()
        for title, alike in peers.by_outcome(row, runs).items()
    }
    return figures


def machine():
    """The machine and the versions, in general words."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        **versions,
    }


def text(figures, name):
    """A figure's median (least to greatest), with so many digits as tell."""
    if name not in figures:
        return "-"
    values = [figures[name][key] for key in ("median", "min", "max")]
    digits = 0 if values[0] >= 1000 else 1 if values[0] >= 3 else 2
    return "{} ({} to {})".format(*[f"{value:.{digits}f}" for value in values])


def show(title, columns, rows):
    """Print a table: for each row its name, and its figures of these columns."""
    table = Table("", *columns, title=title, title_justify="left")
    for row, figures in rows.items():
        table.add_row(row, *[figures[name] if name == "learned" else text(figures, name)
                             for name in columns])  # fmt: skip
    console = Console()
    console.width = max(160, console.width)
    console.print(table)


def main(argv=None):
    """Measure, print, and write the figures if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for option, default, what in (
        ("--seeds", 5, "cold starts, seeds 1 to N"),
        ("--steps", 40_000, "steps of each speed"),
        ("--repeats", 3, "times each speed is taken"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=what)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N",
                        help="numbers of workers to measure")  # fmt: skip
    parser.add_argument("--peers", action="store_true", help="run Stable-Baselines3 beside it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    if args.peers and not peers.are_installed():
        print(peers.INSTALL, file=sys.stderr)
        return 2
    figures = {"machine": machine(), **combine(measure(args))}
    print(", ".join(f"{key} {value}" for key, value in figures["machine"].items()))
    show("By workers", ["steps/s", "updates/s", "set-up s"], figures["speed"])
    parts = ["environment", "acting", "update", "the rest"]
    show("One step of one worker, in µs", parts, figures["µs a step"])
    show("Cold start to learned", ["learned", *COLD_START], figures["cold start"])
    if args.json:
        words = json.dumps(figures, indent=1, ensure_ascii=False)
        args.json.write_text(words + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
