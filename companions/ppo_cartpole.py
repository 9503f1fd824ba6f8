"""PPO on CartPole, with one network for the policy and the value: Keras and TensorFlow, on the CPU.

PPO is Proximal Policy Optimization. Like A3C it makes good actions more probable and bad ones less,
but it learns more from what it has seen. It plays one whole episode, then learns from it in up to
80 iterations, each of them one step of the optimizer. A3C takes a single step and forgets. So many
iterations may change the policy too far, because the episode says only how good the actions were
under the old policy. PPO's answer is the clip: once the probability of an action has changed by a
fifth in the direction that pays, going further gains nothing. The post also stops early.

    python -m companions.ppo_cartpole   # learns in some ten seconds; look into movie/ppo_cartpole

This is the program of a post by tsubame-mz, 「PPOの実装(ネットワーク共有版)」 (blog 「雨宿り」),
for today's libraries. Its code is RL/ppo.py, commit d2b2fb2, in
https://github.com/tsubame-mz/machine_learning. "The paper" is Schulman et al., 2017,
https://arxiv.org/abs/1707.06347. The classes and methods stand in the order of the post. All of
PPO stands above the line "Not needed to understand PPO".

Symbols
s, a, r           state, action, reward; s(t), a(t), r(t) those of step t of an episode
π(a|s)            the probability of the action a in the state s, `pi` in the code
R                 the return: the discounted sum of the rewards from a step on
V(s)              the value of s: the return that the network expects from s on
A                 the advantage: how much better than expected an action turned out
old               in names: computed while the episode was played, before the network changed
T                 in shapes: the steps of the episode

To understand                          read
how playing and learning alternate     learning_loop
what an action was worth               Memory.finish_path
how PPO learns from it                 Agent.iterate, then Agent.losses

What differs from the post, and is needed to read the code:
- Keras and TensorFlow replace PyTorch. The iterations of an update are one compiled function. The
  post's update is three methods here: update, iterate and losses.
- To play, the network is computed in NumPy, which is faster for a single state than Keras.
What the post has wrong:
- Its value loss compares each value with the returns of all steps (see Agent.losses).
- It makes the entropy small where the paper makes it large (see Agent.iterate).
- The number that its code calls the KL divergence is minus an estimate of it. Its text says that
  it is not strictly one. The rule for stopping is kept, but not the name (see Agent.losses).
  README.md tells what the sign does.
- Its text prints γ^i where γ^(i - t) is meant, and a reward of 0 for a fall, which is -1 in its
  code. Here both are as in its code.
What is added for convenience:
- The program ends by itself, and then keeps the mean of the weights of ten episodes. A test of ten
  episodes follows, with the most probable action. Weights, history and pictures are saved. With
  --seed a run can be repeated.
"""
import collections
import contextlib
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # to run it by its path, too
import a3c_cartpole as base  # noqa: I001   first, because it sets up Keras and TensorFlow
import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

# -- constants of the game
ENV = "CartPole-v0"     # an episode ends after 200 steps at the latest
NUM_STATES = 4          # cart position, cart velocity, pole angle, pole angular velocity
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right
GOOD_STEPS = 195        # an episode of fewer steps counts as a fall, see reward_modify
MAX_EPISODES = 500

# -- constants of the network
HID_NUM = 64            # units of each of the two shared layers
DROPRATE = .2           # fraction of these units that dropout leaves out while learning

# -- constants of the memory
GAMMA = .99             # γ: a reward k steps ahead counts γ^k
LAM = .95               # λ: how much the later steps count in the advantage, see finish_path
ADV_EPS = 1e-6          # keeps a division by a standard deviation of 0 from failing

# -- constants of learning
LEARNING_RATE = 1e-4    # of Adam
ADAM_EPSILON = 1e-8     # of Adam, in PyTorch; Keras' own is 1e-7
TRAIN_ITERS = 80        # iterations that learn from one episode, at most
CLIP_RATIO = .2         # ε of the paper: a ratio outside 0.8 to 1.2 is clipped, see Agent.losses
V_LOSS_C = .9           # coefficient of the value loss
ENT_C = 1e-3            # coefficient of the entropy, which keeps the policy from settling too early
TARGET_KL = .01         # iterations end above 1.5 times this; it is no KL, see Agent.losses


