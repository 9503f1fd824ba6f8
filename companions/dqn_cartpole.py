"""DQN on CartPole: a network learns the value of each action from a replay memory.

DQN is the deep Q-network. It learns Q(s, a), the discounted sum of the rewards to come if the agent
takes the action a in the state s, and afterwards always the action with the larger Q. It learns
from steps that are drawn at random from a memory. The values that Q shall approach, its targets,
come from an older copy of the network, the target network.

    python -m companions.dqn_cartpole   # about a minute; films are then in movie/dqn_cartpole

This is the program of a post by 林 of DATUM STUDIO, for today's libraries:
「【Pythonで再現】DeepMindのDQNアルゴリズムを再現してみた」
https://datumstudio.jp/blog/deepmindのdqnアルゴリズムを再現してみた
The methods come in the order of its sections 3.1 to 4. Its parameters are the constants here.
"The paper" is Mnih et al., 2015, https://doi.org/10.1038/nature14236.

Look at `learn`, which is the whole algorithm, and at `_get_samples`, which makes the targets.

Symbols:
s            what the network sees, a history (16,): the last four states (4,), the latest one last.
             In the code a history is `agent_hist`, and `state` is one of its states.
a, r         action, reward. r is 1 for each step, also for the one with the fall.
s'           the history one step after s
γ            the weight of a reward that comes one step later
Q(s, a)      the output of the network for the action a; Q̂(s, a): that of the target network
B            the size of a batch, in shapes

What differs from the post, and is needed to read the code:
- The post has two Keras networks, Q and target_Q. Here there is one, `model`, which learns. `Q` is
  a copy of its weights, a list of arrays, made anew after each replay. `target_Q` is an older such
  copy, which stays as it is until the next renewal. So there is no _clone_network.
- The 32 calls of train_on_batch in a replay are one compiled function, `_train`.
- The memory holds `done`, where the post has None in place of the new state.
Corrected:
- In the post the time limit counts as a fall: see `learn`.
- The scaler is the first layer of the network, so that it is saved with the weights. In the post a
  new DQN object makes a new scaler, which does not fit the network that it loads.
Added: the mean of ten target networks is tested, and not the last one: see `Run`. Learning ends
before the post's 400 episodes if the last ten have a mean above 499 steps, the rule of
a3c_cartpole.py. learning_curve.png replaces plot_training_scores.
"""
import collections
import random

from companions import common

import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

ENV = "CartPole-v1"
MAX_STEPS = 500         # the time limit of an episode
STATE_SIZE = 4          # numbers in a state: cart position and velocity, pole angle and velocity
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right

