"""PPO on CartPole, with one network for the policy and the value: Keras and TensorFlow, on the CPU.

PPO is Proximal Policy Optimization. It makes an action more probable if it was better than
expected, and otherwise less probable. A3C (see a3c_cartpole.py) does the same, but takes only one
step of the optimizer for each batch of samples; PPO takes many, here up to 80 for each episode. So
many steps could change the policy too far. The clip makes this less likely: as soon as the
probability of an action has changed by 20 % in the desired direction, a further change gains
nothing.

    python -m companions.ppo_cartpole   # learns within seconds; films: movie/ppo_cartpole

This is the program of tsubame-mz's post 「PPOの実装(ネットワーク共有版)」 (blog 「雨宿り」), for
today's libraries. Its code is RL/ppo.py in https://github.com/tsubame-mz/machine_learning, commit
d2b2fb2 (it was moved later); the constants below are its defaults. "The paper" is Schulman et al.,
2017, https://arxiv.org/abs/1707.06347. What to look at, in the order of the post:

    Memory.finish_path      what each action was worth
    Agent.train             the steps of the optimizer, and when they end
    Agent.loss_of           the loss, with the clip
    learning_loop           playing and learning in turns

Symbols: s, a, r: state, action, reward. π(a|s), in the code pi: the probability of a in s. R: the
return, the discounted sum of the rewards from a step to the end. V(s): the value, which is the R
that the network expects from s on. A: the advantage, how much better than expected an action turned
out. T: in shapes, the number of steps of the episode.

What differs from the post:
- Keras replaces PyTorch. To play, the network is computed in NumPy.
- Corrected: the value loss, and the sign of the entropy. Agent.loss_of says how.
- Kept: the rule that ends the steps of the optimizer, although it measures little. Agent.train says
  why.
- Added: learning ends when the last ten episodes have a mean above 199 steps, and the mean of their
  weights is kept. Ten test episodes follow, with the more probable action. Files are saved.
"""
import random

from companions import common

import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

# -- constants of the game
ENV = "CartPole-v0"
MAX_STEPS = 200         # of an episode of CartPole-v0
NUM_STATES = 4          # cart position, cart velocity, pole angle, pole angular velocity
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right
GOOD_STEPS = 195        # an episode of fewer steps counts as a fall, see reward_modify
MAX_EPISODES = 500

# -- constants of the network
HID_NUM = 64            # units of each of the two shared layers
DROPRATE = .2           # fraction of these units that dropout leaves out while learning

# -- constants of the memory
GAMMA = .99             # γ: a reward that comes k steps later counts γ^k
LAM = .95               # λ: see Memory.finish_path
ADV_EPS = 1e-6          # prevents a division by a standard deviation of 0

# -- constants of learning
LEARNING_RATE = 1e-4    # of Adam
TRAIN_ITERS = 80        # steps of Adam for one episode, at most
CLIP_RATIO = .2         # ε of the paper: the clip is at 0.8 and 1.2, see Agent.loss_of
V_LOSS_C = .9           # coefficient of the value loss
ENT_C = 1e-3            # coefficient of the entropy, which keeps π from becoming 0 or 1 too early
TARGET_KL = .01         # steps of Adam end above 1.5 times this, see Agent.train