class PVNet(keras.Model):
    """The network: s (T, 4) → π of each action (T, 2) and V(s) (T, 1). Post: 「学習モデル」.

    Policy and value share two layers and then branch. Agent.predict writes the same network out in
    NumPy: change both together.
    """

    def __init__(self, seed=None, droprate=DROPRATE):
        if seed is not None:
            keras.utils.set_random_seed(seed)       # fixes the first weights, and dropout
        # Dropout sets units to 0 at random, others at each iteration, and makes the rest larger in
        # return. It is on only where the network is called with training=True.
        state = keras.Input((NUM_STATES,), name="state")
        h = self.dense(HID_NUM, "relu", "layer1")(state)
        h = keras.layers.Dropout(droprate)(h)
        h = self.dense(HID_NUM, "relu", "layer2")(h)
        h = keras.layers.Dropout(droprate)(h)
        pi = self.dense(NUM_ACTIONS, "softmax", "policy")(h)
        value = self.dense(1, "linear", "value")(h)
        # From input and outputs Keras makes what the post writes in `forward`.
        super().__init__(state, [pi, value], name="PPO")

    @staticmethod
    def dense(units, activation, name):
        """Make a layer with a bias of 0 and a kernel drawn from Xavier's normal distribution.

        Its variance is 2 / (inputs + outputs), as with the post's xavier_normal_. Keras' own
        "glorot_normal" would cut off the largest values.
        """
        xavier_normal = keras.initializers.VarianceScaling(1., "fan_avg", "untruncated_normal")
        return keras.layers.Dense(units, activation, name=name, kernel_initializer=xavier_normal)


class Memory:
    """Remembers the steps of one episode, and computes what each was worth. Post: 「Memory」."""

    def __init__(self):
        self.initialize()

    def initialize(self):
        """Forget everything."""
        self.state_lst = []         # s, (4,) each
        self.action_lst = []        # a, 0 or 1
        self.reward_lst = []        # r
        self.value_lst = []         # V(s)
        self.log_pi_lst = []        # log π(a|s)
        self.return_lst = []        # R, from finish_path on
        self.advantage_lst = []     # A, from finish_path on

    def add(self, state, action, reward, value, log_pi):
        """Remember one step."""
        self.state_lst.append(state)
        self.action_lst.append(action)
        self.reward_lst.append(reward)
        self.value_lst.append(value)
        self.log_pi_lst.append(log_pi)

    def finish_path(self, gamma=GAMMA, lam=LAM):
        """Compute the return and the advantage of each step of an episode that has ended.

            R(t) = r(t) + γ·r(t+1) + γ²·r(t+2) + …

        The advantage is GAE, generalized advantage estimation (https://arxiv.org/abs/1506.02438,
        equation 16):

            δ(t) = r(t) + γ·V(s(t+1)) - V(s(t))
            A(t) = δ(t) + γλ·δ(t+1) + (γλ)²·δ(t+2) + …

        δ(t) says how much better one step went than V had expected. With λ = 0, A is δ: it relies
        on V, which may still be wrong. With λ = 1, A is R - V(s): it depends on all later actions,
        and so on chance. λ = .95 is in between.
        """
        T = len(self.reward_lst)
        self.return_lst = np.zeros(T)
        self.advantage_lst = np.zeros(T)
        # Go backwards, so that each sum is made from the sum of the step after it:
        # R(t) = r(t) + γ·R(t+1) and A(t) = δ(t) + γλ·A(t+1). After the end of the episode all are
        # 0. As in the post, the time limit counts as an end like any other.
        next_return = 0.
        next_value = 0.
        next_advantage = 0.
        for t in reversed(range(T)):
            reward = self.reward_lst[t]
            value = self.value_lst[t]
            delta = reward + gamma * next_value - value
            self.return_lst[t] = reward + gamma * next_return
            self.advantage_lst[t] = delta + gamma * lam * next_advantage
            next_return = self.return_lst[t]
            next_value = value
            next_advantage = self.advantage_lst[t]

    def get_batch(self, adv_eps=ADV_EPS):
        """Return the episode as arrays, in the order of Agent.iterate, and forget it.

        The advantages are standardized (標準化): their mean becomes 0, their variance 1. So the
        actions that did better than the average of this episode are made more probable, and the
        others less, even in an episode that went well throughout.
        """
        advantage = np.asarray(self.advantage_lst)
        # PyTorch divides by T - 1 in a standard deviation, hence ddof=1.
        advantage = (advantage - advantage.mean()) / (advantage.std(ddof=1) + adv_eps)
        batch = (np.array(self.state_lst, np.float32),          # (T, 4)
                 np.array(self.action_lst, np.int32),           # (T,)
                 np.array(self.log_pi_lst, np.float32),         # (T,)
                 np.array(self.return_lst, np.float32),         # (T,)
                 np.array(advantage, np.float32))               # (T,)
        self.initialize()
        return batch


