"""DQN on CartPole: the values of actions, learned from a replay memory with a target network.

DQN is the deep Q-network. A network learns Q(s, a), the discounted sum of all rewards to come if
the agent takes action a in state s, and after it always the action with the larger Q. It learns
from steps that are drawn at random from a memory. Its targets come from an older copy of itself.

    python -m companions.dqn_cartpole   # minutes; films and pictures are in movie/dqn_cartpole

This is the program of a post by Hayashi (DATUM STUDIO),
「【Pythonで再現】DeepMindのDQNアルゴリズムを再現してみた」, brought up to today's libraries. "The
paper" is Mnih et al., 2015, https://doi.org/10.1038/nature14236. Methods have the names of the
post, and stand in the order of its sections 3.1 to 4. Constants are its parameters in capitals.

Symbols
state, history    A state (4,) is what CartPole shows at one step. A history (16,) is the last four
                  states, the latest one last.
s, a, r, s'       The network sees histories, so s is a history, and s' the one a step later. a is
                  the action, and r the reward, which is 1 for each step.
γ                 the discount
Q, Q⁻             what the network says, and what the target network says (post and paper: Q̂)
fall              The pole leans too far, or the cart leaves the track: Gymnasium's `terminated`.
                  The time limit ends an episode, too: `truncated`.
B                 in shapes: rows of a batch

The target for Q(s, a) is

    r                                   if the pole falls in this step
    r + γ·max Q⁻(s', a')                otherwise, with the larger value of the two actions a'

So the target is 1 for the step with the fall, and 1 + γ = 1.99 for the step before, once Q⁻ is
right. Q becomes right near falls first, and from there backwards, through one copy Q⁻ after the
other. If the pole never fell, each step would have 1 + γ + γ² + … = 1/(1 - γ) = 100.

To understand                       read
how everything works together       DQN.learn
where the targets come from         DQN._get_samples
how the network learns them         DQN._replay, then DQN._train
how the agent explores              DQN._get_action
At first, skip what is marked "not in the post".

What differs from the post, and is needed to read the code:
- The post has two Keras networks, `Q` and `target_Q`. Here `Q` and `target_Q` are lists of weights
  in NumPy, and `_predict` computes the network's output from such a list. Only one Keras network
  is left, `model`. It learns, and `Q` is a copy of its weights.
- The 32 calls of train_on_batch are one compiled function, `_train`, which makes the same updates.
- The scaler is the first layer of the network, so that it is saved together with the weights.
What the post has wrong:
- It treats the time limit as if the pole had fallen. Here rewards go on after it: see `learn`.
- It tests the target network of the last episode, which may just have forgotten what earlier ones
  had learned. Here the mean of ten target networks is tested: see `finish_episode`.
What is added for convenience:
- The program ends after 400 episodes, as in the post, or earlier, if ten episodes in a row meet the
  main file's rule. Weights, history and pictures are saved, and the test of ten episodes is filmed.
  With --seed a run can be repeated.
"""
import collections
import contextlib
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))    # the project, if run by its path
import a3c_cartpole as base  # isort: skip  (before Keras and TensorFlow, which it sets up)
import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

ENV = "CartPole-v1"
MAX_STEPS = 500         # the time limit: CartPole-v1 ends an episode after so many steps
NUM_STATES = 4          # cart position, cart velocity, pole angle, pole angular velocity
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right

N_EPISODES = 400        # episodes of learning at most
GAMMA = .99             # γ: a reward k steps ahead counts γ^k
AGENT_HIST_LEN = 4      # states in a history. The paper needs four images to see how things move.
                        # A state of CartPole has the velocities in it; the post takes four, too.
C = 100                 # the target network is renewed at steps 0, C, 2·C, … of each episode (in
                        # the paper, every C updates, whatever the episode)

# -- constants of the replay memory
MEMORY_SIZE = 2000      # steps in the memory; a new one replaces the oldest
REPLAY_START_SIZE = 32  # steps with random actions that fill it before learning starts
MB_SIZE = 32            # samples in a minibatch: so many are drawn from the memory at each step

# -- constants of ε-greedy: with probability ε the action is drawn at random
EPS = 1.                # ε at first
EPS_MIN = 1e-4          # ε in the end
FINAL_EXPL_STEP = 1000  # ε falls over so many steps