class PVNet(keras.Model):
    """The network: s (T, 4) → π of each action (T, 2) and V(s) (T, 1). Post: 「学習モデル」."""

    def __init__(self):
        # Dropout sets a fifth of the units to 0, at random and anew in each call, and divides the
        # others by 0.8. It is on only where the network is called with training=True.
        state = keras.Input((NUM_STATES,))
        h = self.dense(HID_NUM, "relu")(state)
        h = keras.layers.Dropout(DROPRATE)(h)
        h = self.dense(HID_NUM, "relu")(h)
        h = keras.layers.Dropout(DROPRATE)(h)
        pi = self.dense(NUM_ACTIONS, "softmax")(h)
        value = self.dense(1, "linear")(h)
        super().__init__(state, [pi, value], name="PPO")    # no `forward` is needed

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
        # After the end, V, R and A are 0. The time limit counts as an end like any other.
        value_lst = np.append(self.value_lst, 0)
        last_return = 0
        last_delta = 0
        steps = len(self.reward_lst)
        self.return_lst = np.zeros(steps)
        self.advantage_lst = np.zeros(steps)
        # Go backwards: each R and A is made from the next one. (last_delta is the post's name for
        # A(t+1), which becomes A(t).)
        for t in reversed(range(steps)):
            last_return = self.reward_lst[t] + GAMMA * last_return
            self.return_lst[t] = last_return
            delta = self.reward_lst[t] + GAMMA * value_lst[t + 1] - value_lst[t]
            last_delta = delta + GAMMA * LAM * last_delta
            self.advantage_lst[t] = last_delta

    def get_batch(self):
        """Return the episode as arrays, in the order of Agent.train, and forget it.

        The advantages are standardized (標準化): their mean becomes 0, their variance 1. From here
        on "better" means better than the mean of this episode, no longer better than V expected.
        """
        # PyTorch divides by T - 1 in a standard deviation: ddof=1.
        advantage = self.advantage_lst
        advantage = (advantage - advantage.mean()) / (advantage.std(ddof=1) + ADV_EPS)
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
        self.weights = model.get_weights()      # the same weights as NumPy arrays, for `predict`
        self.optimizer = keras.optimizers.Adam(LEARNING_RATE, epsilon=1e-8)     # PyTorch's
        # Make Adam's own variables now; a compiled function cannot make them later.
        self.optimizer.build(model.trainable_variables)

    def get_action(self, state):
        """Draw an action for a state (4,). Return it with V(s) and log π(a|s)."""
        pi, value = self.predict(self.weights, state)
        action = random.choices(range(NUM_ACTIONS), pi.tolist())[0]
        return action, value[0], np.log(pi[action])

    def update(self, batch):
        """Learn from the arrays of one episode. Post: 「update()」."""
        self.train(*batch)
        self.weights = self.model.get_weights()

    # tf.function compiles the method with its loop. With reduce_retracing=True it does not do so
    # again for each new T.
    @tf.function(reduce_retracing=True)
    def train(self, state, action, log_pi, returns, advantage):
        """Take up to TRAIN_ITERS steps of Adam, each with the whole episode."""
        for _ in tf.range(TRAIN_ITERS):
            # The tape records what is computed inside `with`, to find its gradients.
            with tf.GradientTape() as tape:
                pi, value = self.model(state, training=True)
                # π(a|s): the one-hot vector picks it from the two. (1e-10: never log 0.)
                pi_of_action = tf.reduce_sum(pi * tf.one_hot(action, NUM_ACTIONS), axis=1)
                new_log_pi = tf.math.log(pi_of_action + 1e-10)
                # How probable is the action now, relative to when it was played? The old π drew it.
                # If the new π would draw it twice as often, it must count twice: ratio 2. (At ratio
                # 1 the gradient of ratio·A is that of A3C's log π·A.) `log_pi` was computed without
                # dropout, so the ratio is not 1 even at the first step.
                ratio = tf.exp(new_log_pi - log_pi)     # π/π_old, as exp(log x - log y) = x/y
                total_loss = self.loss_of(pi, value, ratio, returns, advantage)
            gradients = tape.gradient(total_loss, self.model.trainable_variables)
            self.optimizer.apply(gradients)

            # The post's rule to end these steps: `kl`, the mean of log(ratio), is above .015. It
            # is a weak rule. Usual rules take -kl, which estimates the Kullback-Leibler divergence,
            # how far the new policy is from the old one. (The post says itself that its `kl` is not
            # strictly this.) In our runs, whenever the rule ended the steps, `kl` computed without
            # dropout was still below .015. So dropout, which is random, decides the end.
            kl = tf.reduce_mean(new_log_pi - log_pi)
            if kl > 1.5 * TARGET_KL:
                break

    @staticmethod
    def loss_of(pi, value, ratio, returns, advantage):
        """Compute the loss of an episode: pi (T, 2), value (T, 1), all others (T,).

        It is the paper's equation 9 with a minus, because an optimizer makes a loss small.
        """
        # The policy loss. To make it small, the optimizer makes ratio·A large: good actions become
        # more probable, bad ones less. The clip limits what can be gained: the loss has, instead of
        # ratio·A, the minimum of ratio·A and clip_adv. With A = advantage, ε = CLIP_RATIO it is
        #
        #             ratio < 1 - ε     in between    ratio > 1 + ε
        #     A > 0   ratio·A           ratio·A       (1 + ε)·A       a good action
        #     A < 0   (1 - ε)·A         ratio·A       ratio·A         a bad action
        #
        # (1 + ε)·A and (1 - ε)·A do not depend on the network. Their gradient is 0: the probability
        # has changed enough. In the other two corners it has changed in the wrong direction, and
        # the gradient leads it back. (The paper's equation 7 gives the same minimum.)
        clip_adv = tf.where(advantage >= 0, (1 + CLIP_RATIO) * advantage,
                            (1 - CLIP_RATIO) * advantage)
        pi_loss = -tf.reduce_mean(tf.minimum(ratio * advantage, clip_adv))

        # The value loss moves V(s) towards R, as in the post's formula. Its code subtracts (T, 1)
        # from (T,), of which PyTorch makes (T, T): there each V(s) moves to the mean of all R. Here
        # both have the shape (T,).
        v_loss = V_LOSS_C * tf.reduce_mean(tf.square(returns - value[:, 0]))

        # The entropy is large if both actions are about equally probable. It is subtracted, as in
        # the paper, so that it becomes larger. The post adds it.
        entropy = ENT_C * tf.reduce_mean(-tf.reduce_sum(pi * tf.math.log(pi + 1e-10), axis=1))
        return pi_loss + v_loss - entropy

    @staticmethod
    def predict(weights, state):
        """Compute π of each action (2,) and V(s) (1,) for one state (4,), without dropout.

        PVNet computes the same, but for one state this is more than 100 times as fast. Both must be
        changed together; the program checks at the start that they agree.
        """
        (kernel_1, bias_1, kernel_2, bias_2,
         pi_kernel, pi_bias, value_kernel, value_bias) = weights
        h = np.maximum(state @ kernel_1 + bias_1, 0)        # relu
        h = np.maximum(h @ kernel_2 + bias_2, 0)
        z = h @ pi_kernel + pi_bias
        exp_z = np.exp(z - z.max())                         # - max: it cannot overflow
        pi = exp_z / exp_z.sum()                            # softmax
        value = h @ value_kernel + value_bias
        return pi, value


