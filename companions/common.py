"""What the programs in companions/ share, and what is not their algorithm.

`Run` shows, saves and tests what a program learns. `numpy_forward` lets a Keras model play fast.
Options, signals and films are those of the main file, a3c_cartpole.py.

Import this file first. The main file, which it imports, makes settings that must be made before the
imports of TensorFlow and Keras.
"""
import collections
import contextlib
import csv
import itertools
import sys
import time
from pathlib import Path

# Find a3c_cartpole.py, wherever the program was started. What a program uses as common.NAME and is
# not defined below comes from there.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from a3c_cartpole import (  # noqa: F401
    Episode,
    film,
    load_weights,
    make_parser,
    one_core,
    parse_options,
    play_test,
    positive_number,
    run_program,
    say,
    uninterrupted,
)

import keras
import matplotlib
import numpy as np
import rich
from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TextColumn

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"


class Run:
    """A run of a program: shows its episodes, keeps the best weights, saves them, and tests them.

    run = common.Run(model, env, "PPO", args)
    if not args.play:
        with run:           # starts the clock and the display; at its end, also after Ctrl-C, saves
            ...             # the program learns, counts run.steps, and calls run.finish_episode
    return run.test(act)

    Learning ends by the main file's rule: if the mean of a worker's last ten episodes is above the
    most steps of an episode less 1. The mean of the weights of its ten best successive episodes is
    kept.
    """

    def __init__(self, model, env, title, args, workers=("agent",)):
        self.model = model
        self.env = env                      # for the test
        self.title = title                  # of the learning curve
        self.args = args
        self.limit = env.spec.max_episode_steps
        self.history = []                   # an Episode for each one that was played to its end
        self.steps = 0                      # of all workers
        self.is_learned = False
        self.best_mean = -1
        self.best_weights = model.get_weights()
        self.episodes = collections.Counter()                                   # of each worker
        self.last_steps = {name: collections.deque([0] * 10, 10) for name in workers}
        self.last_weights = {name: collections.deque([], 10) for name in workers}
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f}")
        self.bars = Progress(*columns, disable=not rich.get_console().is_interactive)
        self.tasks = {name: self.bars.add_task(name, total=self.limit) for name in workers}

    def __enter__(self):
        self.start_clock()
        self.bars.start()
        return self

    def start_clock(self):
        """Start the clock, also once more: what was before does not count."""
        self.started = time.perf_counter()

    def finish_episode(self, worker, steps, weights):
        """Record an episode of so many steps, and show it. Return True if learning is over.

        `weights` is a list of arrays. In a terminal each worker has a bar, elsewhere each episode
        has a line.
        """
        self.last_steps[worker].append(steps)
        self.last_weights[worker].append(weights)
        mean = sum(self.last_steps[worker]) / 10
        if mean >= self.best_mean:
            self.best_mean = mean
            self.best_weights = [np.mean(w, axis=0) for w in zip(*self.last_weights[worker])]
        self.is_learned = mean > self.limit - 1

        self.episodes[worker] += 1
        e = Episode(worker, self.episodes[worker], steps, mean, self.steps)
        self.history.append(e)
        self.bars.update(self.tasks[worker], completed=mean)
        if self.bars.disable:
            say(f"{e.worker}  episode {e.episode}  steps {e.steps}"
                f"  mean of last 10 {e.mean_of_last_10:.1f}")
        return self.is_learned or len(self.history) == self.args.max_episodes

    def __exit__(self, *error):
        with uninterrupted():       # a second Ctrl-C must not lose the results
            self.bars.stop()
            self.save(time.perf_counter() - self.started)

    def save(self, seconds):
        """Save the weights and the history, say how it went, and draw the learning curve."""
        out = self.args.out
        self.model.set_weights(self.best_weights)
        ending = ".weights.h5" if self.is_learned else ".unfinished.weights.h5"
        self.model.save_weights(out / (self.model.name + ending))
        with open(out / "history.csv", "w", newline="") as file:
            csv.writer(file).writerows([Episode._fields, *self.history])
        outcome = "learned" if self.is_learned else "not learned"
        say(f"{outcome} in {seconds:.1f} s: {self.steps} steps, {len(self.history)} episodes,"
            f" {len(self.tasks)} workers, {self.steps / seconds:.0f} steps/s")
        draw_learning_curve(self.history, out / "learning_curve.png", self.limit, self.title)
        say(f"weights, history and picture are in {out}")

    def test(self, act):
        """Play test episodes with `act(weights, state)`, and film the first, second and ninth.

        The weights are those that were learned, or those of --play. Return the exit status: 1 if
        the program has not learned.
        """
        args = self.args
        if args.play:
            load_weights(self.model, args.play)
        weights = self.model.get_weights()
        with contextlib.closing(film(self.env, self.model.name, args)) as env:

            def run_episode():
                state, _ = env.reset()
                steps = 0
                done = False
                while not done:
                    state, _, terminated, truncated, _ = env.step(act(weights, state))
                    steps += 1
                    done = terminated or truncated
                return steps

            play_test(run_episode, args.test_episodes)
        return 0 if args.play or self.is_learned else 1