# One step in the memory. agent_hist: the history (16,) before the action. new_state: the state (4,)
# after it. done: whether the pole has fallen there, so that no rewards follow.
Sample = collections.namedtuple("Sample", "agent_hist action reward new_state done")


class DQN:
    """The agent with its memory and its networks. Post: section 3."""

    def __init__(self, n_episodes=N_EPISODES, seed=None):
        self.rng = random.Random(seed)
        self.env = gym.make(ENV, disable_env_checker=True)
        self.env.reset(seed=self.rng.getrandbits(31))       # seeds all later resets
        self.eps = EPS
        self.eps_decay = (EPS - EPS_MIN) / FINAL_EXPL_STEP
        self._init_memory()

        # The scaler shifts and scales each of the 16 numbers of a history, so that over the first
        # 32 histories its mean is 0 and its standard deviation 1. Afterwards it does not change.
        self.scaler = keras.layers.Normalization(name="scaler")
        self.scaler.adapt(np.array([sample.agent_hist for sample in self.memory]))

        if seed is not None:
            keras.utils.set_random_seed(seed)               # for the first weights
        self.model = self._build_network()
        self.optimizer = keras.optimizers.Adam()            # learning rate 0.001
        self.optimizer.build(self.model.trainable_variables)    # _train cannot make variables
        self.Q = self.model.get_weights()                   # a list of arrays: see _predict
        self.target_Q = self._clone_network(self.Q)

        # Not in the post: for the end of learning, for the display, and for the weights to keep.
        self.progress = base.Progress(ENV, n_episodes)      # its flag `stop`: learning is over
        self.steps = 0                                      # of all episodes
        self.is_learned = False
        # Scores of the last ten episodes. Those that are not played yet count 0.
        self.last_scores = collections.deque([0] * 10, maxlen=10)
        self.last_targets = collections.deque(maxlen=10)    # target_Q at the end of each of them
        self.best_mean = 0                                  # the largest mean of last_scores so far
        self.best = self.Q                                  # the mean of last_targets at that time

    # -- 3.1 The Q-network

    def _build_network(self):
        """Define the network: histories (B, 16) → Q of each action (B, 2).

        `_predict` computes the same in NumPy: change both together.
        """
        nn = keras.Sequential(name="DQN")
        nn.add(keras.Input((AGENT_HIST_LEN * NUM_STATES,)))
        nn.add(self.scaler)
        nn.add(keras.layers.Dense(20, activation="relu"))
        nn.add(keras.layers.Dense(20, activation="relu"))
        nn.add(keras.layers.Dense(10, activation="relu"))
        nn.add(keras.layers.Dense(NUM_ACTIONS))
        return nn

    def _clone_network(self, network):
        """Copy the weights of a network. The copy stays as it is while the original learns.

        The target network is such a copy. The post names two differences from Q-learning, the
        network and experience replay. The target network is a third one.
        """
        return [weight.copy() for weight in network]

    # -- 3.2 The best action

    @staticmethod
    def _predict(network, agent_hists):
        """Compute Q of each action, (2,) or (B, 2), for one history (16,) or several (B, 16).

        `network` is the list of all weights of a network, as Keras orders them. This is in NumPy,
        because for a single history it is many times as fast as asking Keras.
        """
        mean, variance, _, kernel1, bias1, kernel2, bias2, kernel3, bias3, kernel4, bias4 = network
        x = (agent_hists - mean) / np.sqrt(variance)        # the scaler
        x = np.maximum(x @ kernel1 + bias1, 0)              # relu
        x = np.maximum(x @ kernel2 + bias2, 0)
        x = np.maximum(x @ kernel3 + bias3, 0)
        return x @ kernel4 + bias4

    def _get_optimal_action(self, network, agent_hist):
        """Choose the action with the larger Q after these four states."""
        q = self._predict(network, np.concatenate(agent_hist))
        return int(q.argmax())

    def _get_action(self, agent_hist=None):
        """Choose any action with probability ε, or else the one with the larger Q (ε-greedy).

        ε falls a little with each call. Without a history the action is random, and ε stays.
        """
        if agent_hist is None:
            return self.rng.randrange(NUM_ACTIONS)
        self.eps = max(self.eps - self.eps_decay, EPS_MIN)
        if self.rng.random() < self.eps:
            return self.rng.randrange(NUM_ACTIONS)
        return self._get_optimal_action(self.Q, agent_hist)

    # -- 3.3 The replay memory

    def _remember(self, agent_hist, action, reward, new_state, done):
        """Add a step to the memory. If the memory is full, the oldest step is forgotten."""
        self.memory.append(Sample(np.concatenate(agent_hist), action, reward, new_state, done))

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

    # -- 3.4 Experience replay

    def _get_samples(self):
        """Draw 32 steps from the memory. Return their histories (32, 16) and targets Y (32, 2).

        Steps that follow one another resemble one another. A network that learned them in order
        would fit the latest ones and forget the others. So it learns from a random mixture of old
        and new steps. Old ones are still true: which r and s' follow after s and a depends on
        CartPole alone. How the agent chose a does not matter, and what it would do in s' is
        computed anew each time. (A3C cannot use old steps like this, because its V(s) is about
        the actions that its present policy draws.)
        """
        samples = self.rng.sample(self.memory, MB_SIZE)
        agent_hists = np.array([sample.agent_hist for sample in samples])
        actions = np.array([sample.action for sample in samples])
        rewards = np.array([sample.reward for sample in samples])
        new_states = np.array([sample.new_state for sample in samples])
        done = np.array([sample.done for sample in samples])

        # s', the history one step later: without its oldest state, and with the new one.
        new_agent_hists = np.hstack([agent_hists[:, NUM_STATES:], new_states])

        # max Q⁻(s', a'): the discounted sum of the rewards that follow, as the target network
        # estimates it for the better of the two actions a'. After a fall no rewards follow.
        future_rewards = self._predict(self.target_Q, new_agent_hists).max(axis=1)
        future_rewards[done] = 0

        # The target for the action that was taken is r + γ·max Q⁻(s', a'). What the other action
        # would have brought is not known. In the post its target is the value that the target
        # network gives it, which holds it near there. (In the paper it does not enter the loss.)
        Y = self._predict(self.target_Q, agent_hists)
        Y[np.arange(MB_SIZE), actions] = rewards + GAMMA * future_rewards
        return agent_hists, Y

    def _replay(self):
        """Draw 32 samples, and let the network learn from each of them in turn.

        In the paper all 32 together make a single update.
        """
        agent_hists, Y = self._get_samples()
        weights = self._train(tf.constant(agent_hists), tf.constant(Y))
        self.Q = [weight.numpy() for weight in weights]

        # Not in the post: an error ends the run. If any weight is infinite or not a number, the
        # last bias soon is, too.
        if not np.isfinite(self.Q[-1]).all():
            raise FloatingPointError(f"a weight is not finite after {self.steps} steps")

    @tf.function(jit_compile=True)      # XLA, TensorFlow's compiler: three times as fast
    def _train(self, agent_hists, Y):
        """Move Q towards the targets: 32 updates of one sample each. Return the new weights.

        tf.function turns the loop over tf.range into a loop inside TensorFlow. The weights are
        returned because reading them from the Keras network takes as long as all 32 updates.
        """
        for i in tf.range(MB_SIZE):
            agent_hist = agent_hists[i][tf.newaxis]                     # (1, 16), a batch of one
            with tf.GradientTape() as tape:
                q = self.model(agent_hist)[0]                           # (2,)
                loss = tf.reduce_mean(tf.square(Y[i] - q))              # "mse" over both actions
            gradients = tape.gradient(loss, self.model.trainable_variables)
            self.optimizer.apply(gradients)
        return [tf.convert_to_tensor(weight) for weight in self.model.weights]

    # -- 3.5 Learning

    def learn(self):
        """Play episodes, and learn at each step, until learning is over. Paper: Algorithm 1.

        Learning is over after the last episode: `finish_episode` counts them.
        """
        while not self.progress.stop.is_set():
            state, _ = self.env.reset()
            agent_hist = collections.deque([state], maxlen=AGENT_HIST_LEN)
            for step in range(MAX_STEPS):
                # Choose an action: at random until there are four states.
                if len(agent_hist) < AGENT_HIST_LEN:
                    action = self._get_action()
                else:
                    action = self._get_action(agent_hist)

                # Do it.
                new_state, reward, terminated, truncated, _ = self.env.step(action)
                self.steps += 1

                # Remember it, and learn from 32 of all remembered steps.
                # Not in the post: what is remembered as `done` is a fall (terminated), but not the
                # time limit (truncated). At the time limit the pole still stands, and the same
                # history may occur in the midst of another episode. With the post's rule its target
                # would be 1 at the time limit, and up to 100 elsewhere. No network can learn both.
                if len(agent_hist) == AGENT_HIST_LEN:
                    self._remember(agent_hist, action, reward, new_state, terminated)
                    self._replay()

                # Renew the target network, but not at each step: otherwise each update of Q would
                # at once move the targets as well, and Q would run after itself.
                if step % C == 0:
                    self.target_Q = self._clone_network(self.Q)

                if terminated or truncated:
                    break
                if self.progress.stop.is_set():     # not in the post: after Ctrl-C
                    return
                agent_hist.append(new_state)
            self.finish_episode(step + 1)           # the score: each step has had the reward 1

    def finish_episode(self, score):
        """Record an episode. If the last ten were the best so far, keep what they have learned.

        Not in the post. DQN learns and forgets again, often within a few episodes, so it matters
        which weights are kept. It is the mean of ten target networks: those at the end of each of
        the ten episodes in a row that lasted longest.
        """
        self.last_scores.append(score)
        self.last_targets.append(self.target_Q)
        mean = np.mean(self.last_scores)
        if mean >= self.best_mean:
            self.best_mean = mean
            self.best = [np.mean(weights, axis=0) for weights in zip(*self.last_targets)]
        self.is_learned = bool(mean > MAX_STEPS - 1)        # the main file's rule
        episode = len(self.progress.history) + 1
        self.progress.finish_episode("DQN", episode, score, mean, self.steps, self.is_learned)

    # -- 4. Looking at what was learned

    def plot_training_scores(self, path):
        """Draw the score of each episode, and the mean of all scores until then."""
        from matplotlib.figure import Figure  # here, because it takes half a second
        scores = [episode.steps for episode in self.progress.history]
        episodes = np.arange(1, len(scores) + 1)
        axes = Figure(figsize=(12, 6), layout="constrained").add_subplot()
        axes.plot(episodes, scores, color="gray", linewidth=1, label="score of an episode")
        axes.plot(episodes, np.cumsum(scores) / episodes, color=base.BLUE,
                  label="mean of all until then")
        axes.set(title=ENV, xlabel="episode", ylabel="score")
        axes.legend()
        axes.figure.savefig(path)

    def run(self, env):
        """Play one episode with the weights that were kept, never at random. Return its score."""
        state, _ = env.reset()
        # As in the post, the history starts as four times the first state.
        agent_hist = collections.deque([state] * AGENT_HIST_LEN, maxlen=AGENT_HIST_LEN)
        score = 0
        done = False
        while not done:
            action = self._get_optimal_action(self.best, agent_hist)
            new_state, reward, terminated, truncated, _ = env.step(action)
            score += int(reward)
            done = terminated or truncated
            agent_hist.append(new_state)
        return score


