"""What the programs in companions/ share, and what is not their algorithm.

Options, the rule that ends learning, the display of a run and its files, and the test with films.
"""
import argparse
import collections
import contextlib
import csv
import os
import signal
import sys
import time
from pathlib import Path

from a3c_cartpole import (  # noqa: F401  (some are for the programs alone)
    Episode,
    check_files,
    load_weights,
    positive_number,
    whole_number,
)

import gymnasium as gym
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"


class LastTen:
    """The last ten episodes of an agent or a worker: their steps, and weights kept with each."""

    def __init__(self):
        self.steps = collections.deque([0] * 10, maxlen=10)     # 0: not played yet
        self.weights = collections.deque(maxlen=10)             # lists of arrays

    def add(self, steps, weights):
        """Add an episode of this number of steps. `weights` is a list of arrays."""
        self.steps.append(steps)
        self.weights.append(weights)

    @property
    def mean(self):
        """The mean of their steps."""
        return sum(self.steps) / 10

    def meets_rule(self, limit):
        """Whether the main file's rule is met: a mean above the most steps of an episode less 1."""
        return self.mean > limit - 1

    def mean_of_weights(self):
        """The mean of the weights, array by array. It usually does better than the last ones."""
        return [np.mean(arrays, axis=0) for arrays in zip(*self.weights)]


class Run:
    """A run of a program: shows its episodes and saves what came of it.

    with run:                   # starts the clock and the display
        ...                     # the program plays, counts run.steps and calls run.record
    run.keep({"PPO": model})    # saves, and prints the summary line
    """

    def __init__(self, title, limit, out, workers=("agent",)):
        self.title = title                  # of the learning curve
        self.limit = limit                  # the most steps of an episode
        self.out = out                      # the folder for the files
        self.workers = list(workers)        # names
        self.history = []                   # an Episode for each one that was played to its end
        self.steps = 0                      # of all workers
        self.is_learned = False
        self.seconds = 0
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f}")
        self.bars = Progress(*columns, disable=not sys.stdout.isatty())
        self.tasks = {name: self.bars.add_task(name, total=limit) for name in self.workers}
        self.episodes = collections.Counter()       # of each worker

    def __enter__(self):
        self.started = time.perf_counter()
        self.bars.start()
        return self

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self.started
        self.bars.stop()

    def record(self, worker, steps, mean):
        """Add an episode to the history and show it: its steps, the mean of its worker's last 10.

        In a terminal each worker has a bar, elsewhere each episode has a line.
        """
        self.episodes[worker] += 1
        e = Episode(worker, self.episodes[worker], steps, mean, self.steps)
        self.history.append(e)
        self.bars.update(self.tasks[worker], completed=mean)
        if self.bars.disable:
            print(f"{e.thread}  episode {e.episode}  steps {e.steps}"
                  f"  mean of last 10 {e.mean_of_last_10:.1f}\n",
                  end="", flush=True)       # in one piece, which Ctrl-C cannot cut

    def keep(self, models):
        """Save {name: Keras model} and the history, print the summary line, draw the curve."""
        for name, model in models.items():
            ending = ".weights.h5" if self.is_learned else ".unfinished.weights.h5"
            model.save_weights(self.out / (name + ending))
        with open(self.out / "history.csv", "w", newline="") as file:
            csv.writer(file).writerows([Episode._fields, *self.history])
        outcome = "learned" if self.is_learned else "not learned"
        print(f"{outcome} in {self.seconds:.1f} s: {self.steps} steps, {len(self.history)}"
              f" episodes, {len(self.workers)} workers, {self.steps / self.seconds:.0f} steps/s",
              flush=True)
        draw_learning_curve(self.history, self.out / "learning_curve.png", self.limit, self.title)
        print(f"weights, history and picture are in {self.out}")


