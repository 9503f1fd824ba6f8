"""DQN on CartPole: a network learns the value of each action from a replay memory.

DQN is the deep Q-network. It learns Q(s, a), the discounted sum of the rewards to come if the agent
takes the action a in the state s, and afterwards always the action with the larger Q. It learns
from steps that are drawn at random from a memory. The values that Q shall approach, its targets,
come from an older copy of the network, the target network.

    python companions/dqn_cartpole.py   # one to two minutes; films: movie/dqn_cartpole

About half of the runs end with "not learned": within the post's 400 episodes they had no ten
successive ones with a mean above 499 steps. (The post has no such rule.) What they have learned is
tested and filmed, too. It mostly plays well.

This is the program of a post by 林 of DATUM STUDIO, for today's libraries:
「【Pythonで再現】DeepMindのDQNアルゴリズムを再現してみた」
https://datumstudio.jp/blog/deepmindのdqnアルゴリズムを再現してみた
The methods come in the order of its sections 3.1 to 3.5. Its parameters are the constants here.
"The paper" is Mnih et al., 2015, https://doi.org/10.1038/nature14236. README.md in this folder
lists what differs from the post.

Look at `learn`, which is the whole algorithm, and at `_get_samples`, which makes the targets.

Symbols:
s            what the network sees, a history (16,): the last four states (4,), the latest one last.
             In the code a history is `agent_hist`, and `state` is one of its states.
a, r         action, reward. r is 1 for each step, also for the one with the fall.
s'           the history one step after s
γ            the factor by which a reward counts less for each step that it comes later
Q(s, a)      the output of the network for the action a; Q̂(s, a): that of the target network
B            in shapes, the size of a batch

The post has two Keras networks, Q and target_Q. Here there is one, `model`, which learns. `Q` is a
list of its weights as they are now, `target_Q` a list of older ones.
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
AGENT_HIST_LEN = 4      # states in a history. The paper takes four images, because a single one
                        # does not show how things move. A state of CartPole contains velocities, so
                        # one would be enough.
C = 100                 # the target network is renewed at the steps 0, C, 2·C, ... of each episode

# -- constants of the replay memory
MEMORY_SIZE = 2000      # steps in the memory; a new one replaces the oldest
REPLAY_START_SIZE = 32  # steps with random actions in the memory when learning starts
MB_SIZE = 32            # samples that are drawn from the memory at each step

# -- constants of ε-greedy: with probability ε the action is drawn at random
EPS = 1.                # ε at first
EPS_MIN = 1e-4          # ε in the end
FINAL_EXPL_STEP = 1000  # ε falls during this number of steps


class DQN:
    """The agent, its replay memory and its network. Post: section 3."""

    def __init__(self, seed=None):
        if seed is not None:
            keras.utils.set_random_seed(seed)               # for the weights and for `random`
        self.env = gym.make(ENV, disable_env_checker=True)
        self.env.reset(seed=random.getrandbits(31))         # seeds all later resets, too
        self.eps = EPS
        self.eps_decay = (EPS - EPS_MIN) / FINAL_EXPL_STEP
        self._init_memory()

        # The scaler gives each of the 16 numbers of a history the mean 0 and the standard deviation
        # 1, over the 32 histories that are in the memory now. It does not change afterwards. (Not
        # as in the post: it is a layer of the network, so it is saved with the weights.)
        self.scaler = keras.layers.Normalization()
        self.scaler.adapt(np.array([agent_hist for agent_hist, *_ in self.memory]))

        self.model = self._build_network()
        self._predict = common.numpy_forward(self.model)    # the network in NumPy, with any weights
        self.optimizer = keras.optimizers.Adam()            # learning rate 0.001
        self.Q = self.model.get_weights()
        self.target_Q = self.Q

    # -- 3.1 The Q-network

    def _build_network(self):
        """Define the network: histories (B, 16) → Q of each action (B, 2)."""
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

        Each such call lowers ε a little. Without a history the action is random, and ε stays.
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

        `terminated` says that the pole fell in this step, or the cart went out of range. If the
        memory is full, the oldest step is forgotten.
        """
        # Not as in the post: the time limit does not count as an end. There the pole still stands.
        # The post gives this step, too, the target 1 (see _get_samples). Earlier in an episode the
        # same history has a target of up to 100, and the network sees no clock, so it would learn
        # something in between.
        self.memory.append((np.concatenate(agent_hist), action, reward, new_state, terminated))

    def _init_memory(self):
        """Play at random until the memory holds 32 steps."""
        self.memory = collections.deque(maxlen=MEMORY_SIZE)
        while True:
            state, _ = self.env.reset()
            agent_hist = collections.deque([state], maxlen=AGENT_HIST_LEN)
            done = False
            while not done:
                action = self._get_action()
                new_state, reward, terminated, truncated, _ = self.env.step(action)
                done = terminated or truncated      # (truncated: by the time limit)
                if len(agent_hist) == AGENT_HIST_LEN:
                    self._remember(agent_hist, action, reward, new_state, terminated)
                    if len(self.memory) == REPLAY_START_SIZE:
                        return
                agent_hist.append(new_state)

    # -- 3.4 Experience replay (経験再生)

    def _get_samples(self):
        """Draw 32 steps from the memory. Return their histories (32, 16) and targets Y (32, 2).

        Why at random? Successive steps resemble each other. A network that learns them in order may
        fit the latest ones and forget others (the post: it may end in a local minimum).

        Why may old steps be used? Their actions were chosen by an older network, or by chance, but
        this does not make their targets wrong: which r and s' follow s and a depends on CartPole
        alone, and after s' the target takes the larger Q̂, not the action that was really taken.

        The target for Q(s, a) is

            r                       if the pole falls in this step, or the cart is out of range
            r + γ·max Q̂(s', a')    otherwise, with the larger value of the two actions a'

        It is 1 for the step with the fall. It is 1 + γ = 1.99 for the step before, if no action can
        prevent the fall any more and Q̂ is already right. So Q becomes right near falls first, and
        roughly one step farther back with each renewal of the target network. If the pole never
        fell, Q would be 1 + γ + γ² + ... = 1/(1 - γ) = 100.
        """
        samples = random.sample(self.memory, MB_SIZE)
        # Make one array of all histories, one of all actions, and so on.
        columns = [np.array(column) for column in zip(*samples)]
        agent_hists, actions, rewards, new_states, terminated = columns

        # s' is s without its oldest state, and with the new one.
        new_agent_hists = np.hstack([agent_hists[:, STATE_SIZE:], new_states])
        future_rewards = self._predict(self.target_Q, new_agent_hists).max(axis=1)
        future_rewards[terminated] = 0

        # The step says nothing about the other action. As in the post, the target network gives its
        # target, so it is pulled back to its value at the last renewal. (In the paper only the
        # action that was taken enters the loss.)
        Y = self._predict(self.target_Q, agent_hists)
        Y[np.arange(MB_SIZE), actions] = rewards + GAMMA * future_rewards
        return agent_hists, Y

    def _replay(self):
        """Draw 32 samples, and let the network learn them one after another.

        In the paper all 32 together make a single update.
        """
        agent_hists, Y = self._get_samples()
        weights = self._train(tf.constant(agent_hists), tf.constant(Y))
        self.Q = [weight.numpy() for weight in weights]     # a new list; the old one stays as it is

    @tf.function(jit_compile=True, autograph=False)     # compiled by XLA: more than twice as fast
    def _train(self, agent_hists, Y):
        """Move Q towards the targets: 32 updates of one sample each. Return the new weights.

        An update is what the post's train_on_batch does.
        """
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

        `run` counts and shows the episodes, and says when learning is over: see common.Run.
        """
        while True:
            state, _ = self.env.reset()
            agent_hist = collections.deque([state], maxlen=AGENT_HIST_LEN)
            for step in range(MAX_STEPS):
                # Choose an action, at random until there are four states.
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
                # grow without end. `step` starts again at 0 in each episode, so each episode begins
                # with a renewal, and short ones (up to C steps) have no other. In the paper the
                # count goes on across episodes.
                if step % C == 0:
                    # This is as good as a copy (the post's _clone_network): the next replay makes a
                    # new list for Q, and does not change this one.
                    self.target_Q = self.Q

                if terminated or truncated:
                    break
                agent_hist.append(new_state)

            # The score of an episode is its steps, as each gives the reward 1. (Not as in the post,
            # which keeps the last target network: `run` keeps the mean of the target networks after
            # the ten best successive episodes. And learning may end early.)
            if run.finish_episode("agent", step + 1, self.target_Q):
                return


# == Not needed to understand DQN: options, files, test ============================================

def main(argv=None):
    """Learn, then test what was learned. Return the exit status."""
    parser = common.make_parser("Learn CartPole with DQN, then film it.", "dqn_cartpole",
                                N_EPISODES)
    args = common.parse_options(parser, argv)
    dqn = DQN(args.seed)
    # As in the post, the history of a test is at first the first state, four times.
    env = gym.wrappers.FrameStackObservation(gym.make(ENV, render_mode="rgb_array"), AGENT_HIST_LEN)
    run = common.Run(dqn.model, env, f"DQN, {ENV}", args)
    if not args.play:
        with run:
            dqn.learn(run)
    return run.test(dqn._get_optimal_action)


if __name__ == "__main__":
    common.run_program(main)