class Agent:
    """Chooses the actions, and learns from the episodes they make. Post: 「Agent」."""

    def __init__(self, model, seed=None):
        self.model = model
        self.weights = model.get_weights()      # the same weights as NumPy arrays, for `predict`
        self.optimizer = keras.optimizers.Adam(LEARNING_RATE, epsilon=ADAM_EPSILON)
        # Adam's own variables must be made here, because `iterate`, once compiled, cannot.
        self.optimizer.build(model.trainable_variables)
        self.rng = random.Random(seed)

    def predict(self, state):
        """Compute π of each action (2,) and V(s), a number, for one state (4,), without dropout.

        In NumPy, because for a single state this is 100 times as fast as asking Keras. PVNet builds
        the same network: change both together.
        """
        (kernel_1, bias_1, kernel_2, bias_2,
         policy_kernel, policy_bias, value_kernel, value_bias) = self.weights
        h = np.maximum(state @ kernel_1 + bias_1, 0)        # relu
        h = np.maximum(h @ kernel_2 + bias_2, 0)
        z = h @ policy_kernel + policy_bias
        exp_z = np.exp(z - z.max())                         # - max, so that it cannot overflow
        pi = exp_z / exp_z.sum()                            # softmax
        value = h @ value_kernel + value_bias
        return pi, float(value[0])

    def get_action(self, state, greedy=False):
        """Draw an action for a state (4,). Return it with V(s) and log π(a|s).

        Not in the post: with `greedy`, for the test, take the most probable action.
        """
        pi, value = self.predict(state)
        if greedy:
            action = int(pi.argmax())
        else:
            action = self.rng.choices(range(NUM_ACTIONS), pi.tolist())[0]
        log_pi = float(np.log(pi[action] + 1e-10))      # not in the post: never log 0
        return action, value, log_pi

    def update(self, batch):
        """Learn from the arrays of one episode, and return the number of iterations.

        Post: 「update()」, together with the next two methods. Not in the post: raises
        FloatingPointError if a weight is not finite afterwards, and leaves the weights as they
        were.
        """
        iterations = int(self.iterate(*batch))
        weights = self.model.get_weights()
        if not all(np.isfinite(weight).all() for weight in weights):
            self.model.set_weights(self.weights)
            raise FloatingPointError(f"a weight is not finite after {iterations} iterations")
        self.weights = weights
        return iterations

    # TensorFlow compiles this function with its loop and its `break`, once for all episodes. None
    # stands for T, which differs from episode to episode.
    @tf.function(input_signature=[
        tf.TensorSpec([None, NUM_STATES]),      # state
        tf.TensorSpec([None], tf.int32),        # action
        tf.TensorSpec([None]),                  # old_log_pi
        tf.TensorSpec([None]),                  # returns
        tf.TensorSpec([None])])                 # advantage
    def iterate(self, state, action, old_log_pi, returns, advantage):
        """Take up to TRAIN_ITERS steps of Adam, each from the whole episode. Return how many."""
        iterations = 0
        for _ in tf.range(TRAIN_ITERS):
            # The tape records what is computed inside `with`, to find the gradient of it.
            with tf.GradientTape() as tape:
                pi, value = self.model(state, training=True)
                pi_loss, v_loss, entropy, mean_log_ratio = self.losses(
                    pi, value, action, old_log_pi, returns, advantage)
                # The paper's equation 9. The entropy is subtracted, so that it becomes larger as
                # the loss becomes smaller. The post adds it.
                total_loss = pi_loss + V_LOSS_C * v_loss - ENT_C * entropy
            gradients = tape.gradient(total_loss, self.model.trainable_variables)
            self.optimizer.apply(gradients)
            iterations += 1
            # The post's second rule against going too far: stop if, before this step of Adam, the
            # actions of the episode had already become more probable by 1.5 % on average.
            if mean_log_ratio > 1.5 * TARGET_KL:
                break
        return iterations

    @staticmethod
    def losses(pi, value, action, old_log_pi, returns, advantage):
        """Compute the losses of policy and value, the entropy, and the mean of log(ratio).

        pi (T, 2), value (T, 1), all others (T,).
        """
        # The ratio π(a|s) / π_old(a|s): how probable an action is now, relative to when it was
        # played. Dropout is on here and was off then, so the ratio is not 1 even before the first
        # step of Adam.
        pi_of_action = tf.reduce_sum(pi * tf.one_hot(action, NUM_ACTIONS), axis=1)      # (T,)
        log_ratio = tf.math.log(pi_of_action + 1e-10) - old_log_pi                      # (T,)
        ratio = tf.exp(log_ratio)                                                       # (T,)

        # The policy loss, the paper's equation 7. An optimizer makes a loss small, hence the minus.
        # So ratio·A becomes large: good actions become more probable, bad ones less. The clip sets
        # an end to this. The minimum of ratio·A and clipped_ratio·A, with A for `advantage`, is:
        #
        #             ratio < 1 - ε     in between    ratio > 1 + ε
        #     A > 0   ratio·A           ratio·A       (1 + ε)·A       a good action
        #     A < 0   (1 - ε)·A         ratio·A       ratio·A         a bad action
        #
        # (1 + ε)·A and (1 - ε)·A do not depend on the network. Their gradient is 0: this action
        # has changed enough. In the other two corners it has changed in the wrong direction, and
        # the gradient leads it back. With the post's clip_adv the minimum is the same.
        clipped_ratio = tf.clip_by_value(ratio, 1 - CLIP_RATIO, 1 + CLIP_RATIO)
        pi_loss = -tf.reduce_mean(tf.minimum(ratio * advantage, clipped_ratio * advantage))

        # The value loss moves V(s) towards R. Both have the shape (T,). The post subtracts (T, 1)
        # from (T,), of which PyTorch makes (T, T): each value is drawn to the mean of all returns.
        v_loss = tf.reduce_mean(tf.square(returns - value[:, 0]))

        # The entropy is large while the policy hesitates between the actions.
        entropy = tf.reduce_mean(-tf.reduce_sum(pi * tf.math.log(pi + 1e-10), axis=1))

        # This mean is above 0 if the actions of the episode have become more probable. The post
        # calls it `kl`. But it is minus this mean that estimates the Kullback-Leibler divergence
        # KL(π_old, π), a measure of how far two policies are apart.
        mean_log_ratio = tf.reduce_mean(log_ratio)
        return pi_loss, v_loss, entropy, mean_log_ratio