def main(argv=None):
    """Learn and keep the weights, then test and film them. Return the exit status."""
    parser = base.make_parser("Learn CartPole with DQN, then film what was learned.",
                              "movie/dqn_cartpole")
    parser.add_argument("--episodes", default=N_EPISODES, type=base.positive,
                        help="episodes of learning at most")
    args = base.check_options(parser, parser.parse_args(argv))

    dqn = DQN(args.episodes, args.seed)
    if args.play:
        dqn.best = base.load_weights(dqn.model, args.play)
    else:
        learn_and_keep(dqn, args)
        if dqn.progress.failed:
            return 1

    # The weights are tested even if the rule was not met, because not all runs meet it.
    env = gym.make(ENV, disable_env_checker=True, render_mode="rgb_array")
    env.reset(seed=dqn.rng.getrandbits(31))
    env = base.film(env, args.out, "DQN", args.render)
    with contextlib.closing(env):
        base.play(lambda: dqn.run(env), args.test_episodes)
    return 0 if args.play or dqn.is_learned else 1


def learn_and_keep(dqn, args):
    """Let the agent learn in a thread, show its progress, and keep what came of it."""
    try:
        base.run_threads({"DQN": dqn.learn}, dqn.progress, args.log)
    finally:
        with base.no_interruption():
            dqn.model.set_weights(dqn.best)
            base.keep({"DQN": dqn.model}, dqn.progress, dqn.is_learned, dqn.steps,
                      f"DQN, {ENV}", args.out)
            if dqn.progress.history:
                dqn.plot_training_scores(args.out / "training_scores.png")


if __name__ == "__main__":
    base.run_program(main)