# == Keras models in NumPy =========================================================================

def softmax(z):
    exp_z = np.exp(z - z.max(axis=-1, keepdims=True))       # - max: it cannot overflow
    return exp_z / exp_z.sum(axis=-1, keepdims=True)


ACTIVATIONS = {"linear": lambda z: z, "relu": lambda z: np.maximum(z, 0), "tanh": np.tanh,
               "sigmoid": lambda z: .5 + .5 * np.tanh(z / 2), "softmax": softmax}


def dense(activation):
    return lambda x, kernel, bias: activation(x @ kernel + bias)


def normalize(x, mean, variance, _count):
    return (x - mean) / np.sqrt(variance)


def numpy_forward(model):
    """Return forward(weights, x), which computes in NumPy what a Keras model computes.

    `weights` is a list of arrays as model.get_weights() returns it; x is one input or a batch. For
    one input this takes 10 µs, model(x) 100 times as long. It returns one output, or a list of all.
    The model is a chain of Dense, Normalization and Dropout layers (Dropout does nothing here); if
    it has several outputs, they are the last Dense layers, in their order.
    """
    steps = []      # what each layer does, and its number of weights
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense):
            steps.append((dense(ACTIVATIONS[layer.activation.__name__]), 2))
        elif isinstance(layer, keras.layers.Normalization):
            steps.append((normalize, 3))
        elif not isinstance(layer, (keras.layers.Dropout, keras.layers.InputLayer)):
            raise TypeError(f"numpy_forward: unknown layer {type(layer).__name__}")
    n_hidden = len(steps) - len(model.outputs)

    def forward(weights, x):
        outputs = []
        weights = iter(weights)
        for i, (step, n_weights) in enumerate(steps):
            y = step(x, *itertools.islice(weights, n_weights))
            if i < n_hidden:
                x = y
            else:
                outputs.append(y)
        return outputs if len(outputs) > 1 else y

    return forward


# ==================================================================================================

@matplotlib.rc_context(matplotlib.rcParamsDefault)      # whatever the user's matplotlibrc says
def draw_learning_curve(history, path, limit, title):
    """Draw each episode, and each worker's mean of its last 10, over the steps of all workers."""
    axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    axes.plot([e.total_steps for e in history], [e.steps for e in history], ".", color="0.7",
              markersize=3 if len(history) > 200 else 7, label="an episode")
    axes.axhline(limit - 1, color="black", linestyle="--", linewidth=1,
                 label=f"learned above {limit - 1}")
    curves = collections.defaultdict(list)      # of each worker
    for e in history:
        if e.episode >= 10:                     # before, its mean still contains zeros
            curves[e.worker].append(e)
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