N_EPISODES = 400        # episodes of learning at most
GAMMA = .99             # γ
AGENT_HIST_LEN = 4      # states in a history. The paper takes four images, because a single one
                        # does not show how things move. A state of CartPole contains velocities, so
                        # one would be enough; the post takes four, too.
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
        self.env.reset(seed=random.getrandbits(31))         # fixes all later resets, too
        self.eps = EPS
        self.eps_decay = (EPS - EPS_MIN) / FINAL_EXPL_STEP
        self._init_memory()

        # The scaler gives each of the 16 numbers of a history the mean 0 and the standard deviation
        # 1, over the 32 histories that are in the memory now. It does not change afterwards.
        self.scaler = keras.layers.Normalization()
        self.scaler.adapt(np.array([agent_hist for agent_hist, *_ in self.memory]))

        self.model = self._build_network()
        self.optimizer = keras.optimizers.Adam()            # learning rate 0.001
        self.Q = self.model.get_weights()
        self.target_Q = self.Q

    # -- 3.1 The Q-network

    def _build_network(self):
        """Define the network: histories (B, 16) → Q of each action (B, 2)."""
        nn = keras.Sequential(name="DQN")
        nn.add(keras.Input((AGENT_HIST_LEN * STATE_SIZE,)))
        nn.add(self.scaler)
        nn.add(keras.layers.Dense(20, activation="relu"))
        nn.add(keras.layers.Dense(20, activation="relu"))
        nn.add(keras.layers.Dense(10, activation="relu"))
        nn.add(keras.layers.Dense(NUM_ACTIONS))
        return nn

    # -- 3.2 The best action

    @staticmethod
    def _predict(network, agent_hists):
        """Compute Q of each action, (2,) for one history (16,) or (B, 2) for several (B, 16).

        `network` is a list of weights, such as `Q`. The post calls Keras' predict, which is many
        times as slow for one history. If you change `_build_network`, change this, too: the program
        checks at the start that both compute the same.
        """
        mean, variance, _, kernel1, bias1, kernel2, bias2, kernel3, bias3, kernel4, bias4 = network
        x = (agent_hists - mean) / np.sqrt(variance)        # the scaler (_ is its counter)
        x = np.maximum(x @ kernel1 + bias1, 0)              # relu
        x = np.maximum(x @ kernel2 + bias2, 0)
        x = np.maximum(x @ kernel3 + bias3, 0)
        return x @ kernel4 + bias4

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

    def _remember(self, agent_hist, action, reward, new_state, done):
        """Add a step to the memory: the history before the action, and the state after it.

        `done` says that no rewards follow. If the memory is full, the oldest step is forgotten.
        """
        self.memory.append((np.concatenate(agent_hist), action, reward, new_state, done))

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
                done = terminated or truncated
                if len(agent_hist) == AGENT_HIST_LEN:
                    self._remember(agent_hist, action, reward, new_state, terminated)
                    if len(self.memory) == REPLAY_START_SIZE:
                        return
                agent_hist.append(new_state)

    # -- 3.4 Experience replay (経験再生)

    def _get_samples(self):
        """Draw 32 steps from the memory. Return their histories (32, 16) and targets Y (32, 2).

        Why at random? Successive steps resemble each other. A network that learns them in order may
        fit the latest ones and forget others (the post: it may end in a local minimum). Why are old
        steps still useful? Which r and s' follow s and a depends on CartPole alone. And after s'
        the target takes the larger Q̂, not the action that the agent really took then. So it does
        not matter that an older network, or chance, chose the actions.

        The target for Q(s, a) is

            r                       if the pole falls in this step, or the cart is out of range
            r + γ·max Q̂(s', a')    otherwise, with the larger value of the two actions a'

        It is 1 for the step with the fall. It is 1 + γ = 1.99 for the step before, if no action can
        prevent the fall any more and Q̂ is already right. So Q becomes right near falls first, and
        roughly one step farther back with each renewal of the target network. If the pole never
        fell, Q would be 1 + γ + γ² + ... = 1/(1 - γ) = 100.
        """
        samples = random.sample(self.memory, MB_SIZE)
        agent_hists, actions, rewards, new_states, done = map(np.array, zip(*samples))

        # s' is s without its oldest state, and with the new one.
        new_agent_hists = np.hstack([agent_hists[:, STATE_SIZE:], new_states])
        future_rewards = self._predict(self.target_Q, new_agent_hists).max(axis=1)
        future_rewards[done] = 0

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
        self.Q = [weight.numpy() for weight in weights]

    @tf.function(jit_compile=True)      # XLA, TensorFlow's compiler: more than twice as fast
    def _train(self, agent_hists, Y):
        """Move Q towards the targets: 32 updates of one sample each. Return the new weights."""
        variables = self.model.trainable_variables
        for i in tf.range(MB_SIZE):     # tf.function makes this a loop inside TensorFlow
            with tf.GradientTape() as tape:
                q = self.model(agent_hists[i][tf.newaxis])[0]           # (2,); a batch of one
                loss = tf.reduce_mean(tf.square(Y[i] - q))              # "mse" over both actions
            gradients = tape.gradient(loss, variables)
            self.optimizer.apply_gradients(zip(gradients, variables))
        return self.model.weights

    # -- 3.5 Learning

    def learn(self, log, n_episodes=N_EPISODES):
        """Play episodes, and learn at each step. Paper: Algorithm 1.

        `log` is a Run, see below: it counts the steps and keeps scores and weights.
        """
        for _ in range(n_episodes):
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
                log.steps += 1

                # Remember it, and learn from 32 of all remembered steps.
                # Not in the post: `done` is only a fall (terminated), not the time limit
                # (truncated). At the limit the pole still stands. The post gives this step the
                # target 1. In the middle of an episode the same history has a target of up to 100,
                # and the network sees no clock, so it would learn something in between.
                if len(agent_hist) == AGENT_HIST_LEN:
                    self._remember(agent_hist, action, reward, new_state, terminated)
                    self._replay()

                # Renew the target network. If Q itself were in the targets, an update that raises
                # Q(s, a) would often raise Q(s', a') and so its own target, too, and both could
                # grow without end. `step` starts again at 0 in each episode, so each episode begins
                # with a renewal, and short ones (up to C steps) have no other. In the paper the
                # count goes on across episodes.
                if step % C == 0:
                    self.target_Q = self.Q

                if terminated or truncated:
                    break
                agent_hist.append(new_state)

            log.finish_episode(step + 1, self.target_Q)     # the score: the rewards, 1 each step
            if log.is_learned:
                return

    # -- 4. Looking at what was learned

    def run(self, env):
        """Play one episode with the target network, never at random. Return its score."""
        state, _ = env.reset()
        # As in the post, the history is at first the first state, four times.
        agent_hist = collections.deque([state] * AGENT_HIST_LEN, maxlen=AGENT_HIST_LEN)
        score = 0
        done = False
        while not done:
            action = self._get_optimal_action(self.target_Q, agent_hist)
            new_state, _, terminated, truncated, _ = env.step(action)
            score += 1
            done = terminated or truncated
            agent_hist.append(new_state)
        return score


