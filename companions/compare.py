"""Compare the programs of this project: run each of them, and make one table and one picture.

This tool runs the main file and its five companions as a user would, each in a process of its own,
once for every seed. For each program the table says how often it learned, how long that took, and
how well the learned policy did in the test. The picture shows how the policies became better.

    python -m companions.compare                    # seeds 1 to 5; table and picture are then in
                                                    # movie/comparison
    python -m companions.compare --seeds 1 --only a3c_cartpole a3c_processes
    python -m companions.compare --peers            # runs Stable-Baselines3 as well

To understand                    read
in which order programs run      run_all
how the time is measured         run_once, which looks for the line that begins with "learned in"
the figures of the table         make_row
the curves of the picture        best_mean, then draw_program
Stable-Baselines3's side         learn_peer and StopRule

DQN plays CartPole-v1, where an episode may last 500 steps. All others play CartPole-v0, with at
most 200 steps. So DQN has a place of its own in the table and in the picture.

This file does not import the main file. Stable-Baselines3 is started from here, and it would have
to wait until TensorFlow is imported.
"""
import argparse
import collections
import csv
import importlib.util
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

# How many steps an episode may last.
LIMITS = {"CartPole-v0": 200, "CartPole-v1": 500}

# A row of history.csv. Its columns are those of the main file's Episode, which a test compares.
Episode = collections.namedtuple(
    "Episode", "thread episode steps mean_of_last_10 total_steps seconds")

# What is known of a program. `label`, `colour` and `line` are for the picture. The colours are
# Okabe and Ito's, which colour-blind readers can tell apart.
Program = collections.namedtuple("Program", "path env label colour line")

PROGRAMS = {
    "a3c_cartpole": Program(
        "a3c_cartpole.py", "CartPole-v0", "A3C, threads", "#0072B2", "-"),
    "a3c_two_networks": Program(
        "companions/a3c_two_networks.py", "CartPole-v0", "A3C, two networks", "#CC79A7", "-"),
    "a3c_processes": Program(
        "companions/a3c_processes.py", "CartPole-v0", "A3C, processes", "#D55E00", "-"),
    "a3c_ray": Program(
        "companions/a3c_ray.py", "CartPole-v0", "A3C, Ray", "#E69F00", "-"),
    "ppo_cartpole": Program(
        "companions/ppo_cartpole.py", "CartPole-v0", "PPO", "#009E73", "-"),
    "dqn_cartpole": Program(
        "companions/dqn_cartpole.py", "CartPole-v1", "DQN", "#000000", "-"),
}

# Stable-Baselines3's algorithms have the colour of the same algorithm above, and dashed lines.
PEERS = {
    "sb3_a2c": Program(None, "CartPole-v0", "A2C of Stable-\nBaselines3", "#56B4E9", "--"),
    "sb3_ppo": Program(None, "CartPole-v0", "PPO of Stable-\nBaselines3", "#009E73", "--"),
    "sb3_dqn": Program(None, "CartPole-v1", "DQN of Stable-\nBaselines3", "#000000", "--"),
}

# What a run did. `cold_start` is in seconds, `speed` in steps per second, `history` is a list of
# Episodes. A run that did not learn plays no test, so its `test_mean` is None.
Run = collections.namedtuple(
    "Run", "learned cold_start steps episodes speed test_mean history")

# The two lines that every program prints, see `keep` and `play` in the main file. If a thread or a
# process has failed, the first one contains other words, and does not match.
SUMMARY = re.compile(r"(not )?learned in [\d.]+ s: (\d+) steps, (\d+) episodes, \d+ workers,"
                     r" (\d+) steps/s")
TEST = re.compile(r"test: mean of \d+ episodes ([\d.]+) steps")

COLUMNS = ["program", "environment", "learned", "cold start s", "steps", "episodes", "steps/s",
           "test mean"]
CAPTION = ("Medians of the runs that learned. Cold start: from the start of the process to its line"
           " \"learned in\".")


def main(argv=None):
    """Run the programs, then make the table and the picture. Return the exit status."""
    args = read_options(argv)
    runs = {name: [] for name in args.names}
    failures = collections.Counter()        # of each program: how many of its runs have failed
    try:
        run_all(runs, failures, args.seeds, args.out)
    finally:
        # After Ctrl-C, too: from the runs that there are.
        rows = [make_row(name, runs[name], failures[name]) for name in args.names
                if runs[name] or failures[name]]
        rows.sort(key=lambda row: row["environment"])
        write_csv(rows, args.out / "comparison.csv")
        print_table(rows)
        draw(runs, args.out / "comparison.png")
        print(f"table and picture are in {args.out}", flush=True)
    if failures:
        return 1
    return 0