def reward_modify(step, done):
    """Return the post's reward after this number of steps. (Gym's is 1 for every step.)

    The post says that it did not go well with gym's. For a fall its text has 0, its code -1.
    """
    if not done:
        return 0
    if step >= GOOD_STEPS:
        return 1
    return -1


def learning_loop(agent, run, max_episodes, seed):
    """Play and learn in turns. Post: 「学習ループ」."""
    env = gym.make(ENV, disable_env_checker=True)
    env.reset(seed=seed)                    # fixes all later resets, too
    memory = Memory()
    last_ten = common.LastTen()
    for _ in range(max_episodes):
        # 1. Play an episode. The weights do not change meanwhile.
        state, _ = env.reset()
        done = False
        step = 0
        while not done:
            action, value, log_pi = agent.get_action(state)
            next_state, _, terminated, truncated, _ = env.step(action)
            step += 1
            done = terminated or truncated
            memory.add(state, action, reward_modify(step, done), value, log_pi)
            state = next_state

        # Not in the post: end if the last ten episodes have a mean above 199 steps.
        last_ten.add(step, agent.weights)
        run.steps += step
        run.record("PPO", step, last_ten.mean)
        if last_ten.meets_rule(MAX_STEPS):
            agent.weights = last_ten.mean_of_weights()
            run.is_learned = True
            return

        # 2. Learn from the episode. (Then it is forgotten: the next policy is another one.)
        memory.finish_path()
        agent.update(memory.get_batch())


# == Not needed to understand PPO: options, files, test ============================================

def main(argv=None):
    """Learn, then test and film what was learned. Return the exit status."""
    parser = common.make_parser("Learn CartPole with PPO.", "ppo_cartpole", MAX_EPISODES)
    args = common.read_options(parser, argv)
    if args.seed is not None:
        keras.utils.set_random_seed(args.seed)
    model = PVNet()
    common.check_same(model, Agent.predict)
    if args.play:
        common.load_weights(model, args.play)
    agent = Agent(model)
    if not args.play:
        run = common.Run(f"PPO, {ENV}", MAX_STEPS, args.out, ["PPO"])
        try:
            with run:
                learning_loop(agent, run, args.max_episodes, args.seed)
        finally:
            model.set_weights(agent.weights)
            run.keep({"PPO": model})
        if not run.is_learned:
            return 1
    common.test(ENV, lambda env: play_best(env, agent), "PPO", args)
    return 0


def play_best(env, agent):
    """Play an episode with the more probable action in each state. Return its steps."""
    state, _ = env.reset()
    done = False
    step = 0
    while not done:
        pi, _ = agent.predict(agent.weights, state)
        state, _, terminated, truncated, _ = env.step(int(pi.argmax()))
        step += 1
        done = terminated or truncated
    return step


if __name__ == "__main__":
    common.run_program(main)
