"""Show one episode of A3C and one update, number by number.

    python companions/microscope.py

An untrained network plays an episode of ten steps, at whose end the pole falls, and learns from it
once. The classes of a3c_cartpole.py do the work. Only the loop of Environment.run stands here once
more, in `play`, to keep the numbers.
"""
import argparse
import collections

import common

import a3c_cartpole as a3c

import gymnasium as gym
import numpy as np

SEED = 46       # with it, the episode has just the T_MAX = 10 steps after which a thread updates

BEFORE = """\
a: 0 is a push to the left, 1 to the right. s': the state five steps after s. p(a): the probability
of this action. The last two columns are p(a) and V(s) after the update.
"""
AFTER = """
Read the table from its end. The n = 5 rewards of the last five steps contain the fall. Nothing
follows it, so the mask is 0 and R is R_n: -1 for the last step, -γ for the step before it, and so
on. The critic expected 0.28 to 0.49, so the advantage R - V is -1.2 to -1.5: these steps turned out
much worse than expected.

The rewards of the first five steps are 0, and R is γ^5·V(s'), what the critic expects five steps
later. It is untrained, and expects more and more while the pole falls, so these advantages are
positive, which is wrong. When later updates have made V(s) low near the fall, they become negative.

The update. Critic: V(s) is lower now, most of all in the last steps. Actor: four of the five steps
that turned out worse were pushes to the right, so p(right) is smaller now. In step 8, p(left) is
larger, although this push to the left turned out worse, too: the states resemble each other, and
p(left) + p(right) = 1.

The changes are small because RMSProp divides by the root of its mean squares. These start at 1,
which is still far too large. After some hundred updates they have come down.
"""


def main(argv=None):
    """Print the table, with a text before and after it. Return the exit status."""
    argparse.ArgumentParser(description="Show one episode in numbers.").parse_args(argv)
    gym.logger.min_level = gym.logger.ERROR     # do not say that CartPole-v0 is old
    rows = look(a3c.ParameterServer(SEED))
    print(BEFORE)
    print("step  a   r    R_n  mask   V(s)  V(s')      R  R - V    p(a)   after: p(a)    V(s)")
    for row in rows:
        print("{:4} {:2} {:3} {:6.2f} {:5.0f} {:6.3f} {:6.3f} {:6.2f} {:6.2f}  {:.4f}"
              "        {:.4f} {:7.3f}".format(*row))
    print(AFTER)
    return 0


def look(server):
    """Play an episode and update once. Return the numbers of each step, in the table's order."""
    environment = a3c.Environment("local_thread1", "learning", server)
    brain = environment.agent.brain
    e = play(environment, environment.agent.act)
    p, _ = brain.predict(e.s)
    brain.update_parameter_server()                                     # 6 to 8
    brain.pull_parameter_server()                                       # 9
    p_after, v_after = brain.predict(e.s)
    p_a = (p * e.a).sum(axis=1)                 # a is one-hot
    p_a_after = (p_after * e.a).sum(axis=1)
    return list(zip(range(1, len(e.r) + 1), e.a.argmax(axis=1), e.r, e.R_n, e.s_mask, e.v, e.v_,
                    e.R, e.R - e.v, p_a, p_a_after, v_after))


# The steps of an episode, as columns. v is V(s), and v_ is V(s').
Steps = collections.namedtuple("Steps", "s a r R_n s_mask v v_ R")


def play(environment, act):
    """Play an episode without an update. The samples stay in the brain's train_queue."""
    agent = environment.agent
    rewards = []
    s, _ = environment.env.reset()
    while s is not None:
        a = act(s)                                                      # 2
        s_, _, terminated, truncated, _ = environment.env.step(a)       # 3
        done = terminated or truncated
        rewards.append(environment.reward(len(rewards) + 1, done))
        if done:
            s_ = None
        agent.advantage_push_local_brain(s, a, rewards[-1], s_)         # 4
        s = s_

    s, a, R_n, s_, s_mask = [np.array(column) for column in zip(*agent.brain.train_queue)]
    _, v = agent.brain.predict(s)
    _, v_ = agent.brain.predict(s_)
    R = R_n + a3c.GAMMA_N * v_ * s_mask
    return Steps(s, a, rewards, R_n, s_mask, v, v_, R)


if __name__ == "__main__":
    common.run_program(main)
