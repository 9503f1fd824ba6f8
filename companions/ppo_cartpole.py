"""PPO on CartPole, with one network for the policy and the value: Keras and TensorFlow, on the CPU.

PPO is Proximal Policy Optimization: it tries to stay near the old policy. Like A3C (see
a3c_cartpole.py), it makes an action more probable if it was better than expected, and otherwise
less probable. But A3C takes only one step of the optimizer for each batch of samples; PPO takes
many, here up to 80 for each episode, which could change the policy too far. The clip makes this
less likely: as soon as the probability of an action has changed by 20 % in the desired direction, a
further change gains nothing.

    python companions/ppo_cartpole.py   # learns within seconds; films: movie/ppo_cartpole

This is the program of tsubame-mz's post 「PPOの実装(ネットワーク共有版)」 (blog 「雨宿り」), for
today's libraries. Its code is RL/ppo.py in https://github.com/tsubame-mz/machine_learning, commit
d2b2fb2; the constants below are its defaults. "The paper" is Schulman et al., 2017,
https://arxiv.org/abs/1707.06347. README.md in this folder lists what differs from the post.

Look at these:

    learning_loop           playing and learning in turns
    Memory.finish_path      what each action was worth
    Agent.update            the steps of the optimizer, and when they end
    Agent.train_step        one step: the loss with the clip

Symbols:
s, a, r     state, action, reward
π(a|s)      the probability of a in s, in the code pi; π_old: that of the policy which played
R           the return, the discounted sum of the rewards from a step to the end
V(s)        the value: the R that the network expects from s on
A           the advantage: how much better than expected an action turned out
kl          the mean of log π(a|s) - log π_old(a|s), which the post takes as a distance of π
T           in shapes, the number of steps of the episode
"""
import random

import common

import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

# -- constants of the game
ENV = "CartPole-v0"     # its episodes end after 200 steps, at the latest
NUM_STATES = 4          # cart position, cart velocity, pole angle, pole angular velocity
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right
GOOD_STEPS = 195        # of 200; fewer count as a fall, see reward_modify

# -- constants of the network
HID_NUM = 64            # units of each of the two shared layers
DROPRATE = .2           # probability with which dropout leaves out a unit while learning

# -- constants of the memory
GAMMA = .99             # γ: a reward that comes k steps later counts γ^k
LAM = .95               # λ: see Memory.finish_path
ADV_EPS = 1e-6          # prevents a division by a standard deviation of 0

# -- constants of learning
MAX_EPISODES = 500      # at most; it has mostly learned after 200 to 350
LEARNING_RATE = 1e-4    # of Adam
TRAIN_ITERS = 80        # steps of Adam for one episode, at most
CLIP_RATIO = .2         # ε of the paper: the clip is at 0.8 and 1.2, see Agent.train_step
V_LOSS_C = .9           # coefficient of the value loss, which weighs it against pi_loss
ENT_C = 1e-3            # coefficient of the entropy, which keeps π from becoming 0 or 1 too early
TARGET_KL = .01         # the steps of Adam end if kl > 1.5 times this, see Agent.update


class PVNet(keras.Model):
    """The network: s (T, 4) → π of each action (T, 2) and V(s) (T, 1). Post: 「学習モデル」.

    The gradients of the losses of both outputs change the two shared layers.
    """

    def __init__(self):
        # Dropout sets each unit to 0 with probability 0.2, anew in each call, and divides the
        # others by 0.8. It is on only where the network is called with training=True.
        state = keras.Input((NUM_STATES,))
        h = self.dense(HID_NUM, "relu")(state)
        h = keras.layers.Dropout(DROPRATE)(h)
        h = self.dense(HID_NUM, "relu")(h)
        h = keras.layers.Dropout(DROPRATE)(h)
        pi = self.dense(NUM_ACTIONS, "softmax")(h)
        value = self.dense(1, "linear")(h)
        super().__init__(state, [pi, value], name="ppo_cartpole")   # the post's forward: s to both

    @staticmethod
    def dense(units, activation):
        """Make a layer with a bias of 0 and a kernel drawn like PyTorch's xavier_normal_."""
        # The variance is 2 / (inputs + outputs). Keras' "glorot_normal" cuts large values off.
        xavier_normal = keras.initializers.VarianceScaling(1., "fan_avg", "untruncated_normal")
        return keras.layers.Dense(units, activation, kernel_initializer=xavier_normal)


