"""DQN on CartPole: a network learns the value of each action from a replay memory.

DQN is the deep Q-network: Q-learning with a network in the place of the Q-table. It learns Q(s, a):
the sum of the rewards to come, later ones counting less, if the agent takes the action a after the
states s, and then always the best action. It learns from steps that are drawn at random from a
memory. The targets, which Q is trained to approach, come from an older copy of the network, the
target network.

    python companions/dqn_cartpole.py   # one to two minutes; films: movie/dqn_cartpole

Learning ends when ten successive episodes have a mean above 499 steps (not as in the post). About
half of the runs do not get there in the post's 400 episodes and end with "not learned". They are
tested and filmed, too, and mostly play well.

This is the program of a post by 林 of DATUM STUDIO, for today's libraries:
「【Pythonで再現】DeepMindのDQNアルゴリズムを再現してみた」
https://datumstudio.jp/blog/deepmindのdqnアルゴリズムを再現してみた
The methods come in the order of its sections 3.1 to 3.5. Its parameters are the constants here.
"The paper" is Mnih et al., 2015, https://doi.org/10.1038/nature14236. README.md in this folder
lists what differs from the post.

Look first at `learn`, the loop of the algorithm, and at `_get_samples`, which makes the targets.

Symbols:
s            the history: the last four states of CartPole, (4,) each, the latest one last. In the
             code `agent_hist` is a deque of the four, and joined to (16,) in the memory.
a, r         action, reward. r is 1 for each step, also for a fall.
fall         the last step of an episode, if the pole leans too far or the cart is out of range
s'           the history one step after s
γ            the factor by which a reward counts less for each step that it comes later
Q(s, a)      the output of the network for the action a; Q̂(s, a): that of the target network

The post has two Keras networks, Q and target_Q. Here each is a list of weights: `Q` holds those of
`model` now, `target_Q` older ones. NumPy computes the outputs, which is faster.
"""
import collections
import random

import common

import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

ENV = "CartPole-v1"
MAX_STEPS = 500         # the time limit of an episode
STATE_SIZE = 4          # numbers in a state: cart position and velocity, pole angle and velocity
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right

N_EPISODES = 400        # episodes, at most
GAMMA = .99             # γ
AGENT_HIST_LEN = 4      # states in a history. The paper takes four images, as one shows no motion.
                        # States of CartPole contain velocities, so one may be enough.
C = 100                 # the target network is renewed at the steps 0, C, 2·C, ... of each episode

# -- constants of the replay memory
MEMORY_SIZE = 2000      # steps in the memory; a new one replaces the oldest
REPLAY_START_SIZE = 32  # random steps that are in the memory when learning starts
MB_SIZE = 32            # samples that are drawn from the memory at each step

# -- constants of ε-greedy: with probability ε the action is drawn at random
EPS = 1.                # ε at first
EPS_MIN = 1e-4          # ε at last
FINAL_EXPL_STEP = 1000  # choices until ε is EPS_MIN