def reward_modify(step, done):
    """Return the post's reward after so many steps, in place of gym's 1 for every step.

    It is 0 until the episode ends. Then it is 1 if the pole has stood for GOOD_STEPS, or else -1.
    Post: with gym's own rewards it did not go well (「うまくいかなかった」).
    """
    if not done:
        return 0.
    if step >= GOOD_STEPS:
        return 1.
    return -1.


def run_episode(env, agent, memory=None):
    """Play one episode and return its number of steps. Without a memory it is a greedy test."""
    state, _ = env.reset()
    step = 0
    done = False
    while not done:
        action, value, log_pi = agent.get_action(state, greedy=memory is None)
        next_state, _, terminated, truncated, _ = env.step(action)
        step += 1
        done = terminated or truncated
        if memory is not None:
            memory.add(state, action, reward_modify(step, done), value, log_pi)
        state = next_state
    return step


def learning_loop(agent, progress):
    """Play and learn in turns. Post: 「学習ループ」.

    Not in the post: it ends as soon as the last ten episodes meet the main file's rule.
    """
    env = gym.make(ENV, disable_env_checker=True)
    env.reset(seed=agent.rng.getrandbits(31))               # seeds all later resets
    memory = Memory()
    total_steps = 0
    last_steps = collections.deque([0] * 10, maxlen=10)     # of the last ten episodes
    last_weights = collections.deque(maxlen=10)             # with which they were played
    for episode in range(1, progress.max_episodes + 1):
        # 1. Play an episode. The weights do not change meanwhile.
        last_weights.append(agent.weights)
        step = run_episode(env, agent, memory)

        # 2. Compute what each step was worth.
        memory.finish_path()

        # 3. Learn from it, then forget it: the next episode is played by another policy.
        agent.update(memory.get_batch())

        # Not in the post: end if the last ten episodes had more than 199 steps on average. Each of
        # them was played with other weights. As in the main file, the mean of these ten is kept.
        total_steps += step
        last_steps.append(step)
        mean = np.mean(last_steps)
        meets_rule = mean > progress.limit - 1
        is_counted = progress.finish_episode(       # False if learning is already over
            "PPO", episode, step, mean, total_steps, meets_rule)
        if not is_counted:
            return
        if meets_rule:
            agent.weights = [np.mean(weights, axis=0) for weights in zip(*last_weights)]
            agent.model.set_weights(agent.weights)
            return


