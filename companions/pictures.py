"""Learn CartPole once more, take notes of it, and draw pictures from them.

    python companions/pictures.py           # the pictures are then in movie/A3C
    python companions/pictures.py DIR       # or in the folder DIR

learning.gif          one episode each before, during and after learning, from the same start
three_as.png          Advantage, Actor and Critic with the learned weights; Asynchronous
learning_curve.png    all episodes

It also prints how much p changes between the moment at which a thread copies θ, and its update.
"""
import argparse
import collections
import os
import random
import threading
import time
from pathlib import Path

import common

import a3c_cartpole as a3c
import microscope

import gymnasium as gym
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

MAX_EPISODES = 3000     # then the run is given up
BARS = 7                # of each thread in three_as.png, on average
LEARNED_STEPS = 30      # of the episode under "Advantage", before pushes are random
PANEL = 220, 127        # width and height in learning.gif, in pixels
HEAD = 24               # the height of a panel's text
GAP = 8                 # between two panels
START = 0               # the seed of the episodes in learning.gif


def main(argv=None):
    """Learn, measure, and draw. Return the exit status."""
    parser = argparse.ArgumentParser(description="Draw pictures of a run of a3c_cartpole.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out", nargs="?", default=Path("movie", "A3C"), type=Path, metavar="DIR",
                        help="the folder for the pictures and for the files of the run")
    parser.set_defaults(play=None)      # (parse_options looks at it)
    out = common.parse_options(parser, argv).out

    server = NotingServer(max_episodes=MAX_EPISODES)
    workers = [a3c.WorkerThread(f"thread {i + 1}", server) for i in range(a3c.N_WORKERS)]
    a3c.learn(server, workers, out)
    if not server.is_learned:
        common.say("It has not learned, so there are no pictures. Start it again.")
        return 1

    updates = sorted(server.updates, key=lambda update: update.present.number)
    mean = np.mean([by_others(update) for update in updates])
    change = changes_of_p(server.model, updates).mean()
    common.say(f"between copy and update: {mean:.1f} updates by others on average, p of the chosen"
               f" actions changed by {change:.3f}")

    limit = workers[0].environment.max_steps
    common.draw_learning_curve(server.history, out / "learning_curve.png", limit,
                               "A3C: the steps of each episode")
    draw_three_as(server, updates, out / "three_as.png")
    draw_learning(server, out / "learning.gif")
    common.say(f"learning.gif, three_as.png and learning_curve.png are in {out}")
    return 0


# == Notes of a run ================================================================================

# A thread has read θ at a time (milliseconds). θ0 is the first θ, and each update makes the next.
Read = collections.namedtuple("Read", "number weights time")

# `thread` has computed gradients from the samples s and a, with `copy`, and has changed `present`.
Update = collections.namedtuple("Update", "thread copy present s a")


class NotingServer(a3c.ParameterServer):
    """A parameter server that notes when each thread copies θ, and when it changes θ.

    All notes are references to arrays that are never changed, so they cost little time.
    """

    def __init__(self, **options):
        self.started = time.perf_counter()
        self.own = threading.local()            # each thread has its own attributes here
        self.numbered = -1, None                # the number of θ, and θ, always replaced together
        self.updates = []
        super().__init__(**options)
        self.after_episode = [self.weights]     # θ at the start, and after each episode
        self.gradients_without_note = self.compiled_gradients
        self.compiled_gradients = self.note_samples

    @property
    def weights(self):
        """θ. A thread reads it to copy it, and once more when it changes it."""
        number, weights = self.numbered
        self.own.read = Read(number, weights, 1000 * (time.perf_counter() - self.started))
        return weights

    @weights.setter
    def weights(self, weights):
        number, _ = self.numbered
        self.numbered = number + 1, weights

    def note_samples(self, weights, s, a, R):
        """Compute the gradients as the main file does, and note the samples."""
        self.own.samples = s.numpy(), a.numpy()
        return self.gradients_without_note(weights, s, a, R)

    def apply_gradients(self, gradients):
        """Change θ as the main file does, and note it."""
        copy = self.own.read
        super().apply_gradients(gradients)      # reads the present θ, under the lock
        present = self.own.read
        if present is not copy:                 # (if learning is over, it has read nothing)
            thread = threading.current_thread().name
            self.updates.append(Update(thread, copy, present, *self.own.samples))

    def record(self, episode, has_learned):
        """Record an episode as the main file does, and note θ."""
        is_winner = super().record(episode, has_learned)
        self.after_episode.append(self.weights)
        return is_winner


