"""Two pictures of a run of a3c_cartpole.py: its learning curve, and the three A's.

    python -m companions.pictures           # of the run in movie/A3C; the pictures are then there
    python -m companions.pictures DIR       # of a run with --out DIR

Advantage, Actor and Critic are drawn with the weights in DIR. For Asynchronous as many threads as
in the run learn CartPole-v0 once more, for some seconds, while a NotingServer takes notes: it is
the main file's ParameterServer, and remembers when a thread copied θ and when it changed θ.
"""
import argparse
import collections
import csv
import itertools
import random
import threading
import time
from pathlib import Path

import a3c_cartpole as a3c
from companions import common, microscope

import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure

UPDATES = 2000      # that are noted; then the threads stop
LANES = 12          # threads that are shown at most
BARS = 7            # of each thread, on average
PALE_BLUE = "#A6CBE3"
LEARNED_STEPS = 30  # of the episode under "Advantage", before chance plays


def main(argv=None):
    """Draw both pictures. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m companions.pictures",
                                     description="Draw a run of a3c_cartpole.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("dir", nargs="?", default=Path("movie/A3C"), type=Path,
                        help="the folder of the run, also for the pictures")
    args = parser.parse_args(argv)
    gym.logger.min_level = gym.logger.ERROR     # do not say that CartPole-v0 is old

    files = sorted(args.dir.glob("A3C*.weights.h5"), key=lambda path: path.stat().st_mtime)
    if not files:
        parser.error(f"no weights in {args.dir}: first run python a3c_cartpole.py")
    server = a3c.ParameterServer(seed=0)        # the episode under "Advantage" is always the same
    server.weights = common.load_weights(server.model, files[-1])       # the last run's
    try:
        history = read_history(args.dir / "history.csv")
        limit = 200 if all(e.steps <= 200 for e in history) else 500    # CartPole-v0 or -v1
        n_workers = len({e.thread for e in history}) or a3c.N_WORKERS
        common.draw_learning_curve(history, args.dir / "learning_curve.png", limit,
                                   "A3C: the steps of each episode")
        draw_three_as(server, take_notes(n_workers), n_workers, args.dir / "three_as.png")
    except OSError as error:
        parser.error(str(error))
    print(f"learning_curve.png and three_as.png are in {args.dir}")
    return 0


def read_history(path):
    """Read the episodes that a run has saved."""
    with open(path, newline="") as file:
        _, *rows = csv.reader(file)
    return [a3c.Episode(thread, int(episode), int(steps), float(mean), int(total_steps))
            for thread, episode, steps, mean, total_steps in rows]


# == Notes of a run ================================================================================

# θ0 is the first θ, and each update makes the next one. With an update, `thread` made the θ of
# number `made` at the time `end`, with a copy of number `copied` from the time `start`. Times are
# in milliseconds.
Update = collections.namedtuple("Update", "thread copied start made end")


class NotingServer(a3c.ParameterServer):
    """A parameter server that notes when each thread copies θ, and when it changes θ."""

    def __init__(self):
        self.started = time.perf_counter()
        self.updates = []
        self.last_read = {}             # of each thread: the number of θ, and the time
        self.numbered = None, -1        # θ and its number, always replaced together
        super().__init__()

    @property
    def weights(self):
        """θ. A thread reads it to copy it, and once more when it changes it."""
        weights, number = self.numbered
        now = 1000 * (time.perf_counter() - self.started)
        self.last_read[threading.current_thread().name] = number, now
        return weights

    @weights.setter
    def weights(self, weights):
        _, number = self.numbered
        self.numbered = weights, number + 1

    def apply_gradients(self, gradients):
        """Change θ as the main file does, and note it."""
        thread = threading.current_thread().name
        copied, start = self.last_read[thread]
        super().apply_gradients(gradients)              # reads the present θ, under the lock
        present, end = self.last_read[thread]
        if end > start:                                 # (not if learning was over)
            self.updates.append(Update(thread, copied, start, present + 1, end))


def by_others(update):
    """The number of updates that other threads made between copy and update."""
    return update.made - update.copied - 1


def take_notes(n_workers):
    """Let threads learn for some seconds. Return their updates, in the order of time."""
    server = NotingServer()
    workers = [a3c.WorkerThread(f"thread {i + 1}", "learning", server) for i in range(n_workers)]
    try:
        with a3c.one_core():
            for worker in workers:
                worker.start()
        while len(server.updates) < UPDATES and not server.stop.is_set():
            server.stop.wait(.1)
    finally:
        server.stop.set()
        for worker in workers:
            if worker.is_alive():
                worker.join()
    return sorted(server.updates, key=lambda update: update.made)


# == The picture ===================================================================================

def draw_three_as(server, updates, n_workers, path):
    """Draw Advantage, Actor and Critic with a server's weights, and Asynchronous with notes."""
    figure = Figure(figsize=(9, 8.5), dpi=150, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 5))
    advantage, actor, critic = upper.subplots(1, 3)
    draw_advantage(advantage, server)
    draw_actor_and_critic(actor, critic, server)
    lanes, counts = lower.subplots(1, 2, width_ratios=(4, 1))
    lower.suptitle("Asynchronous: while a thread plays with its copy of the weights θ,"
                   " others change θ")
    draw_lanes(lanes, updates, n_workers)
    draw_counts(counts, updates)
    figure.savefig(path)