# == Not needed to understand PPO: options, files, films ===========================================

def main(argv=None):
    """Learn, then test and film what was learned. Return the exit status."""
    args = read_options(argv)
    model = PVNet(args.seed)
    if args.play:
        base.load_weights(model, args.play)
    agent = Agent(model, args.seed)
    if not args.play:
        is_learned = learn(agent, args)
        if not is_learned:
            return 1

    env = gym.make(ENV, disable_env_checker=True, render_mode="rgb_array")
    env.reset(seed=agent.rng.getrandbits(31))
    with contextlib.closing(base.film(env, args.out, "PPO", args.render)) as env:
        base.play(lambda: run_episode(env, agent), args.test_episodes)
    return 0


def learn(agent, args):
    """Run the learning loop, and keep what came of it. Return whether it has learned.

    It runs in a thread, so that this thread can show the progress and take Ctrl-C.
    """
    progress = base.Progress(ENV, args.max_episodes)
    is_learned = False
    steps = 0
    try:
        base.run_threads({"PPO": lambda: learning_loop(agent, progress)}, progress, args.log)
    finally:
        if progress.history:
            last = progress.history[-1]
            is_learned = last.mean_of_last_10 > progress.limit - 1
            steps = last.total_steps
        with base.no_interruption():
            base.keep({"PPO": agent.model}, progress, is_learned, steps, f"PPO, {ENV}", args.out)
    return is_learned


def read_options(argv):
    """Read the command line of this program."""
    parser = base.make_parser("Learn CartPole with PPO, then film what was learned.",
                              "movie/ppo_cartpole")
    parser.add_argument("--max-episodes", default=MAX_EPISODES, type=base.positive,
                        help="give up after so many episodes")
    return base.check_options(parser, parser.parse_args(argv))


if __name__ == "__main__":
    base.run_program(main)