def by_others(update):
    """Return the number of updates that other threads made between copy and update."""
    return update.present.number - update.copy.number


def changes_of_p(model, updates):
    """Return |p(a|s) with the copy - p(a|s) with the present θ| of all samples of these updates."""
    forward = common.numpy_forward(model)
    changes = []
    for update in updates:
        p_copy, _ = forward(update.copy.weights, update.s)
        p_present, _ = forward(update.present.weights, update.s)
        changes.append(np.abs((p_copy - p_present) * update.a).sum(axis=1))     # a is one-hot
    return np.concatenate(changes)


# == learning.gif ==================================================================================

def draw_learning(server, path):
    """Draw four panels side by side: episodes before, during and after learning, at real speed."""
    episodes = len(server.history)
    early = round(.3 * episodes)
    late = round(.6 * episodes)
    panels = [play(server.model, server.after_episode[0], "before learning"),
              play(server.model, server.after_episode[early], f"after {early} episodes"),
              play(server.model, server.after_episode[late], f"after {late} episodes"),
              play(server.model, server.weights, f"learned, {episodes} episodes")]
    width, height = PANEL
    pictures = []
    for i in range(max(len(panel) for panel in panels)):
        picture = Image.new("RGB", (4 * width + 3 * GAP, height), "white")
        for k, panel in enumerate(panels):
            picture.paste(panel[min(i, len(panel) - 1)], (k * (width + GAP), 0))
        pictures.append(picture)
    palette = pictures[-1].quantize(32)         # the last picture has all colours
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    # CartPole has 50 steps per second, so two steps take 40 ms. The last picture stays for 2 s.
    pictures[0].save(path, save_all=True, append_images=pictures[1:], loop=0,
                     duration=[40] * (len(pictures) - 1) + [2000])


def play(model, weights, title):
    """Play an episode with the more probable actions. Return a picture of every second step."""
    forward = common.numpy_forward(model)
    os.environ["SDL_VIDEODRIVER"] = "dummy"     # draw without a screen
    env = gym.make(a3c.ENV, render_mode="rgb_array")
    s, _ = env.reset(seed=START)
    frames = []                                 # one before each step
    terminated = False
    truncated = False
    while not (terminated or truncated):
        frames.append(env.render())
        p, _ = forward(weights, s)
        s, _, terminated, truncated, _ = env.step(int(p.argmax()))
    last_frame = env.render()
    has_fallen = abs(s[2]) > env.unwrapped.theta_threshold_radians
    env.close()

    steps = len(frames)
    panel = [draw_panel(frames[i], title, f"{i} steps") for i in range(0, steps, 2)]
    if truncated:
        panel.append(draw_panel(last_frame, title, f"{steps} steps"))
    else:
        end = "fell" if has_fallen else "out of range"
        panel.append(draw_panel(last_frame, title, f"{end} after {steps} steps", is_over=True))
    return panel


def draw_panel(frame, title, text, is_over=False):
    """Draw the lower part of gym's picture (400, 600, 3), pale if the game is over."""
    width, height = PANEL
    frame = Image.fromarray(frame[120:]).resize((width, height - HEAD), Image.Resampling.LANCZOS)
    if is_over:
        frame = Image.blend(frame, Image.new("RGB", frame.size, "white"), .6)
    panel = Image.new("RGB", PANEL, "white")
    panel.paste(frame, (0, HEAD))
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(15)
    draw.text((4, 4), title, "black", font)
    draw.text((width - 6, height - 6), text, common.ORANGE if is_over else "black", font, "rs")
    return panel


# == three_as.png ==================================================================================

@matplotlib.rc_context(matplotlib.rcParamsDefault)      # whatever the user's matplotlibrc says
def draw_three_as(server, updates, path):
    """Draw Advantage, Actor and Critic with a server's weights, and Asynchronous with notes."""
    figure = Figure(figsize=(9, 8.5), dpi=150, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 5))
    advantage, actor, critic = upper.subplots(1, 3)
    draw_advantage(advantage, server)
    draw_actor_and_critic(actor, critic, server)
    lanes, counts = lower.subplots(1, 2, width_ratios=(4, 1))
    lower.suptitle("Asynchronous: while a thread plays with its copy of the weights θ,"
                   " others change θ")
    draw_lanes(lanes, updates)
    draw_counts(counts, updates)
    figure.savefig(path)