class Memory:
    """Remembers one episode, and computes what each of its actions was worth. Post: 「Memory」."""

    def __init__(self):
        self.initialize()

    def initialize(self):
        """Forget everything."""
        self.state_lst = []         # s, (4,) each
        self.action_lst = []        # a, 0 or 1
        self.reward_lst = []        # r
        self.value_lst = []         # V(s)
        self.log_pi_lst = []        # log π(a|s)
        self.return_lst = []        # R, see finish_path
        self.advantage_lst = []     # A, see finish_path

    def add(self, state, action, reward, value, log_pi):
        """Remember one step."""
        self.state_lst.append(state)
        self.action_lst.append(action)
        self.reward_lst.append(reward)
        self.value_lst.append(value)
        self.log_pi_lst.append(log_pi)

    def finish_path(self):
        """Compute the return and the advantage of each step of an episode that has ended.

            R(t) = r(t) + γ·r(t+1) + γ²·r(t+2) + …

        The advantage is GAE, generalized advantage estimation (https://arxiv.org/abs/1506.02438,
        equation 16):

            δ(t) = r(t) + γ·V(s(t+1)) - V(s(t))
            A(t) = δ(t) + γλ·δ(t+1) + (γλ)²·δ(t+2) + …

        (In the sums of R and A the post prints the exponent i; i - t is meant.)

        δ(t) says how much better one step went than V had expected. With λ = 0, A is δ: it relies
        on V, which may still be wrong. With λ = 1, A is R - V(s): it depends on which actions
        happened to be drawn later. λ = .95 is in between.
        """
        # V, R and A count as 0 after the end, be it a fall or step 200.
        value_lst = np.append(self.value_lst, 0)
        last_return = 0
        last_delta = 0
        steps = len(self.reward_lst)
        self.return_lst = np.zeros(steps)
        self.advantage_lst = np.zeros(steps)
        # Go backwards: each R and A is made from the next one. (last_delta is the post's name for
        # the A of the next step.)
        for t in reversed(range(steps)):
            last_return = self.reward_lst[t] + GAMMA * last_return
            self.return_lst[t] = last_return
            delta = self.reward_lst[t] + GAMMA * value_lst[t + 1] - value_lst[t]
            last_delta = delta + GAMMA * LAM * last_delta
            self.advantage_lst[t] = last_delta

    def get_batch(self):
        """Return the episode as arrays, in the order of Agent.train_step, and forget it.

        The advantages are standardized (標準化): their mean becomes 0, their variance 1. From here
        on, "better" means an A above the mean A of this episode.
        """
        # PyTorch's standard deviation divides by T - 1: ddof=1. (Not in the post: an episode of one
        # step has the deviation 0, because 0/0 would turn all weights into NaN.)
        advantage = self.advantage_lst
        std = advantage.std(ddof=1) if len(advantage) > 1 else 0
        advantage = (advantage - advantage.mean()) / (std + ADV_EPS)
        batch = (np.array(self.state_lst, np.float32),      # (T, 4)
                 np.array(self.action_lst, np.int32),       # (T,)
                 np.array(self.log_pi_lst, np.float32),     # (T,)
                 np.array(self.return_lst, np.float32),     # (T,)
                 np.array(advantage, np.float32))           # (T,)
        self.initialize()
        return batch