class DQN:
    """The agent, its replay memory and its network. Post: section 3."""

    def __init__(self, seed=None):
        if seed is not None:
            keras.utils.set_random_seed(seed)               # for the weights and for `random`
        self.env = gym.make(ENV)
        self.env.reset(seed=random.getrandbits(31))         # so `seed` decides all resets, too
        self.eps = EPS
        self.eps_decay = (EPS - EPS_MIN) / FINAL_EXPL_STEP
        self._init_memory()

        # The scaler gives each of the 16 numbers of a history the mean 0 and the standard deviation
        # 1, over the 32 histories that are in the memory now. (Not as in the post: it is a layer of
        # the network. So a loaded network has the scaler with which it was trained.)
        self.scaler = keras.layers.Normalization()
        self.scaler.adapt(np.array([agent_hist for agent_hist, *_ in self.memory]))

        self.model = self._build_network()
        self._predict = common.numpy_forward(self.model)    # (weights, histories) → Q
        self.optimizer = keras.optimizers.Adam()            # learning rate 0.001
        self.Q = self.model.get_weights()
        self.target_Q = self.Q      # as good as a copy: a list is never changed, only replaced

    # -- 3.1 The Q-network. (The post's _clone_network and `compile` are not needed: see `target_Q`
    # in __init__, and `_train`.)

    def _build_network(self):
        """Define the network: B histories (B, 16) → Q of each action (B, 2)."""
        return keras.Sequential([
            keras.Input((AGENT_HIST_LEN * STATE_SIZE,)),
            self.scaler,
            keras.layers.Dense(20, activation="relu"),
            keras.layers.Dense(20, activation="relu"),
            keras.layers.Dense(10, activation="relu"),
            keras.layers.Dense(NUM_ACTIONS),
        ], name="dqn_cartpole")

    # -- 3.2 The best action

    def _get_optimal_action(self, network, agent_hist):
        """Choose the action with the larger Q after these four states."""
        return int(self._predict(network, np.concatenate(agent_hist)).argmax())

    def _get_action(self, agent_hist=None):
        """Choose an action: with probability ε at random, otherwise the one with the larger Q.

        Each call with a history lowers ε a little. Without one the action is random.
        """
        if agent_hist is None:
            return random.randrange(NUM_ACTIONS)
        self.eps = max(self.eps - self.eps_decay, EPS_MIN)
        if random.random() < self.eps:
            return random.randrange(NUM_ACTIONS)
        return self._get_optimal_action(self.Q, agent_hist)

    # -- 3.3 The replay memory

    def _remember(self, agent_hist, action, reward, new_state, terminated):
        """Add a step to the memory: the history before the action, and the state after it.

        `terminated` marks a fall, where the post stores None as the new state. If the memory is
        full, the oldest step is forgotten.
        """
        # Not as in the post: step 500 does not count as a fall, as the pole still stands. The post
        # gives it the target 1 (see _get_samples), though a similar history earlier in an episode
        # may have a target near 100. The network sees no clock, so it would learn something in
        # between.
        self.memory.append((np.concatenate(agent_hist), action, reward, new_state, terminated))

    def _init_memory(self):
        """Play at random until the memory holds 32 steps."""
        self.memory = collections.deque(maxlen=MEMORY_SIZE)
        while True:
            state, _ = self.env.reset()
            agent_hist = collections.deque([state], maxlen=AGENT_HIST_LEN)
            terminated = False
            while not terminated:
                action = self._get_action()
                new_state, reward, terminated, _, _ = self.env.step(action)
                if len(agent_hist) == AGENT_HIST_LEN:
                    self._remember(agent_hist, action, reward, new_state, terminated)
                    if len(self.memory) == REPLAY_START_SIZE:
                        return
                agent_hist.append(new_state)

    # -- 3.4 Experience replay (経験再生)

    def _get_samples(self):
        """Draw 32 steps from the memory. Return their histories (32, 16) and targets Y (32, 2).

        The target for Q(s, a) is

            r                       for a fall
            r + γ·max Q̂(s', a')    otherwise, with the larger value of the two actions a'

        The target is 1 for a fall. It is 1 + γ = 1.99 for the step before, if no action can avoid
        the fall any more and Q̂ is already right. So Q tends to become right near falls first, and
        roughly one step farther back with each renewal of the target network. If the pole never
        fell, Q would be 1 + γ + γ² + ... = 1/(1 - γ) = 100.

        Why at random? Successive steps resemble each other. A network that learns them in order may
        fit the latest ones and forget others (the post: it may end in a local minimum).

        Why may old steps be used? Their actions were chosen by an older network, or by chance, but
        this does not make their targets wrong: which r and s' follow s and a depends on CartPole
        alone, and after s' the target takes the larger Q̂, not the action that was really taken.
        """
        samples = random.sample(self.memory, MB_SIZE)
        # Make one array of all histories, one of all actions, and so on.
        columns = [np.array(column) for column in zip(*samples)]
        agent_hists, actions, rewards, new_states, terminated = columns

        # s' is s without its oldest state, and with the new one.
        new_agent_hists = np.hstack([agent_hists[:, STATE_SIZE:], new_states])
        future_rewards = self._predict(self.target_Q, new_agent_hists).max(axis=1)
        future_rewards[terminated] = 0

        # The step says nothing about the other action. As in the post, its target is what the
        # target network gives, so it is held near that. (In the paper it does not enter the loss.)
        Y = self._predict(self.target_Q, agent_hists)
        Y[np.arange(MB_SIZE), actions] = rewards + GAMMA * future_rewards
        return agent_hists, Y

    def _replay(self):
        """Draw 32 samples, and let the network learn them one after another.

        As in the post, each sample is one update. In the paper all 32 together make one.
        """
        agent_hists, Y = self._get_samples()
        weights = self._train(tf.constant(agent_hists), tf.constant(Y))
        self.Q = [weight.numpy() for weight in weights]     # (model.get_weights() takes longer)

    # The post's `Q.train_on_batch` of each sample. XLA compiles the 32 updates, which is more than
    # twice as fast. (autograph would read this file again, perhaps after an edit.)
    @tf.function(jit_compile=True, autograph=False)
    def _train(self, agent_hists, Y):
        """Move Q towards the targets, one sample after another. Return the new weights."""
        variables = self.model.trainable_variables

        def train_on_sample(i):
            with tf.GradientTape() as tape:     # records what is computed, to find its gradients
                q = self.model(agent_hists[i][tf.newaxis])[0]           # (2,); a batch of one
                loss = tf.reduce_mean(tf.square(Y[i] - q))              # "mse" over both actions
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return i + 1

        # `for i in range(MB_SIZE)`, as a loop of TensorFlow. (A loop of Python would be compiled as
        # 32 updates in a row, which takes 15 s at the start.)
        tf.while_loop(lambda i: i < MB_SIZE, train_on_sample, [0])
        return self.model.weights

    # -- 3.5 Learning

    def learn(self, run):
        """Play episodes, and learn at each step. Paper: Algorithm 1.

        `run`, a common.Run, counts and shows the episodes. It ends learning after N_EPISODES, as
        the post's `for`, or sooner (see the top).
        """
        while True:
            state, _ = self.env.reset()
            agent_hist = collections.deque([state], maxlen=AGENT_HIST_LEN)
            for step in range(MAX_STEPS):
                # Choose an action. The first three of each episode are random.
                if len(agent_hist) < AGENT_HIST_LEN:
                    action = self._get_action()
                else:
                    action = self._get_action(agent_hist)

                # Do it.
                new_state, reward, terminated, truncated, _ = self.env.step(action)
                run.steps += 1

                # Remember it, and learn from 32 of all remembered steps.
                if len(agent_hist) == AGENT_HIST_LEN:
                    self._remember(agent_hist, action, reward, new_state, terminated)
                    self._replay()

                # Renew the target network. If Q itself were in the targets, an update that raises
                # Q(s, a) would often raise Q(s', a') and so its own target, too, and both could
                # grow without end. As in the post, `step` restarts at 0, so each episode begins
                # with a renewal, and short ones (up to C steps) have no other. In the paper the
                # count goes on across episodes.
                if step % C == 0:
                    self.target_Q = self.Q

                if terminated or truncated:
                    break
                agent_hist.append(new_state)

            # The score of an episode is its steps, as each gives the reward 1. (Not as in the post,
            # which keeps the last target network: `run` averages the weights of ten of them, one
            # from the end of each of the ten best successive episodes.)
            if run.finish_episode("agent", step + 1, self.target_Q):
                return


# == Not needed to understand DQN: options, files, test ============================================

def main(argv=None):
    """Learn, then test what was learned. Return the exit status."""
    parser = common.make_parser("Learn CartPole with DQN, then film it.", "dqn_cartpole",
                                N_EPISODES)
    args = common.parse_options(parser, argv)
    dqn = DQN(args.seed)
    # common.Run draws the scores and tests, like plot_training_scores and `run` of the post. As
    # there, the history of a test is at first the first state, four times.
    env = gym.wrappers.FrameStackObservation(gym.make(ENV, render_mode="rgb_array"), AGENT_HIST_LEN)
    run = common.Run(dqn.model, env, f"DQN, {ENV}", args)
    if not args.play:
        with run:
            dqn.learn(run)
    return run.test(dqn._get_optimal_action)


if __name__ == "__main__":
    common.run_program(main)
