"""A2C, PPO and DQN of Stable-Baselines3 on CartPole, to compare our programs with.

    python -m pip install stable-baselines3
    python companions/sb3_peers.py A2C --seed 1     # history.csv is then in movie/sb3_peers

compare.py runs this like the other programs: it prints the two lines that compare.py reads, writes
the same history.csv and ends with the same exit status. Learning ends by the main file's rule, in
StopRule. (Nothing is taken from common.py, because it imports TensorFlow, for which these
algorithms would have to wait.)
"""
import argparse
import collections
import csv
import sys
import time
from pathlib import Path

# Environment, number of environments side by side, the most steps, and constants of the algorithm:
# those of RL Zoo, https://github.com/DLR-RM/rl-baselines3-zoo (hyperparams/a2c.yml, ppo.yml and
# dqn.yml). They were found for CartPole-v1. `left` is the fraction of the steps that is still to
# come; with it, two of PPO's constants fall.
ZOO = {
    "A2C": ("CartPole-v0", 8, 500_000, dict(ent_coef=0.)),
    "PPO": ("CartPole-v0", 8, 100_000, dict(
        n_steps=32, batch_size=256, n_epochs=20, gamma=.98, gae_lambda=.8, ent_coef=0.,
        learning_rate=lambda left: left * 1e-3, clip_range=lambda left: left * .2)),
    "DQN": ("CartPole-v1", 1, 50_000, dict(
        learning_rate=2.3e-3, batch_size=64, buffer_size=100_000, learning_starts=1000, gamma=.99,
        target_update_interval=10, train_freq=256, gradient_steps=128, exploration_fraction=.16,
        exploration_final_eps=.04, policy_kwargs=dict(net_arch=[256, 256]))),
}

Episode = collections.namedtuple("Episode", "worker episode steps mean_of_last_10 total_steps")


class StopRule:
    """Ends learning by the main file's rule, and records the episodes.

    An environment of Stable-Baselines3 counts as one worker of ours.
    """

    def __init__(self, limit):
        self.limit = limit                          # the most steps of an episode
        self.is_learned = False
        self.history = []
        self.episodes = collections.Counter()       # of each environment
        self.last_ten = collections.defaultdict(lambda: collections.deque([0] * 10, maxlen=10))

    def __call__(self, local_variables, _):
        """Look at a step of all environments. Return False to end learning.

        Stable-Baselines3 calls this after each step, with the local variables of its own loop.
        """
        total_steps = local_variables["self"].num_timesteps
        for i, info in enumerate(local_variables["infos"], start=1):
            if "episode" in info:       # it has ended
                steps = info["episode"]["l"]
                self.episodes[i] += 1
                self.last_ten[i].append(steps)
                mean = sum(self.last_ten[i]) / 10
                self.history.append(
                    Episode(f"env{i}", self.episodes[i], steps, mean, total_steps))
                if mean > self.limit - 1:
                    self.is_learned = True
        return not self.is_learned


def main(argv=None):
    """Learn and test. Return the exit status: 0 learned, 1 not learned."""
    parser = argparse.ArgumentParser(description="Run an algorithm of Stable-Baselines3.")
    parser.add_argument("algorithm", choices=ZOO)
    parser.add_argument("--seed", type=int, help="fix the random numbers")
    parser.add_argument("--out", default=Path("movie/sb3_peers"), type=Path, help="for history.csv")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    # Here, so that the tests can import this file without Stable-Baselines3
    import gymnasium as gym
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    torch.set_num_threads(1)        # networks this small are no faster with more threads
    gym.logger.min_level = gym.logger.ERROR     # do not say that CartPole-v0 is old

    env_name, n_envs, max_steps, constants = ZOO[args.algorithm]
    algorithm = getattr(stable_baselines3, args.algorithm)
    model = algorithm("MlpPolicy", make_vec_env(env_name, n_envs, args.seed), seed=args.seed,
                      device="cpu", **constants)
    rule = StopRule(gym.spec(env_name).max_episode_steps)
    started = time.perf_counter()
    model.learn(max_steps, callback=rule)
    seconds = time.perf_counter() - started

    with open(args.out / "history.csv", "w", newline="") as file:
        csv.writer(file).writerows([Episode._fields, *rule.history])
    outcome = "learned" if rule.is_learned else "not learned"
    steps = model.num_timesteps
    print(f"{outcome} in {seconds:.1f} s: {steps} steps, {len(rule.history)} episodes,"
          f" {n_envs} workers, {steps / seconds:.0f} steps/s", flush=True)
    mean, _ = evaluate_policy(model, make_vec_env(env_name, 1, args.seed), 10, warn=False)
    print(f"test: mean of 10 episodes {mean:.1f} steps")
    return 0 if rule.is_learned else 1


if __name__ == "__main__":
    sys.exit(main())
