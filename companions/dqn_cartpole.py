"""DQN on CartPole: a network learns from what it remembers, and an older copy of it sets its aims.

The post 「【Pythonで再現】DeepMindのDQNアルゴリズムを再現してみた」 (Hayashi, DATUM STUDIO) for
today's libraries (README.md lists how it differs). The paper: https://doi.org/10.1038/nature14236
`python -m companions.dqn_cartpole` learns, then films what was best; look at `_get_samples`, where
the aims come from, `_replay`, how Q learns them, and `learn`, when the copy follows.
Shapes in comments: B rows, H numbers in a history (16), W in the network's one vector θ (1025).
"""
import functools
import random
import sys
import time
from collections import deque
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))    # the project, if run by its path
import a3c_cartpole as a3c  # isort: skip  (before Keras, which it sets up)
import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

ENV, MAX_STEPS = "CartPole-v1", 500     # steps, after which it ends an episode
NUM_STATES = 4          # position (m), velocity (m/s) of the cart; angle (rad), rad/s of the pole
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right
AGENT_HIST_LEN = 4      # states that the network sees at once, the latest last: a history
MEMORY_SIZE = 2000      # steps; the oldest is forgotten first
REPLAY_START_SIZE = 32  # steps of random actions that it begins with, and that set the scale
MB_SIZE = 32            # steps replayed at each step, one update each
N_EPISODES = 400        # to learn in, at the most
GAMMA = .99             # γ, discount of a reward, per step
C = 100                 # steps from one clone of Q to the next, from step 0 of each episode on
EPS, EPS_MIN = 1., 1e-4     # share of random actions where the network first chooses, and from its
FINAL_EXPL_STEP = 1000      # choice of this number on; linear in between
LEARNING_RATE, BETA_1, BETA_2, EPSILON = 1e-3, .9, .999, 1e-7       # of Adam, Keras' own


