"""How fast the program is on this machine, and where the time goes.

    python tests/benchmark.py              a few minutes: speeds, set-up, memory, cold starts
    python tests/benchmark.py --peers      beside Stable-Baselines3's A2C and PPO, if installed
    python tests/benchmark.py --json FILE  all figures, to keep

It measures and asserts nothing. All speeds are environment steps in a second of wall-clock time.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PEER = r'''
import sys, time, warnings
warnings.simplefilter("ignore")
import collections
import numpy as np
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

class StopRule(BaseCallback):
    """One environment's last ten episodes average above 199 steps, as in a3c_cartpole.py."""
    def _on_training_start(self):
        self.last = collections.defaultdict(lambda: collections.deque([0] * 10, 10))
        self.episodes, self.learned = 0, False
    def _on_step(self):
        for i, info in enumerate(self.locals["infos"]):
            if "episode" in info:
                self.episodes += 1
                self.last[i].append(info["episode"]["l"])
                self.learned = self.learned or np.mean(self.last[i]) > 199
        return not self.learned

name, seed = sys.argv[1], int(sys.argv[2])
# RL Zoo's constants for CartPole
options, limit = {
    "A2C": (dict(ent_coef=0.), 5e5),
    "PPO": (dict(n_steps=32, batch_size=256, gae_lambda=.8, gamma=.98, n_epochs=20, ent_coef=0.,
                 learning_rate=lambda left: left * 1e-3,
                 clip_range=lambda left: left * .2), 1e5)}[name]
envs = make_vec_env("CartPole-v0", n_envs=8, seed=seed)
model = dict(A2C=A2C, PPO=PPO)[name]("MlpPolicy", envs, seed=seed, device="cpu", **options)
rule, started = StopRule(), time.perf_counter()
model.learn(int(limit), callback=rule)
seconds = time.perf_counter() - started
said = "learned" if rule.learned else "not learned"
print(f"{said} in {seconds:.1f} s: {model.num_timesteps} steps, {rule.episodes} episodes, "
      "8 workers, "
      f"{model.num_timesteps / seconds:.0f} steps/s", flush=True)