def draw_advantage(axes, server):
    """Draw an episode that goes wrong: first the policy plays, then pushes are random."""
    environment = a3c.Environment("picture", "test", server)
    rng = random.Random(0)
    played = []

    def act(s):
        played.append(s)
        if len(played) <= LEARNED_STEPS:
            return environment.agent.act(s)
        return rng.randrange(a3c.NUM_ACTIONS)

    episode = microscope.play(environment, act)
    advantage = episode.R - episode.v
    steps = range(1, len(advantage) + 1)
    axes.axvspan(LEARNED_STEPS + .5, len(steps) + .5, color="0.9")
    axes.plot(steps, episode.v, color=common.BLUE, label="V(s): expected")
    axes.plot(steps, episode.R, color=common.ORANGE, linewidth=1,
              label=f"R: {a3c.N_STEP_RETURN} steps later")
    axes.bar(steps, advantage, color=common.GREEN, alpha=.6, label="advantage R − V(s)")
    numbers = [*episode.v, *episode.R, *advantage]
    axes.set(title="Advantage: better or\nworse than expected?",
             xlabel="step (grey: random pushes)", xlim=(0, None),
             ylim=(min(-1.2, *numbers), max(1.2, *numbers)))
    axes.legend(fontsize="small", loc="upper left")


def draw_actor_and_critic(actor, critic, server):
    """Draw p(right) and V(s) for a cart that stands still in the middle."""
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


def draw_lanes(axes, updates):
    """Draw a lane for each thread, with a bar from each copy to the update made with it."""
    names = [f"thread {i + 1}" for i in range(a3c.N_WORKERS)]
    middle = len(updates) // 2
    half = BARS * len(names) // 2
    shown = updates[max(0, middle - half):middle + half]
    left = shown[0].present.time
    right = shown[-1].present.time
    width_of_digit = .013 * (right - left)
    for u in updates:
        start = u.copy.time
        end = u.present.time
        if end < left or start > right:
            continue
        y = names.index(u.thread)
        axes.barh(y, end - start, left=start, height=.7, color=common.BLUE)
        draw_update(axes, u, y, "black")
        number = str(by_others(u))
        if left < start and end < right and end - start > (1 + len(number)) * width_of_digit:
            axes.text((start + end) / 2, y, number, color="white", fontsize=9, ha="center",
                      va="center_baseline")
    axes.set_title("A bar begins when a thread copies θ, and ends when its update changes θ.\n"
                   "In it: how many updates others made meanwhile.\n"
                   "Bars overlap, but Python runs one thread at a time; the others wait.",
                   loc="left", fontsize=9)
    axes.set(xlabel="milliseconds", xlim=(left, right), ylim=(len(names) - .4, -2.2),
             yticks=range(len(names)), yticklabels=names)
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    draw_example(axes, updates, names)


def draw_update(axes, update, y, color):
    axes.vlines(update.present.time, y - .42, y + .42, color=color, linewidth=2.5)


def draw_example(axes, updates, names):
    """Show once more, above the lanes, that bar of thread 1 which has most updates in between."""
    left, right = axes.get_xlim()
    room = .16 * (right - left)         # for the text at both sides
    candidates = [u for u in updates if u.thread == names[0]
                  and u.copy.time > left + room and u.present.time < right - room]
    if not candidates:
        return
    example = max(candidates, key=by_others)
    start = example.copy.time
    end = example.present.time
    copied = example.copy.number
    made = example.present.number + 1
    axes.axvspan(start, end, color="0.9", zorder=0)
    axes.hlines(-1, start, end, color="black", linewidth=1)
    axes.vlines([start, end], -1.3, -.7, color="black", linewidth=1)
    axes.text(start, -1, f"copied θ{copied}  ", ha="right", va="center")
    axes.text(end, -1, f"  made θ{made}", ha="left", va="center")
    axes.text((start + end) / 2, -1.4, f"updates by others: {by_others(example)}", ha="center",
              va="bottom")
    for u in updates[copied:made - 1]:
        axes.vlines(u.present.time, -1.3, -.7, color=common.ORANGE)
        draw_update(axes, u, names.index(u.thread), common.ORANGE)


def draw_counts(axes, updates):
    """Draw how often each number of updates by others occurred."""
    numbers = [by_others(update) for update in updates]
    axes.hist(numbers, np.arange(-.5, max(7, *numbers) + 1), color=common.BLUE,
              weights=[100 / len(numbers)] * len(numbers))
    axes.set_title(f"All {len(numbers)} updates:\nmean {np.mean(numbers):.1f}", fontsize=9)
    axes.set(xlabel="updates by others", ylabel="% of all updates")


if __name__ == "__main__":
    common.run_program(main)