def make_parser(description, out, max_episodes):
    """Make an argument parser with the options that all programs share."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    has_screen = (sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ
                  or "WAYLAND_DISPLAY" in os.environ)
    parser.add_argument("--seed", type=whole_number, help="fix the random numbers")
    parser.add_argument("--max-episodes", default=max_episodes, type=positive_number,
                        help="give up after this number of episodes")
    parser.add_argument("--test-episodes", default=10, type=whole_number, help="0: no test")
    parser.add_argument("--render", action=argparse.BooleanOptionalAction, default=has_screen,
                        help="show the test in a window")
    parser.add_argument("--out", default=Path("movie") / out, type=Path, help="where the files go")
    parser.add_argument("--play", type=Path, metavar="WEIGHTS", help="test these, do not learn")
    return parser


def read_options(parser, argv):
    """Read the command line. A bad option ends the program with exit status 2."""
    args = parser.parse_args(argv)
    check_files(parser, args)
    gym.logger.min_level = gym.logger.ERROR     # do not say that CartPole-v0 is old
    return args


def check_same(model, predict):
    """End the program with exit status 1 if a Keras model and its copy in NumPy disagree.

    `predict(weights, x)` is the copy: it takes a list of arrays as `model.get_weights()` gives it,
    and one input, and returns one output or several. The trainable weights are random here, so that
    a forgotten bias is noticed.
    """
    rng = np.random.default_rng(0)
    given = model.get_weights()
    weights = [rng.normal(size=v.shape, scale=.5).astype(np.float32) if v.trainable else np.array(v)
               for v in model.weights]
    inputs = rng.normal(size=(8, *model.input_shape[1:])).astype(np.float32)
    model.set_weights(weights)
    outputs = model(inputs)
    model.set_weights(given)
    if not isinstance(outputs, (list, tuple)):
        outputs = [outputs]
    try:
        for i, x in enumerate(inputs):
            copies = predict(weights, x)
            if len(outputs) == 1:
                copies = [copies]
            for output, copy in zip(outputs, copies, strict=True):
                np.testing.assert_allclose(np.ravel(copy), np.ravel(output[i]), atol=1e-3)
    except (ValueError, AssertionError):    # ValueError: another number of layers or units
        sys.exit(f"error: the Keras model {model.name!r} and its copy in NumPy are two different"
                 " networks. Give both the same layers and activations.")


def test(env_name, play_episode, name, args):
    """Play test episodes, print their steps, and film the first, the second and the ninth.

    `play_episode(env)` plays one and returns its steps. Which ones are filmed is gym's own choice.
    """
    os.environ["SDL_FRAMEBUFFER_ACCELERATION"] = "0"    # Mesa's LLVM and TensorFlow's may clash
    if not args.render:
        os.environ["SDL_VIDEODRIVER"] = "dummy"         # draw without a screen
    env = gym.make(env_name, disable_env_checker=True, render_mode="rgb_array")
    env.reset(seed=args.seed)                           # fixes all later resets, too
    env = gym.wrappers.RecordVideo(env, str(args.out), name_prefix=name)
    if args.render:
        env = gym.wrappers.HumanRendering(env)
    steps = []
    with contextlib.closing(env):
        for episode in range(args.test_episodes):
            steps.append(play_episode(env))
            print(f"test  episode {episode + 1}  steps {steps[-1]}", flush=True)
    if steps:
        print(f"test: mean of {len(steps)} episodes {np.mean(steps):.1f} steps")


def draw_learning_curve(history, path, limit, title):
    """Draw each episode, and each worker's mean of its last 10, over the steps of all workers."""
    from matplotlib.figure import Figure  # here, because it takes half a second
    axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    axes.plot([e.total_steps for e in history], [e.steps for e in history], ".", color="0.7",
              markersize=3 if len(history) > 200 else 7, label="an episode")
    axes.axhline(limit - 1, color="black", linestyle="--", linewidth=1,
                 label=f"learned above {limit - 1}")
    curves = collections.defaultdict(list)      # of each worker
    for e in history:
        if e.episode >= 10:                     # before, its mean still contains zeros
            curves[e.thread].append(e)
    label = "a worker's mean of its last 10" if len(curves) > 1 else "mean of the last 10"
    for episodes in curves.values():
        is_winner = len(curves) > 1 and episodes[-1].mean_of_last_10 > limit - 1
        axes.plot([e.total_steps for e in episodes], [e.mean_of_last_10 for e in episodes],
                  color=ORANGE if is_winner else BLUE, linewidth=2.5 if is_winner else 1,
                  zorder=3 if is_winner else 2,
                  label="the one that has learned" if is_winner else label)
        if not is_winner:
            label = None        # one entry of the legend is enough
    if not curves:
        axes.text(.5, .5, "no mean yet: no worker has played ten episodes", ha="center",
                  transform=axes.transAxes)
    axes.set(title=title, xlim=(0, None), xlabel="steps played",
             ylim=(0, 1.05 * limit), ylabel="steps of an episode")
    axes.legend(fontsize="small")
    axes.figure.savefig(path)


def run_program(main):
    """Call `main` and end with the exit status it returns; with 130 after Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # like Ctrl-C
    sys.stdout.reconfigure(errors="backslashreplace")   # for a path that stdout cannot show
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