mean, _ = evaluate_policy(model, make_vec_env("CartPole-v0", seed=seed + 1), 10, warn=False)
print(f"test: mean of 10 episodes {mean:.1f} steps")
'''
# A process counts its peak memory from what its parent held when it began: so a small parent.
LAUNCHER = """
import resource, subprocess, sys
subprocess.call(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""
SUMMARY = re.compile(
    r"(not )?learned.*?([\d.]+) s[:,] (\d+) steps, (\d+) episodes, \d+ workers, (\d+) steps/s"
)
TEST = re.compile(r"test: mean of \d+ episodes ([\d.]+) steps")


def spread(values):
    """Median, least and greatest of some figures."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def progress(done, total, what):
    """Show on stderr how far the benchmark is."""
    print(
        f"\r[{done}/{total}] {what:<60.60}",
        end="" if done < total else "\n",
        file=sys.stderr,
        flush=True,
    )


def bare_environment(steps):
    """Steps a second of CartPole alone, reset as it ends: the limit for one thread."""
    import a3c_cartpole as a3c

    env = a3c.gym.make(a3c.ENV, disable_env_checker=True)
    env.reset(seed=0)
    started = time.perf_counter()
    for i in range(steps):
        _, _, terminated, truncated, _ = env.step(i & 1)
        if terminated or truncated:
            env.reset()
    return steps / (time.perf_counter() - started)


def learning(workers, steps, seed=1):
    """Steps, and updates, a second of this many workers that learn for a number of steps."""
    import a3c_cartpole as a3c

    class Endless(a3c.ParameterServer):
        def finish_episode(self, *_):
            return False

    server = Endless(workers=workers, seed=seed)
    threads = [
        threading.Thread(target=a3c.WorkerThread(f"local_thread{i + 1}", "learning", server).run)
        for i in range(workers)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    while server.frames < steps and not server.failed:
        time.sleep(0.002)
    seconds, frames, updates = time.perf_counter() - started, server.frames, server.newest[0]
    server.stop.set()
    for thread in threads:
        thread.join()
    return {"steps/s": frames / seconds, "updates/s": updates / seconds}


def split(steps):
    """Microseconds of one step of one worker: environment, acting, update, and what is left."""
    import a3c_cartpole as a3c

    server = a3c.ParameterServer(workers=1, seed=1)
    server.finish_episode = lambda *_: False
    environment = a3c.Environment("local_thread1", "learning", server)
    agent, spent = environment.agent, {}

    def timed(owner, name, part):
        method = getattr(owner, name)

        def run(*arguments, **keywords):
            started = time.perf_counter()
            try:
                return method(*arguments, **keywords)
            finally:
                spent[part] = spent.get(part, 0.0) + time.perf_counter() - started

        setattr(owner, name, run)

    timed(environment.env, "step", "environment")
    timed(environment.env, "reset", "environment")
    timed(agent, "act", "acting")
    timed(agent.brain, "update_parameter_server", "update")
    timed(agent.brain, "pull_parameter_server", "update")
    started = time.perf_counter()
    while server.frames < steps:
        environment.run()
    total = time.perf_counter() - started
    spent["bookkeeping"] = total - sum(spent.values())
    return {part: seconds / server.frames * 1e6 for part, seconds in spent.items()}


def setup(workers):
    """Seconds from the end of the imports to workers that are ready for their first step."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import a3c_cartpole as a3c;"
        "t = time.perf_counter(); n = int(sys.argv[2]); server = a3c.ParameterServer(workers=n);"
        "[a3c.WorkerThread(f'local_thread{i}', 'learning', server) for i in range(n)];"
        "print(time.perf_counter() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(workers)],
        text=True,
        check=True,
        capture_output=True,
    )
    return float(done.stdout)


def cold_start(command):
    """Run a command until it says what it learned; then let it finish its test.

    Returns seconds from the start of the process to that line, the line's own figures, the test's
    mean, and the peak memory of the process in MB.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", LAUNCHER, *command] if os.name == "posix" else command,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    figures = {}
    for line in process.stdout:
        if match := SUMMARY.match(line):
            figures = {
                "cold start s": time.perf_counter() - started,
                "learned": not match[1],
                "learning s": float(match[2]),
                "steps": int(match[3]),
                "episodes": int(match[4]),
                "steps/s": float(match[5]),
            }
        if match := TEST.match(line):
            figures["test mean"] = float(match[1])
    errors = process.stderr.read()
    process.wait()
    if peak := re.search(r"^peak (\d+)$", errors, re.M):
        figures["peak MB"] = int(peak[1]) / (2**20 if sys.platform == "darwin" else 2**10)
    if "cold start s" not in figures:
        raise RuntimeError(f"{' '.join(command[:2])} said nothing of learning: {errors[-500:]}")
    return figures


def program(seed, folder, *more):
    """The command of one run of the program, its files put aside."""
    return [
        sys.executable,
        str(ROOT / "a3c_cartpole.py"),
        "--seed",
        str(seed),
        "--no-render",
        "--log",
        "--out",
        folder,
        *more,
    ]


def combine(runs):
    """Median, least and greatest of each figure over several runs; how many learned."""
    names = [name for name in runs[0] if name != "learned"]
    return {
        "runs": len(runs),
        "learned": sum(run["learned"] for run in runs),
        **{name: spread([run[name] for run in runs if name in run]) for name in names},
    }


def machine():
    """The machine and the versions, in general words."""
    packages = [
        name
        for name in (
            "tensorflow",
            "tensorflow-cpu",
            "keras",
            "gymnasium",
            "numpy",
            "stable-baselines3",
            "torch",
        )
        if importlib.util.find_spec(
            {"tensorflow-cpu": "tensorflow"}.get(name, name.replace("-", "_"))
        )
    ]
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        **versions,
    }


def show(title, rows):
    """Print a table with rich, its first row the heading."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*map(str, row))
    Console(width=max(120, Console().width)).print(title, table)


def text(figure, digits=0):
    """Median (least to greatest) in words."""
    return (
        f"{figure['median']:.{digits}f} ({figure['min']:.{digits}f} to {figure['max']:.{digits}f})"
    )


def main(argv=None):
    """Measure, print, and write the figures if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="cold starts, seeds 1 to N"
    )
    parser.add_argument(
        "--steps", type=int, default=40_000, metavar="N", help="steps of each speed"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="times each speed is taken"
    )
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        metavar="N",
        help="numbers of workers to measure",
    )
    parser.add_argument("--peers", action="store_true", help="run Stable-Baselines3 beside it")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    if args.peers and importlib.util.find_spec("stable_baselines3") is None:
        print(
            "--peers needs Stable-Baselines3: python -m pip install stable-baselines3",
            file=sys.stderr,
        )
        return 2
    peers = ["A2C", "PPO"] if args.peers else []
    total, done = args.repeats * (len(args.workers) + 2) + 2 + args.seeds * (1 + len(peers)), 0

    def measured(what, function, *arguments):
        nonlocal done
        progress(done, total, what)
        figure = function(*arguments)
        done += 1
        return figure

    figures = {"machine": machine(), "workers": {}, "cold start": {}}
    runs = {name: [] for name in ["this program", *peers]}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, args.seeds + 1):
            for name in runs:
                command = (
                    program(seed, folder)
                    if name == "this program"
                    else [sys.executable, "-c", PEER, name, str(seed)]
                )
                runs[name].append(measured(f"{name}, cold start, seed {seed}", cold_start, command))
    by_workers = {n: [] for n in args.workers}
    bare = []
    for _ in range(args.repeats):  # in turns, so that a noisy minute touches all alike
        bare.append(measured("the bare environment", bare_environment, args.steps))
        for n in args.workers:
            by_workers[n].append(measured(f"{n} workers", learning, n, args.steps))
    figures["bare env.step/s"] = spread(bare)
    for n, taken in by_workers.items():
        figures["workers"][n] = {name: spread([run[name] for run in taken]) for name in taken[0]}
    splits = [measured("the parts of a step", split, args.steps) for _ in range(args.repeats)]
    figures["µs a step"] = {part: spread([s[part] for s in splits]) for part in splits[0]}
    figures["set-up s"] = {n: measured(f"set-up of {n}", setup, n) for n in (1, 8)}
    progress(done, total, "done")
    figures["cold start"] = {name: combine(some) for name, some in runs.items() if some}

    print(", ".join(f"{key} {value}" for key, value in figures["machine"].items()))
    show(
        "Steps a second",
        [
            ["workers", "steps/s, median (range)", "updates/s, median (range)"],
            ["bare env.step", text(figures["bare env.step/s"]), ""],
            *[[n, text(f["steps/s"]), text(f["updates/s"])] for n, f in figures["workers"].items()],
        ],
    )
    show(
        "One step of one worker",
        [["part", "µs"], *[[part, text(f, 1)] for part, f in figures["µs a step"].items()]],
    )
    show(
        "Set-up after the imports",
        [["workers", "s"], *[[n, f"{s:.2f}"] for n, s in figures["set-up s"].items()]],
    )
    show(
        "Cold start to learned",
        [
            [
                "program",
                "learned",
                "cold start s",
                "steps",
                "episodes",
                "steps/s",
                "test mean",
                "peak MB",
            ],
            *[
                [
                    name,
                    f"{f['learned']} of {f['runs']}",
                    text(f["cold start s"], 1),
                    text(f["steps"]),
                    text(f["episodes"]),
                    text(f["steps/s"]),
                    text(f["test mean"], 1) if "test mean" in f else "-",
                    text(f["peak MB"]) if "peak MB" in f else "-",
                ]
                for name, f in figures["cold start"].items()
            ],
        ],
    )
    if args.json:
        Path(args.json).write_text(
            json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