def draw_advantage(axes, server):
    """Draw an episode that goes wrong: first the policy plays, then chance."""
    environment = a3c.Environment("picture", "test", server)
    chance = random.Random(0)
    count = itertools.count()

    def act(s):
        if next(count) < LEARNED_STEPS:
            return environment.agent.act(s)
        return chance.randrange(a3c.NUM_ACTIONS)

    episode = microscope.play(environment, act)
    advantage = episode.R - episode.v
    steps = range(1, len(advantage) + 1)
    if len(steps) > LEARNED_STEPS:
        axes.axvspan(LEARNED_STEPS + .5, len(steps) + .5, color="0.9")
    axes.plot(steps, episode.v, color=common.BLUE, label="V(s): expected")
    axes.plot(steps, episode.R, color=common.ORANGE, linewidth=1,
              label=f"R: {a3c.N_STEP_RETURN} steps later")
    axes.bar(steps, advantage, color=common.GREEN, alpha=.6, label="advantage R − V(s)")
    numbers = [*episode.v, *episode.R, *advantage]
    axes.set(title="Advantage: better or\nworse than expected?",
             xlabel="step (grey: random pushes)", xlim=(0, None),
             ylim=(min(-1.2, *numbers), max(1.2, *numbers)))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small", loc="upper left")


def draw_actor_and_critic(actor, critic, server):
    """Draw p(right) and V for a cart that stands still in the middle."""
    angle, velocity = np.meshgrid(np.linspace(-12, 12, 81), np.linspace(-2, 2, 81))
    nothing = np.zeros_like(angle)
    s = np.stack([nothing, nothing, np.radians(angle), velocity], axis=-1)
    p, v = a3c.LocalBrain(server).predict(s)
    p_right = p[..., 1]
    image = actor.pcolormesh(angle, velocity, p_right, cmap="RdBu_r", vmin=0, vmax=1)
    actor.figure.colorbar(image, ax=actor, location="bottom", label="p(right), black line: ½")
    if p_right.min() < .5 < p_right.max():
        actor.contour(angle, velocity, p_right, [.5], colors="black")
    image = critic.pcolormesh(angle, velocity, v, cmap="viridis")
    critic.figure.colorbar(image, ax=critic, location="bottom", label="V(s)")
    actor.set_title("Actor: probability of\na push to the right")
    critic.set_title("Critic: discounted rewards\nthat it expects")
    for axes in actor, critic:
        axes.set(xlabel="angle of the pole (degrees)", ylabel="angular velocity (rad/s)")


def draw_lanes(axes, updates, n_workers):
    """Draw a lane for each thread, with a bar from each copy to the update made with it."""
    lanes = {f"thread {i + 1}": i for i in range(min(n_workers, LANES))}
    in_lanes = [u for u in updates if u.thread in lanes]
    middle = len(in_lanes) // 2
    half = BARS * len(lanes) // 2
    window = in_lanes[max(0, middle - half):middle + half]
    margin = .01 * (window[-1].end - window[0].end)
    left = window[0].end - margin
    right = window[-1].end + margin
    for u in in_lanes:
        y = lanes[u.thread]
        start = max(u.start, left)
        end = min(u.end, right)
        if start < end:
            axes.barh(y, end - start, left=start, height=.7,
                      color=common.BLUE if u.end < right else PALE_BLUE)
        if left < u.end < right:
            axes.vlines(u.end, y - .42, y + .42, color="black", linewidth=2.5)
            number = str(by_others(u))
            if end - start > (1 + 1.3 * len(number)) * margin:      # there is room for it
                axes.text((start + end) / 2, y, number, color="white", fontsize=9, ha="center",
                          va="center_baseline")
    axes.set_title("A bar begins when a thread copies θ, and ends when its update changes θ.\n"
                   "In it: how many updates others made meanwhile. Pale: goes on. Gap: no copy.\n"
                   "Bars overlap, but Python runs one thread at a time; the others wait.",
                   loc="left", fontsize=9)
    axes.set(xlabel="milliseconds", xlim=(left, right), ylim=(max(4, len(lanes)) - .4, -2.2),
             yticks=range(len(lanes)), yticklabels=lanes)
    if n_workers > LANES:
        axes.set_ylabel(f"{LANES} of the {n_workers} threads")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    draw_example(axes, updates, lanes)


def draw_example(axes, updates, lanes):
    """Show once more, above the lanes, that bar of thread 1 which has most updates in between."""
    left, right = axes.get_xlim()
    room = .16 * (right - left)         # for the text at both sides
    candidates = [u for u in updates
                  if u.thread == "thread 1" and u.start > left + room and u.end < right - room]
    if not candidates:
        return
    example = max(candidates, key=by_others)
    between = [u for u in updates if example.copied < u.made < example.made]
    axes.axvspan(example.start, example.end, color="0.9", zorder=0)
    axes.hlines(-1, example.start, example.end, color="black", linewidth=1)
    axes.vlines([example.start, example.end], -1.3, -.7, color="black", linewidth=1)
    axes.text(example.start, -1, f"copied θ{example.copied}  ", ha="right", va="center")
    axes.text(example.end, -1, f"  made θ{example.made}", ha="left", va="center")
    axes.text((example.start + example.end) / 2, -1.4, f"updates by others: {len(between)}",
              ha="center", va="bottom")
    for u in between:
        axes.vlines(u.end, -1.3, -.7, color=common.ORANGE)
        if u.thread in lanes:
            y = lanes[u.thread]
            axes.vlines(u.end, y - .42, y + .42, color=common.ORANGE, linewidth=2.5)


def draw_counts(axes, updates):
    """Draw how often each number of updates by others occurred."""
    numbers = [by_others(update) for update in updates]
    axes.hist(numbers, np.arange(-.5, max(7, *numbers) + 1), color=common.BLUE,
              weights=[100 / len(numbers)] * len(numbers))
    axes.set_title(f"All {len(numbers)} updates:\nmean {np.mean(numbers):.1f}", fontsize=9)
    axes.set(xlabel="updates by others", ylabel="% of all updates")


if __name__ == "__main__":
    common.run_program(main)
