"""A2C, PPO and DQN of Stable-Baselines3 on CartPole, and a clock for any program that learns it.

The constants are RL Zoo's, https://github.com/DLR-RM/rl-baselines3-zoo (hyperparams/a2c.yml …).
`python -m companions.peers A2C` stops by the rule of a3c_cartpole.py, says what came of it in the
same lines and writes the same history.csv. tests/benchmark.py runs it,
and times it and all else by `cold_start`. Nothing large is imported until a peer learns: a process
counts its peak memory from what its parent held when it began.
"""
import argparse
import collections
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "--peers needs Stable-Baselines3: python -m pip install stable-baselines3"

# environment, environments side by side, steps at the most, constants of the algorithm
PEERS = {
    "A2C": ("CartPole-v0", 8, 500_000, dict(ent_coef=0.)),
    "PPO": ("CartPole-v0", 8, 100_000, dict(
        n_steps=32, batch_size=256, n_epochs=20, gamma=.98, gae_lambda=.8, ent_coef=0.,
        learning_rate=lambda left: left * 1e-3, clip_range=lambda left: left * .2)),
    "DQN": ("CartPole-v1", 1, 50_000, dict(
        learning_rate=2.3e-3, batch_size=64, buffer_size=100_000, learning_starts=1000, gamma=.99,
        target_update_interval=10, train_freq=256, gradient_steps=128, exploration_fraction=.16,
        exploration_final_eps=.04, policy_kwargs=dict(net_arch=[256, 256])))}

SUMMARY = re.compile(r"(not )?learned.*?([\d.]+) s[:,] (\d+) steps, (\d+) episodes, \d+ workers,"
                     r" (\d+) steps/s")
TEST = re.compile(r"test: mean of \d+ episodes ([\d.]+) steps")


class StopRule:
    """Ends learning when the last ten episodes of one environment average above limit − 1 steps.

    `history`: rows of thread, episode, steps, mean of last 10, total steps, seconds.
    """

    def __init__(self, limit):
        self.limit, self.learned, self.history = limit, False, []
        self.last = collections.defaultdict(lambda: collections.deque([0] * 10, 10))
        self.count, self.started = collections.Counter(), time.perf_counter()

    def __call__(self, local, _global):
        """Look at the step just made, as Stable-Baselines3 asks; False ends learning."""
        for i, info in enumerate(local["infos"]):
            if "episode" in info:
                self.count[i] += 1
                self.last[i].append(info["episode"]["l"])
                mean, seconds = sum(self.last[i]) / 10, time.perf_counter() - self.started
                self.learned |= mean > self.limit - 1
                self.history.append((f"env{i + 1}", self.count[i], info["episode"]["l"], mean,
                                     local["self"].num_timesteps, round(seconds, 3)))
        return not self.learned


def main(argv=None):
    """Let a peer learn and play ten episodes; return 0 if it learned, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path, help="where history.csv goes; without it, nowhere")
    args = parser.parse_args(argv)

    import stable_baselines3 as sb3
    import torch
    from stable_baselines3.common import env_util, evaluation
    torch.set_num_threads(1)    # as a3c_cartpole.py does; two wait for each other if others run
    env, count, steps, constants = PEERS[args.name]
    envs = env_util.make_vec_env(env, count, args.seed)
    limit = envs.envs[0].spec.max_episode_steps
    model = getattr(sb3, args.name)("MlpPolicy", envs, seed=args.seed, device="cpu", **constants)
    rule = StopRule(limit)
    model.learn(steps, callback=rule)
    seconds, rows = time.perf_counter() - rule.started, rule.history
    said = "learned in" if rule.learned else f"not learned within {len(rows)} episodes:"
    print(f"{said} {seconds:.1f} s{':' if rule.learned else ','} {model.num_timesteps} steps, "
          f"{len(rows)} episodes, {count} workers, {model.num_timesteps / seconds:.0f} steps/s",
          flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        head = "thread", "episode", "steps", "mean_of_last_10", "total_steps", "seconds"
        lines = [",".join(map(str, row)) + "\n" for row in [head, *rows]]
        (args.out / "history.csv").write_text("".join(lines))
    test = env_util.make_vec_env(env, 1, None if args.seed is None else args.seed + 1)
    mean, _ = evaluation.evaluate_policy(model, test, 10, warn=False)
    print(f"test: mean of 10 episodes {mean:.1f} steps")
    return 0 if rule.learned else 1


def are_installed():
    """Whether there is a Stable-Baselines3 to run."""
    return importlib.util.find_spec("stable_baselines3") is not None


def command(name, seed, folder, *more):
    """The command of one run of a peer, or of one of the project's scripts: ROOT/`name`.py."""
    what = [ROOT / "companions/peers.py", name] if name in PEERS else [
        ROOT / f"{name}.py", "--no-render", "--log", *more]
    return [sys.executable, *map(str, what), "--seed", str(seed), "--out", str(folder)]


def cold_start(command):
    """Run a command to its end; return what it said of itself, as a dict of figures.

    "cold start s": from the start of the process to its line on what it learned. Raises
    RuntimeError, with the last line on stderr, if it failed in more than not having learned.
    """
    figures, started = {}, time.perf_counter()
    with tempfile.TemporaryFile("w+") as stderr, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace",
            start_new_session=True) as process:     # else Ctrl-C reached it twice, see below
        try:
            for line in process.stdout:
                if match := SUMMARY.match(line):
                    figures = {"learned": not match[1],
                               "cold start s": time.perf_counter() - started,
                               "learning s": float(match[2]), "steps": int(match[3]),
                               "episodes": int(match[4]), "steps/s": float(match[5])}
                    given_up = line.startswith("not learned within")
                if match := TEST.match(line):
                    figures["test mean"] = float(match[1])
            if hasattr(os, "wait4"):
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                unit = 2**20 if sys.platform == "darwin" else 2**10
                figures["peak MB"] = usage.ru_maxrss / unit
        except BaseException:
            process.terminate()
            raise
        process.wait()
        stderr.seek(0)
        errors = stderr.read()
    expected = (1 if given_up else 0) if "learned" in figures else None
    if process.returncode != expected or re.search(r" lost: |^Traceback", errors, re.M):
        last = ["nothing on stderr", *filter(str.strip, errors.splitlines())][-1]
        raise RuntimeError(f"status {process.returncode}: {last.strip()}")
    return figures


def by_outcome(name, runs):
    """Part the runs that learned from those that did not: {what to call them: runs}."""
    parted = {name: [run for run in runs if run["learned"]],
              f"{name}, not learned": [run for run in runs if not run["learned"]]}
    return {title: alike for title, alike in parted.items() if alike}


if __name__ == "__main__":
    sys.exit(main())