# == Not needed to understand DQN: options, files, test ============================================

class Run(common.Run):
    """A run that also chooses which weights are kept.

    DQN learns and forgets again, often within a few episodes. What is kept is the mean of the ten
    target networks at the ends of those ten successive episodes that had the most steps.
    """

    def __init__(self, out):
        super().__init__(f"DQN, {ENV}", MAX_STEPS, out)
        self.last_ten = common.LastTen()
        self.best_mean = 0              # the largest mean of ten episodes
        self.best_weights = None        # the mean of the target networks of these episodes

    def finish_episode(self, score, target_Q):
        """Record an episode. If the last ten are the best ones, keep what they have learned."""
        self.last_ten.add(score, target_Q)
        mean = self.last_ten.mean
        if mean >= self.best_mean:
            self.best_mean = mean
            self.best_weights = self.last_ten.mean_of_weights()
        self.record("agent", score, mean)
        self.is_learned = self.last_ten.meets_rule(MAX_STEPS)


def main(argv=None):
    """Learn, then test what was learned. Return the exit status."""
    parser = common.make_parser("Learn CartPole with DQN, then film it.", "dqn_cartpole",
                                N_EPISODES)
    args = common.read_options(parser, argv)
    dqn = DQN(args.seed)
    common.check_same(dqn.model, dqn._predict)

    if args.play:
        dqn.target_Q = common.load_weights(dqn.model, args.play)
        common.test(ENV, dqn.run, "DQN", args)
        return 0

    run = Run(args.out)
    try:
        with run:
            dqn.learn(run, args.max_episodes)
    finally:
        dqn.target_Q = run.best_weights or dqn.target_Q     # the latter if no episode has ended
        dqn.model.set_weights(dqn.target_Q)
        run.keep({"DQN": dqn.model})

    # Not all runs meet the rule within 400 episodes, so these weights are tested in any case.
    common.test(ENV, dqn.run, "DQN", args)
    return 0 if run.is_learned else 1


if __name__ == "__main__":
    common.run_program(main)