class DQN:
    """The agent with its memory and its two networks. Post: section 3.

    `Q`, `target_Q`: the paper's θ and θ⁻, (W,); `best`: what to hand over. `memory`: history (H,)
    before a step, action, reward, state (4,) after it, whether that was the episode's last.
    """

    def __init__(self, n_episodes=N_EPISODES, seed=None, log=False):
        self.n_episodes, self.seed, self.log = n_episodes, seed, log
        self.random = random.Random(seed)
        self.env = gym.make(ENV, disable_env_checker=True)
        self.env.reset(seed=self.random.getrandbits(31))
        self.eps, self.eps_decay = EPS, (EPS - EPS_MIN) / FINAL_EXPL_STEP
        self._init_memory()
        self.model = self._build_network()
        weights = self.model.get_weights()
        ends = np.cumsum([0] + [weight.size for weight in weights])
        self.places = [(slice(a, b), w.shape) for a, b, w in zip(ends, ends[1:], weights)]
        self.Q = self.target_Q = self.best = self.pack(weights)
        self.adam = np.zeros(2 * len(self.Q) + 1)       # its two moments (W,), its updates
        self.targets = deque(maxlen=10)                 # θ⁻ at the end of the last ten episodes
        self.history, self.steps, self.is_learned, self.started = [], 0, False, time.perf_counter()

    def _build_network(self):
        """Define the network, history (B, H) → Q (B, 2); its scaler is saved with its weights."""
        scaler = keras.layers.Normalization(name="scaler")
        scaler.adapt(np.array([agent_hist for agent_hist, *_ in self.memory]))
        glorot = keras.initializers.GlorotUniform(keras.random.SeedGenerator(self.seed))
        dense = functools.partial(keras.layers.Dense, kernel_initializer=glorot)
        agent_hist = keras.Input((AGENT_HIST_LEN * NUM_STATES,), name="agent_hist")
        x = dense(20, "relu")(dense(20, "relu")(scaler(agent_hist)))
        return keras.Model(agent_hist, dense(NUM_ACTIONS)(dense(10, "relu")(x)), name="DQN")

    def pack(self, weights):
        """Join the scaler's mean, variance and count, kernels and biases into a vector (W,)."""
        return np.concatenate([weight.ravel() for weight in weights], dtype=np.float32)

    def unpack(self, theta, reshape=np.ndarray.reshape):
        """Cut a vector (W,) into what `pack` has joined."""
        return [reshape(theta[place], shape) for place, shape in self.places]

    def _clone_network(self, theta):
        """A copy of a vector (W,), which stays as it is while the original learns."""
        return theta.copy()

    def _predict(self, weights, x, product=lambda k, x: x @ k, relu=lambda x: np.maximum(x, 0)):
        """Q (…, 2) of histories (…, H) by unpacked weights: in NumPy, where Keras takes 1 ms."""
        mean, variance, _, *hidden, kernel, bias = weights
        x = (x - mean) / variance ** .5
        for k, b in zip(hidden[::2], hidden[1::2]):
            x = relu(product(k, x) + b)
        return product(kernel, x) + bias

    def _get_optimal_action(self, theta, agent_hist):
        """The action of the largest Q by a vector (W,), after four stacked states."""
        return int(self._predict(self.unpack(theta), np.concatenate(agent_hist)).argmax())

    def _get_action(self, agent_hist=None):
        """At random by ε, which falls each time, else the best; without a history at random."""
        if agent_hist is not None:
            self.eps = max(self.eps - self.eps_decay, EPS_MIN)
            if self.random.random() >= self.eps:
                return self._get_optimal_action(self.Q, agent_hist)
        return self.random.randrange(NUM_ACTIONS)

    def _remember(self, agent_hist, action, reward, new_state, done):
        """Add a step to the memory; the oldest goes when it is full."""
        self.memory.append((np.concatenate(agent_hist), action, reward, new_state, done))

    def _step(self, agent_hist, action):
        """Act, remember it if four states are stacked, stack the next; True at the end."""
        new_state, reward, terminated, truncated, _ = self.env.step(action)
        if len(agent_hist) == AGENT_HIST_LEN:
            self._remember(agent_hist, action, reward, new_state, terminated or truncated)
        agent_hist.append(new_state)
        return terminated or truncated

    def _init_memory(self):
        """Fill the memory with REPLAY_START_SIZE steps of random actions."""
        self.memory, done = deque(maxlen=MEMORY_SIZE), True
        while len(self.memory) < REPLAY_START_SIZE:
            if done:
                agent_hist = deque([self.env.reset()[0]], AGENT_HIST_LEN)
            done = self._step(agent_hist, self._get_action())

    def _get_samples(self):
        """Draw MB_SIZE steps: their histories (32, H), and Y (32, 2), what Q shall be there.

        Paper, Algorithm 1: r + γ·max Q(s'; θ⁻), r at an end; but for the other action what θ⁻ say.
        """
        samples = zip(*self.random.sample(self.memory, MB_SIZE))
        agent_hists, actions, rewards, new_states, done = map(np.array, samples)
        new_agent_hists = np.hstack([agent_hists[:, NUM_STATES:], new_states])
        both = np.stack([agent_hists, new_agent_hists])     # (2, 32, H)
        Y, future_Q = self._predict(self.unpack(self.target_Q), both)
        Y[range(MB_SIZE), actions] = rewards + GAMMA * future_Q.max(axis=1) * ~done
        return agent_hists, Y

    def _replay(self):
        """Draw samples and fit Q to one after the other; FloatingPointError if that diverges."""
        agent_hists, Y = self._get_samples()
        packed = np.concatenate([self.Q, self.adam, agent_hists.ravel(), Y.ravel()])
        updated = self.graph(tf.constant(packed, tf.float32)).numpy()
        if not np.isfinite(updated).all():
            raise FloatingPointError(f"a weight is not finite in episode {len(self.history) + 1}")
        self.Q, self.adam = np.split(updated, [len(self.Q)])

    def _build_graph(self):
        """Compile a replay, from one vector: (θ, Adam's m, v, t, histories, Y) → (θ, m, v, t)."""
        matvec = functools.partial(tf.linalg.matvec, transpose_a=True)  # 3 times as fast as Dense
        def replay(packed):
            *start, x, Y = tf.split(packed, sizes)
            x, Y = tf.reshape(x, [MB_SIZE, -1]), tf.reshape(Y, [MB_SIZE, -1])

            def update(i, theta, m, v, t):      # Adam, https://arxiv.org/abs/1412.6980, section 2
                weights = self.unpack(theta, tf.reshape)
                with tf.GradientTape() as tape:
                    tape.watch(weights)
                    error = self._predict(weights, x[i], matvec, tf.nn.relu) - Y[i]
                    loss = tf.reduce_mean(tf.square(error))
                g = [*map(tf.zeros_like, weights[:3]), *tape.gradient(loss, weights[3:])]
                g = tf.concat([tf.reshape(part, [-1]) for part in g], axis=0)   # 0 for the scale
                m, v, t = BETA_1 * m + (1 - BETA_1) * g, BETA_2 * v + (1 - BETA_2) * g ** 2, t + 1
                rate = LEARNING_RATE * tf.sqrt(1 - BETA_2 ** t) / (1 - BETA_1 ** t)
                return i + 1, theta - rate * m / (tf.sqrt(v) + EPSILON), m, v, t

            _, *end = tf.while_loop(lambda i, *_: i < MB_SIZE, update, (0, *start))
            return tf.concat(end, axis=0)

        sizes = [len(self.Q)] * 3 + [1, MB_SIZE * len(self.memory[0][0]), MB_SIZE * NUM_ACTIONS]
        graph = tf.function(replay, jit_compile=True, autograph=False)
        return graph.get_concrete_function(tf.zeros([sum(sizes)]))

    def learn(self):
        """Play and learn until ten episodes meet the main file's rule, or `n_episodes` are over."""
        self.graph, self.started = self._build_graph(), time.perf_counter()
        while len(self.history) < self.n_episodes and not self.is_learned:
            agent_hist, step, done = deque([self.env.reset()[0]], AGENT_HIST_LEN), 0, False
            while not done:
                is_full = len(agent_hist) == AGENT_HIST_LEN
                done = self._step(agent_hist, self._get_action(agent_hist if is_full else None))
                if is_full:
                    self._replay()
                if step % C == 0:
                    self.target_Q = self._clone_network(self.Q)
                step += 1
            self._finish_episode(step)

    def _finish_episode(self, steps):
        """Record an episode; where ten were best, keep the mean of their ten target networks."""
        mean = (steps + sum(e.steps for e in self.history[-9:])) / 10
        self.targets.append(self.target_Q)
        if mean >= max((e.mean_of_last_10 for e in self.history), default=0):
            self.best = np.mean(self.targets, axis=0)
        self.is_learned, self.steps = mean > MAX_STEPS - 1, self.steps + steps
        episode, seconds = len(self.history) + 1, round(time.perf_counter() - self.started, 3)
        self.history.append(a3c.Episode("DQN", episode, steps, mean, self.steps, seconds))
        if self.log:
            a3c.say_episode(self.history[-1])

    def plot_training_scores(self, path):
        """Draw each episode's score, and the mean of all until then. Post: section 4."""
        from matplotlib.figure import Figure  # takes 0.3 s; without pyplot it opens no window
        scores, episodes = [e.steps for e in self.history], np.arange(len(self.history)) + 1
        axes = Figure(figsize=(12, 6), layout="constrained").add_subplot(
            title=ENV, xlabel="episode", ylabel="score")
        axes.plot(episodes, scores, color="gray", linewidth=1, label="score")
        axes.plot(episodes, np.cumsum(scores) / episodes, label="mean of all until then")
        axes.legend()
        axes.figure.savefig(path)

    def run(self, env):
        """Play one episode by `best`, never at random, and return its steps."""
        agent_hist, step, done = deque([env.reset()[0]] * AGENT_HIST_LEN, AGENT_HIST_LEN), 0, False
        while not done:
            action = self._get_optimal_action(self.best, agent_hist)
            state, _, terminated, truncated, _ = env.step(action)
            agent_hist.append(state)
            step, done = step + 1, terminated or truncated
        return step