# == Running the programs ==========================================================================

def run_all(runs, failures, seeds, out):
    """Run every program with every seed. Fill `runs`, {name: a list of Runs}, and `failures`.

    All programs run with the first seed, then all with the second one, and so on. If the machine is
    busy with something else for a minute, this disturbs all programs about equally.
    """
    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}")]
    console = Console(stderr=True)
    # The bar is drawn only twice in a second. Drawing takes time from the program that runs.
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        task = progress.add_task("", total=seeds * len(runs))
        for seed in range(1, seeds + 1):
            for name in runs:
                progress.update(task, description=f"{name}, seed {seed}")
                try:
                    run = run_once(name, seed, out / name / f"seed{seed}")
                    runs[name].append(run)
                except (RuntimeError, OSError) as error:
                    failures[name] += 1
                    console.print(f"{name}, seed {seed}: {error}",
                                  markup=False, highlight=False, soft_wrap=True)
                progress.advance(task)


def run_once(name, seed, folder):
    """Run a program to its end and return its Run. Raise RuntimeError if it failed.

    To have tried and not learned is no failure. The clock starts before the process does, and stops
    when the program says that it has learned. So it includes all imports and what is compiled, but
    not the pictures, the test and the films that come afterwards.
    """
    summary = None
    test_mean = None
    # A file, because a program that writes much to a pipe would wait until somebody reads it.
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        started = time.perf_counter()
        # Ctrl-C in a terminal would reach the program, too. In a session of its own it hears of it
        # only from the lines below, and so only once.
        process = subprocess.Popen(make_command(name, seed, folder), cwd=ROOT, text=True,
                                   errors="replace", stdout=subprocess.PIPE, stderr=stderr,
                                   start_new_session=True)
        try:
            for line in process.stdout:
                if match := SUMMARY.match(line):
                    summary = match
                    cold_start = time.perf_counter() - started
                if match := TEST.match(line):
                    test_mean = float(match[1])
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            process.stdout.close()
        stderr.seek(0)
        lines = [line.strip() for line in stderr if line.strip()]

    learned = summary is not None and summary[1] is None
    expected_status = 0 if learned else 1
    if summary is None or status != expected_status:
        last_line = lines[-1] if lines else "it wrote nothing to stderr"
        raise RuntimeError(f"failed with status {status}: {last_line}")
    return Run(learned, cold_start, int(summary[2]), int(summary[3]), int(summary[4]), test_mean,
               read_history(folder / "history.csv"))


def make_command(name, seed, folder):
    """Make the command that runs a program with a seed, so that its files go to a folder."""
    if name in PEERS:
        call = f"compare.learn_peer({name!r}, {seed}, {str(folder)!r})"
        return [sys.executable, "-c", f"from companions import compare; {call}"]
    command = [sys.executable, str(ROOT / PROGRAMS[name].path), "--no-render", "--log",
               "--out", str(folder)]
    # With Ray, a seed does not make a run repeatable.
    if name != "a3c_ray":
        command += ["--seed", str(seed)]
    return command


def read_history(path):
    """Read a history.csv into a list of Episodes."""
    with open(path, newline="") as file:
        return [Episode(row["thread"], int(row["episode"]), int(row["steps"]),
                        float(row["mean_of_last_10"]), int(row["total_steps"]),
                        float(row["seconds"]))
                for row in csv.DictReader(file)]


# == The table =====================================================================================

def make_row(name, runs, failed):
    """Make a row of the table, {column: value}. Runs that failed have not learned, either."""
    learned = [run for run in runs if run.learned]
    row = {"program": name,
           "environment": {**PROGRAMS, **PEERS}[name].env,
           "learned": f"{len(learned)} of {len(runs) + failed}"}
    if learned:
        row["cold start s"] = round(statistics.median(run.cold_start for run in learned), 1)
        row["steps"] = round(statistics.median(run.steps for run in learned))
        row["episodes"] = round(statistics.median(run.episodes for run in learned))
        row["steps/s"] = round(statistics.median(run.speed for run in learned))
    tests = [run.test_mean for run in learned if run.test_mean is not None]
    if tests:
        row["test mean"] = round(statistics.median(tests), 1)
    return row


