"""What the programs in companions/ share and what is not their algorithm.

`Run` shows, saves and tests what a program learns. `numpy_forward` lets a Keras model play fast.
All else that a program uses as common.NAME belongs to the main file, a3c_cartpole.py: options,
signals, films. It is only passed on here.

A program must import this file before Keras and TensorFlow. The main file sets how they shall run
(for example, without a GPU), and they read such settings only once, when they are imported.
"""
import collections
import contextlib
import csv
import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the main file's folder
from a3c_cartpole import (  # noqa: F401
    Episode,
    film,
    load_weights,
    make_folder,
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

        run = common.Run(model, env, "DQN on CartPole", args)
        if not args.play:
            with run:
                is_over = False
                while not is_over:
                    steps = play_and_learn()
                    run.steps += steps
                    is_over = run.finish_episode("agent", steps, model.get_weights())
        status = run.test(act)

    Learning is over by the main file's rule: if the last ten episodes of one worker have a mean
    above the time limit less 1. Kept is the mean of the weights of the ten best successive episodes
    of a worker. They are saved at the end of the `with`, also after an error or Ctrl-C.
    """

    def __init__(self, model, env, title, args, workers=("agent",)):
        """Prepare a run of a Keras model. `workers` are the names of all that play."""
        self.model = model
        self.env = env                      # for the test
        self.title = title                  # of the learning curve
        self.args = args                    # from parse_options
        self.limit = env.spec.max_episode_steps
        self.steps = 0                      # of all workers; the program counts them
        self.history = []                   # an Episode for each one that was played to its end
        self.is_learned = False
        self.best_mean = 0
        self.best_ten = [model.get_weights()]       # the weights after the ten best episodes
        # Of each worker: the steps of all its episodes, and the weights of the last ten.
        self.all_steps = {name: [] for name in workers}
        self.last_weights = {name: collections.deque(maxlen=10) for name in workers}
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f}")
        self.bars = Progress(*columns, disable=not rich.get_console().is_interactive)
        self.tasks = {name: self.bars.add_task(name, total=self.limit) for name in workers}

    def __enter__(self):
        self.bars.start()
        self.start_clock()
        return self

    def start_clock(self):
        """Start the clock. If it runs already, what was before does not count."""
        self.started = time.perf_counter()

    def finish_episode(self, worker, steps, weights):
        """Record an episode of so many steps, and show it. Return True if learning is over.

        `weights` is a list of arrays as model.get_weights() returns it. In a terminal each worker
        has a bar, elsewhere each episode has a line.
        """
        self.all_steps[worker].append(steps)
        self.last_weights[worker].append(weights)
        mean = sum(self.all_steps[worker][-10:]) / 10   # before the tenth, missing ones count as 0
        if mean >= self.best_mean:
            self.best_mean = mean
            self.best_ten = list(self.last_weights[worker])

        e = Episode(worker, len(self.all_steps[worker]), steps, mean, self.steps)
        self.history.append(e)
        self.bars.update(self.tasks[worker], completed=mean)
        if self.bars.disable:
            say(f"{e.worker}  episode {e.episode}  steps {e.steps}"
                f"  mean of last 10 {e.mean_of_last_10:.1f}")

        if mean > self.limit - 1:
            self.is_learned = True
        return self.is_learned or len(self.history) == self.args.max_episodes

    def __exit__(self, *error):
        with uninterrupted():               # a second Ctrl-C must not lose the results
            self.bars.stop()
            self.save(time.perf_counter() - self.started)

    def save(self, seconds):
        """Save the weights and the history, say how it went, and draw the learning curve."""
        out = self.args.out
        self.model.set_weights([np.mean(arrays, axis=0) for arrays in zip(*self.best_ten)])
        ending = ".weights.h5" if self.is_learned else ".unfinished.weights.h5"
        self.model.save_weights(out / (self.model.name + ending))
        with open(out / "history.csv", "w", newline="") as file:
            csv.writer(file).writerows([Episode._fields, *self.history])
        outcome = "learned" if self.is_learned else "not learned"
        say(f"{outcome} in {seconds:.1f} s: {self.steps} steps, {len(self.history)} episodes,"
            f" {len(self.tasks)} workers, {self.steps / seconds:.0f} steps/s")
        try:
            draw_learning_curve(self.history, out / "learning_curve.png", self.limit, self.title)
        except Exception as error:      # without fonts, for example; the test is more important
            say(f"there is no learning curve: {error}")
        say(f"weights, history and picture are in {out}")

    def test(self, act):
        """Play test episodes; film the first, second and ninth. Return the exit status.

        act(weights, state) returns an action. The weights are those that were saved, or those of
        --play. The status is 1 if the program has not learned.
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


def draw_learning_curve(history, path, limit, title):
    """Draw a run as a PNG file: a list of Episode in the order in which they ended."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault):     # whatever the user's settings are
        axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
        axes.plot([e.total_steps for e in history], [e.steps for e in history], ".", color="0.7",
                  markersize=4, label="steps of an episode")
        for worker in sorted({e.worker for e in history}):
            episodes = [e for e in history if e.worker == worker][9:]   # that have ten to average
            axes.plot([e.total_steps for e in episodes], [e.mean_of_last_10 for e in episodes],
                      color=BLUE, linewidth=1)
        axes.plot([], [], color=BLUE, label="mean of a worker's last ten")
        axes.axhline(limit - 1, color="black", linestyle="--", linewidth=1,
                     label=f"learned if a mean is above {limit - 1}")
        axes.set(title=title, xlabel="steps of all workers", ylabel="steps of an episode",
                 xlim=(0, None), ylim=(0, 1.05 * limit))
        axes.legend(fontsize="small")
        axes.figure.savefig(path)


# == Keras models in NumPy =========================================================================

def numpy_forward(model):
    """Return forward(weights, x), which computes in NumPy what a Keras model computes.

    `weights` is a list of arrays as model.get_weights() returns it. x is one input (n,) or a batch
    (B, n), the output is (m,) or (B, m). If the model has several outputs, forward returns a list.
    For one input it takes about 10 µs, model(x) 100 times as long.

    The model is a chain of Dense, Normalization and Dropout layers. If it has several outputs, they
    are its last Dense layers.
    """
    steps = []      # of each layer: what it does, and which of the weights are its own
    n = 0           # weights of the layers so far
    for layer in model.layers:
        own = slice(n, n + len(layer.weights))
        n = own.stop
        if isinstance(layer, keras.layers.Dense) and layer.activation in ACTIVATIONS:
            function = functools.partial(dense, ACTIVATIONS[layer.activation])
            steps.append((function, own))
        elif isinstance(layer, keras.layers.Normalization):
            steps.append((normalize, own))
        elif not isinstance(layer, (keras.layers.Dropout, keras.layers.InputLayer)):
            raise TypeError(f"numpy_forward cannot compute {layer.name}, a {type(layer).__name__}")
    n_hidden = len(steps) - len(model.outputs)

    def forward(weights, x):
        outputs = []
        for i, (function, own) in enumerate(steps):
            y = function(x, *weights[own])
            if i < n_hidden:
                x = y
            else:
                outputs.append(y)
        return outputs if len(outputs) > 1 else y

    # Compare once with the model: it may not be such a chain.
    x = np.ones((1, model.input_shape[1]), np.float32)
    ours = np.hstack(forward(model.get_weights(), x))
    if not np.allclose(ours, np.hstack(model(x)), atol=1e-4):
        raise TypeError(f"numpy_forward cannot compute {model.name}: its layers are not a chain")
    return forward


def dense(activation, x, kernel, bias=0):
    """Compute a Dense layer: x (n,) or (B, n), kernel (n, m), bias (m,) → (m,) or (B, m)."""
    return activation(x @ kernel + bias)


def normalize(x, mean, variance, _count):
    """Compute a Normalization layer, with the mean (n,) and variance (n,) of what it has seen."""
    return (x - mean) / np.maximum(np.sqrt(variance), keras.config.epsilon())


def softmax(z):
    """Turn numbers (m,) or (B, m) into probabilities."""
    exp_z = np.exp(z - z.max(axis=-1, keepdims=True))       # - max: it cannot overflow
    return exp_z / exp_z.sum(axis=-1, keepdims=True)


ACTIVATIONS = {
    keras.activations.linear: lambda z: z,
    keras.activations.relu: lambda z: np.maximum(z, 0),
    keras.activations.tanh: np.tanh,
    keras.activations.sigmoid: lambda z: .5 + .5 * np.tanh(z / 2),      # cannot overflow, either
    keras.activations.softmax: softmax,
}