class Agent:
    """Chooses the actions, and learns from the episodes they make. Post: 「Agent」."""

    def __init__(self, model):
        self.model = model
        self.forward = common.numpy_forward(model)      # the model in NumPy, for speed; no dropout
        self.optimizer = keras.optimizers.Adam(LEARNING_RATE, epsilon=1e-8)     # as in PyTorch
        # Make Adam's own variables now. Otherwise the first call compiles `update` twice.
        self.optimizer.build(model.trainable_variables)

    def get_action(self, weights, state):
        """Draw a for a state (4,), like the post's Categorical. Return a, V(s) and log π(a|s)."""
        pi, value = self.forward(weights, state)        # the post's evaluation mode, model.eval()
        action = random.choices(range(NUM_ACTIONS), pi.tolist())[0]
        return action, value[0], np.log(pi[action])

    # (autograph would read this file again, perhaps after an edit.)
    @tf.function(reduce_retracing=True, autograph=False)    # not compiled anew for each length T
    def update(self, *batch):
        """Learn from one episode: take up to TRAIN_ITERS steps of Adam, each with the whole of it.

        This is the post's loop, without the losses that it returns:

            for _ in range(TRAIN_ITERS):
                kl = self.train_step(*batch)
                if kl > 1.5 * TARGET_KL:
                    break

        It is written as a loop of TensorFlow, which takes half the time. The rule is the post's,
        but with the wrong sign: -kl estimates the Kullback-Leibler divergence. So the farther π
        moves, the lower kl tends to be. Dropout, on only in the new log π, adds chance.
        """
        tf.while_loop(
            cond=lambda kl: kl <= 1.5 * TARGET_KL,          # go on as long as this is true
            body=lambda kl: self.train_step(*batch),        # do this, which gives the next kl
            loop_vars=[0.],                                 # so that it begins
            maximum_iterations=TRAIN_ITERS)

    def train_step(self, state, action, log_pi, returns, advantage):
        """Take one step of Adam on the loss, minus the paper's equation 9. Return kl before it."""
        with tf.GradientTape() as tape:     # records what is computed, to find its gradients
            pi, value = self.model(state, training=True)    # with dropout; post: model.train()
            pi_of_action = tf.gather(pi, action, axis=1, batch_dims=1)      # (T,): π(a|s)
            new_log_pi = tf.math.log(pi_of_action + 1e-10)      # 1e-10: never log 0

            # How probable is the action now, relative to when it was played? π_old drew it. If the
            # new π would draw it twice as often, its A must count twice: ratio 2. (At ratio 1 the
            # gradient of ratio·A is that of A3C's log π·A. At the first of the steps the ratio is
            # about 1; not exactly, because dropout is on in π and was off in π_old.)
            ratio = tf.exp(new_log_pi - log_pi)         # π/π_old, as exp(log x - log y) = x/y

            clip_adv = tf.where(advantage >= 0, 1 + CLIP_RATIO, 1 - CLIP_RATIO) * advantage

            # To make the loss small, the optimizer makes the minimum of ratio·A and clip_adv large.
            # So good actions become more probable, bad ones less. With ε, this minimum is
            #
            #             ratio < 1 - ε     in between    ratio > 1 + ε
            #     A > 0   ratio·A           ratio·A       (1 + ε)·A       a good action
            #     A < 0   (1 - ε)·A         ratio·A       ratio·A         a bad action
            #
            # (1 + ε)·A and (1 - ε)·A do not depend on the network, so their gradient is 0: no more
            # gain. (So the ratio is not limited, as the post says: other samples may move it on.)
            # In the top left and bottom right it has moved in the wrong direction, and the gradient
            # leads it back. (The paper's equation 7 is the same.)
            pi_loss = -tf.reduce_mean(tf.minimum(ratio * advantage, clip_adv))

            # V(s) moves towards R. (Not as in the post's code, which subtracts (T, 1) from (T,).
            # PyTorch then subtracts all from all, (T, T), so each V(s) moves to the mean of all R.)
            v_loss = V_LOSS_C * tf.reduce_mean(tf.square(returns - value[:, 0]))

            # The entropy is large if both actions are about equally probable. The loss subtracts
            # it, as in the paper, to keep it large. (Not as in the post, which adds it.)
            entropy = ENT_C * tf.reduce_mean(tf.reduce_sum(-pi * tf.math.log(pi + 1e-10), axis=1))

            total_loss = pi_loss + v_loss - entropy
        kl = tf.reduce_mean(new_log_pi - log_pi)
        gradients = tape.gradient(total_loss, self.model.trainable_variables)
        self.optimizer.apply(gradients)
        return kl


def reward_modify(step, done):
    """Return the post's reward for a step, counted from 0. (It found gym's, always 1, no good.)"""
    if not done:
        return 0
    if step + 1 >= GOOD_STEPS:
        return 1
    return -1       # a fall, as in the post's code; its text says 0


def learning_loop(agent, run, seed):
    """Play episodes, and learn from each. Post: 「学習ループ」.

    `run`, a common.Run, counts and shows them. It ends learning after MAX_EPISODES, as the post's
    `for`, or sooner (not as in the post).
    """
    env = gym.make(ENV)
    env.reset(seed=seed)                    # seeds all later resets, too
    memory = Memory()
    while True:
        # 1. Play an episode. The weights do not change meanwhile.
        weights = agent.model.get_weights()
        state, _ = env.reset()
        done = False
        step = 0
        while not done:
            action, value, log_pi = agent.get_action(weights, state)
            next_state, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            reward = reward_modify(step, done)
            memory.add(state, action, reward, value, log_pi)
            state = next_state
            step += 1
        run.steps += step
        if run.finish_episode("agent", step, weights):
            return

        # 2. Learn from the episode, and forget it: PPO needs samples of its own π. (So a ring
        # buffer, of which the post thinks, would hardly fit.)
        memory.finish_path()
        agent.update(*memory.get_batch())


# == Not needed to understand PPO: options, files, test ============================================

def main(argv=None):
    """Learn, then test and film what was learned. Return the exit status."""
    parser = common.make_parser("Learn CartPole with PPO, then film it.", "ppo_cartpole",
                                MAX_EPISODES)
    args = common.parse_options(parser, argv)
    if args.seed is not None:
        keras.utils.set_random_seed(args.seed)
    agent = Agent(PVNet())
    run = common.Run(agent.model, gym.make(ENV, render_mode="rgb_array"), f"PPO, {ENV}", args)
    if not args.play:
        with run:
            learning_loop(agent, run, args.seed)

    def act(weights, state):
        pi, _ = agent.forward(weights, state)
        return int(pi.argmax())         # the more probable action

    return run.test(act)


if __name__ == "__main__":
    common.run_program(main)