def write_csv(rows, path):
    """Write the table to a file. Cells without a value stay empty."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows):
    """Print the table, with a line between the two environments."""
    table = Table(caption=CAPTION, caption_justify="left")
    for column in COLUMNS:
        is_text = column in ("program", "environment", "learned")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    previous = None
    for row in rows:
        if previous not in (None, row["environment"]):
            table.add_section()
        previous = row["environment"]
        table.add_row(*[str(row.get(column, "-")) for column in COLUMNS])
    console = Console()
    console.width = max(110, console.width)     # into a file, rich would write only 80 columns
    console.print(table, markup=False, highlight=False)


# == The picture ===================================================================================

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
    for e in sorted(history, key=lambda e: e.total_steps):
        if e.episode >= 10:
            latest[e.thread] = e.mean_of_last_10
            changes.append(e.total_steps)
            best.append(max(latest.values()))
    passed = np.searchsorted(changes, steps, side="right")
    return np.array(best)[passed]


def draw(runs, path):
    """Draw the curves of all programs, with one panel for each environment."""
    from matplotlib.figure import Figure  # here, because it takes half a second
    programs = {**PROGRAMS, **PEERS}
    histories = {}          # of each program: those of its runs that have a curve
    for name, some in runs.items():
        long_enough = [run.history for run in some if any(e.episode >= 10 for e in run.history)]
        if long_enough:
            histories[name] = long_enough

    envs = sorted({programs[name].env for name in histories})
    figure = Figure(figsize=(8, 1 + 3 * max(1, len(envs))), dpi=100, layout="constrained")
    if not envs:
        figure.text(.5, .5, "No run has played ten episodes.", ha="center")
    else:
        panels = figure.subplots(len(envs), sharex=True, squeeze=False)[:, 0]
        for env, axes in zip(envs, panels):
            for name in histories:
                if programs[name].env == env:
                    draw_program(axes, programs[name], histories[name])
            axes.set(title=f"{env}: at most {LIMITS[env]} steps per episode", xscale="log",
                     ylim=(0, 1.05), ylabel=f"fraction of {LIMITS[env]} steps")
            axes.grid(color="0.9")
            axes.legend(loc="center left", bbox_to_anchor=(1, .5), frameon=False)
        panels[-1].set_xlabel("environment steps of all workers together")
        figure.suptitle("The best worker's mean of its last ten episodes: median of the runs,\n"
                        "shaded from the worst run to the best. Dot: the median has learned.",
                        fontsize="medium")
    figure.savefig(path)


def draw_program(axes, program, histories):
    """Draw the median of a program's runs, and the range between the worst and the best of them.

    The curve ends where the median meets the rule, or with the longest run if it never does.
    """
    limit = LIMITS[program.env]
    steps = np.array(sorted({e.total_steps for history in histories for e in history}))
    means = np.array([best_mean(history, steps) for history in histories])      # (runs, steps)
    fractions = means / limit
    median = np.median(fractions, axis=0)       # NaN until every run has a mean

    learned = np.flatnonzero(median > (limit - 1) / limit)
    if len(learned):
        end = learned[0] + 1
        axes.plot(steps[end - 1], median[end - 1], "o", color=program.colour)
    else:
        end = len(steps)
    axes.plot(steps[:end], median[:end], program.line, color=program.colour, label=program.label,
              drawstyle="steps-post")
    axes.fill_between(steps[:end], fractions.min(axis=0)[:end], fractions.max(axis=0)[:end],
                      step="post", color=program.colour, alpha=.12, linewidth=0)


# == Stable-Baselines3 =============================================================================

# Environment, number of environments side by side, the most steps, and constants of the algorithm:
# those of RL Zoo, https://github.com/DLR-RM/rl-baselines3-zoo (hyperparams/a2c.yml, ppo.yml and
# dqn.yml). They were found for CartPole-v1. `left` is the fraction of the steps that is still to
# come, by which RL Zoo lets two of PPO's constants fall.
ZOO = {
    "sb3_a2c": ("A2C", 8, 500_000, dict(ent_coef=0.)),
    "sb3_ppo": ("PPO", 8, 100_000, dict(
        n_steps=32, batch_size=256, n_epochs=20, gamma=.98, gae_lambda=.8, ent_coef=0.,
        learning_rate=lambda left: left * 1e-3, clip_range=lambda left: left * .2)),
    "sb3_dqn": ("DQN", 1, 50_000, dict(
        learning_rate=2.3e-3, batch_size=64, buffer_size=100_000, learning_starts=1000, gamma=.99,
        target_update_interval=10, train_freq=256, gradient_steps=128, exploration_fraction=.16,
        exploration_final_eps=.04, policy_kwargs=dict(net_arch=[256, 256]))),
}


class StopRule:
    """Ends Stable-Baselines3's learning by the main file's rule, and records the episodes."""

    def __init__(self, limit):
        self.limit = limit
        self.learned = False
        self.history = []
        self.episodes = collections.Counter()       # of each environment
        self.last_steps = collections.defaultdict(lambda: collections.deque([0] * 10, maxlen=10))
        self.started = time.perf_counter()

    def __call__(self, local_variables, _):
        """Look at a step of all environments. Return False to end learning.

        Stable-Baselines3 calls this after each step, with the local variables of its own loop.
        """
        total_steps = local_variables["self"].num_timesteps
        for i, info in enumerate(local_variables["infos"]):
            if "episode" not in info:       # the episode goes on
                continue
            steps = info["episode"]["l"]
            self.episodes[i] += 1
            self.last_steps[i].append(steps)
            mean = sum(self.last_steps[i]) / 10
            seconds = round(time.perf_counter() - self.started, 3)
            self.history.append(
                Episode(f"env{i + 1}", self.episodes[i], steps, mean, total_steps, seconds))
            if mean > self.limit - 1:
                self.learned = True
        return not self.learned


def learn_peer(name, seed, folder):
    """Let an algorithm of Stable-Baselines3 learn, and test it, as one of our programs would.

    It prints the same lines, writes the same history.csv, and ends with the same exit status.
    """
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    torch.set_num_threads(1)        # networks this small are no faster with more threads
    env = PEERS[name].env
    algorithm, n_envs, max_steps, constants = ZOO[name]
    rule = StopRule(LIMITS[env])
    model = getattr(stable_baselines3, algorithm)(
        "MlpPolicy", make_vec_env(env, n_envs, seed), seed=seed, device="cpu", **constants)
    model.learn(max_steps, callback=rule)
    seconds = time.perf_counter() - rule.started

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "history.csv", "w", newline="") as file:
        csv.writer(file).writerows([Episode._fields, *rule.history])
    outcome = "learned" if rule.learned else "not learned"
    steps = model.num_timesteps
    print(f"{outcome} in {seconds:.1f} s: {steps} steps, {len(rule.history)} episodes,"
          f" {n_envs} workers, {steps / seconds:.0f} steps/s", flush=True)
    if not rule.learned:
        sys.exit(1)
    mean, _ = evaluate_policy(model, make_vec_env(env, 1, seed + 1), 10, warn=False)
    print(f"test: mean of 10 episodes {mean:.1f} steps")


# == Options =======================================================================================

def read_options(argv):
    """Read the command line. `names` in the result are the programs to run."""
    parser = argparse.ArgumentParser(
        description="Run the programs of this project, and compare what came of it.")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N",
                        help="run each program with the seeds 1 to N (default: 5)")
    parser.add_argument("--only", nargs="+", choices=[*PROGRAMS, *PEERS], metavar="NAME",
                        help=f"run only these: {', '.join([*PROGRAMS, *PEERS])}")
    parser.add_argument("--peers", action="store_true",
                        help="run A2C, PPO and DQN of Stable-Baselines3 as well")
    parser.add_argument("--out", type=Path, default=Path("movie/comparison"), metavar="DIR",
                        help="where the files go (default: movie/comparison)")
    args = parser.parse_args(argv)

    names = list(args.only or PROGRAMS)
    if args.peers:
        names += PEERS
    args.names = list(dict.fromkeys(names))         # each of them once
    if any(name in PEERS for name in args.names) and not is_installed("stable_baselines3"):
        parser.error("Stable-Baselines3 is not installed. Install it by: python -m pip install"
                     " stable-baselines3")
    if "a3c_ray" in args.names and not is_installed("ray"):
        print("a3c_ray is left out, because Ray is not installed. Install it by: python -m pip"
              " install 'ray>=2.50,<3'", file=sys.stderr)
        args.names.remove("a3c_ray")
    args.out = args.out.resolve()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"argument --out: cannot write there: {error}")
    return args


def positive(text):
    """Read an option that is a whole number and not 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def is_installed(package):
    """Find out whether a package could be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def run_program():
    """Call `main` and end with the exit status it returns: after Ctrl-C 130, after SIGTERM 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run_program()