def main(argv=None):
    """Learn and keep what came of it, then test and film the best; return the exit status."""
    args = a3c.parse_arguments(
        argv, "Learn CartPole with DQN, then film what was learned.", "movie/dqn_cartpole",
        ("--episodes", dict(default=N_EPISODES, type=a3c.from_1, help="to learn in, at the most")))
    run = a3c.Run(args.out)
    dqn = DQN(args.episodes, args.seed, args.log)
    if args.play:
        dqn.best = dqn.pack(a3c.load_weights(dqn.model, args.play).get_weights())
    else:
        table = a3c.live_table(dqn.history, MAX_STEPS, lambda: f"ε {dqn.eps:.4f}", args.log)
        try:
            with run.attempt("learning"), table:
                dqn.learn()
        finally:
            a3c.say(a3c.summary(dqn.is_learned, time.perf_counter() - dqn.started, dqn.steps,
                                len(dqn.history), 1, args.episodes, run.lost))
            dqn.model.set_weights(dqn.unpack(dqn.best))
            run.keep({"DQN": dqn.model}, dqn.is_learned, dqn.history, MAX_STEPS, ENV)
            with run.attempt("training_scores.png"):
                dqn.plot_training_scores(run.folder / "training_scores.png")
    with run.attempt("test"):       # of the best in any case: few runs ever meet the rule
        env = gym.make(ENV, disable_env_checker=True, render_mode="rgb_array")
        env.reset(seed=dqn.random.getrandbits(31))
        with a3c.film(env, args.out, "DQN", args.render) as env:
            a3c.play(lambda: dqn.run(env), args.test_episodes, "DQN")
    return 0 if (args.play or dqn.is_learned) and not run.lost else 1


if __name__ == "__main__":
    sys.exit(main())
