# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#   'tensorflow-cpu>=2.20,<2.22; sys_platform != "darwin" and platform_machine in "x86_64 AMD64"',
#   'tensorflow>=2.20,<2.22; sys_platform == "darwin" or platform_machine not in "x86_64 AMD64"',
#   'keras>=3.12,<4',
#   'gymnasium[classic-control]>=1.2,<2',
#   'numpy>=2.1,<3',
#   'moviepy>=2.1,<3',
#   'matplotlib>=3.9,<4',
# ]
# ///
"""A3C on CartPole, complete in this one file: Keras, TensorFlow and threads, on the CPU.

The program of the article 「【強化学習】実装しながら学ぶA3C【CartPoleで棒立て:1ファイルで完結】」
(Sugulu, 2017, https://qiita.com/sugulu/items/acbc909dd9b74b043e45) for today's libraries: its
classes, methods and constants in its order, to be read side by side; README.md lists every
difference. "The paper" is Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning",
https://arxiv.org/abs/1602.01783, whose Algorithm S3 this is, by way of Jaromír Janisch's "Let's
make an A3C", https://jaromiru.com/2017/02/16/lets-make-an-a3c-theory/.

    python a3c_cartpole.py            learn CartPole-v0, then film the learned policy
    python a3c_cartpole.py --help     what the command line can change

Shapes in comments: B samples in a batch, W weights in the network (131 of them).
"""
import argparse
import collections
import contextlib
import csv
import functools
import importlib.util
import itertools
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"               # CPU only: so small a network gains nothing
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")      # TensorFlow's start-up chatter,
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")     # and its notice of kernels unused here
INSTALL = "on Python 3.10 to 3.13 this installs it: python -m pip install -r requirements.txt"
matplotlib_was_here = sys.modules.setdefault("matplotlib", None)
try:
    import gymnasium as gym
    import keras  # would import matplotlib for plots of its own: 0.45 s of every start
    import numpy as np
    import tensorflow as tf
except ImportError as missing:
    if __name__ != "__main__":
        raise
    print(f"a3c_cartpole.py: error: {missing}; {INSTALL}", file=sys.stderr)
    sys.exit(2)
finally:
    if not matplotlib_was_here:
        del sys.modules["matplotlib"]

with contextlib.suppress(RuntimeError):     # a host that has started TensorFlow keeps its settings
    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_inter_op_parallelism_threads(1)     # calls this small only lose time
    tf.config.threading.set_intra_op_parallelism_threads(1)     # between TensorFlow's own threads
for note in "The environment CartPole-v0 is out of date", "Overwriting existing videos":
    warnings.filterwarnings("ignore", rf".*{note}")

# -- constants of Game
ENV = "CartPole-v0"
NUM_STATES = 4          # position (m), velocity (m/s) of the cart; angle (rad), rad/s of the pole
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right
NONE_STATE = np.zeros(NUM_STATES, np.float32)   # stands for s' where the episode is over

# -- constants of LocalBrain
MIN_BATCH = 5           # samples; fewer wait in the queue for the next update
LOSS_V = .5             # weight of the value loss
LOSS_ENTROPY = .01      # weight of the entropy, which keeps the policy from settling too early
LEARNING_RATE = 5e-3    # of RMSProp
RMSPROP_DECAY = .99     # share of its mean square that RMSProp keeps at each update

# -- constants of Advantage, the Bellman equation
GAMMA = .99             # discount of a reward, per step
N_STEP_RETURN = 5       # rewards summed before V(s') stands for all that follow
GAMMA_N = GAMMA ** N_STEP_RETURN

# -- constants of the threads
N_WORKERS = 8           # learning threads
T_MAX = 10              # steps of a thread between two of its updates
BATCH_ROWS = MIN_BATCH - 1 + T_MAX + N_STEP_RETURN - 1      # samples, the most an update can find

# -- constants of ε-greedy
EPS_START = .5          # share of random actions at the first step,
EPS_END = 0.            # and from EPS_STEPS on; linear in between
EPS_STEPS = 200 * N_WORKERS     # steps of all threads together

HISTORY = "history.csv"
Episode = collections.namedtuple(
    "Episode", "thread episode steps mean_of_last_10 total_steps seconds")


class ParameterServer:
    """The network that all threads share, its optimiser, and all else that they share.

    Article: 「ParameterServer」, Fig. 2. Paper: the global parameters θ, θv and the counter T.

    Arguments: `env`, the Gymnasium id; `workers`, how many threads learn; `seed` of the weights,
    agents and environments; `max_episodes` of all workers; `test_episodes`; `film`, a function that
    wraps the test's environment. Attributes: `frames`, steps of all learning threads so far;
    `episodes`, how many ended; `history`, an Episode for each that nobody has taken out;
    `is_learned`, set by the first worker to meet the stop rule; `stop`, set when learning is over
    for any reason; `winner` and `failed`, thread names; `interrupted`, a signal's number.
    """

    def __init__(self, *, env=ENV, workers=N_WORKERS, seed=None, max_episodes=math.inf,
                 test_episodes=10, film=None):
        self.env, self.workers, self.seed, self.film = env, workers, seed, film
        self.max_episodes, self.test_episodes = max_episodes, test_episodes
        self.frames = self.episodes = self.interrupted = 0
        self.history = collections.deque()
        self.is_learned, self.stop = threading.Event(), threading.Event()
        self.winner = self.failed = self.update_graph = None
        self.started = time.perf_counter()
        self.lock = threading.Lock()                    # for every counter here
        self.idle = threading.Condition(self.lock)      # told when an update ends
        self.updates_under_way = 0
        with tf.device("/cpu:0"):
            self._model = self._build_model()
            self.optimizer = keras.optimizers.RMSprop(LEARNING_RATE, RMSPROP_DECAY, epsilon=1e-10)
            self.optimizer.build(self._model.trainable_variables)
        for mean_square in self.optimizer.variables[2:]:    # after the step count and the rate;
            mean_square.assign(tf.ones_like(mean_square))   # TensorFlow 1 began at 1, Keras at 0
        self._check_model()
        shapes = [tuple(w.shape) for w in self._model.trainable_variables]
        ends = list(itertools.accumulate(map(math.prod, shapes)))
        self.slices = list(zip([0] + ends, ends, shapes))       # where each weight lies in (W,)
        self.newest = 0, self.pack(self._model.get_weights())   # updates made, weights (W,)
        self.model_is_out = False

    @property
    def model(self):
        """The shared Keras model. Its holder may change it: from then on each pull reads it."""
        self.model_is_out = True
        return self._model

    def _build_model(self):
        """Define the network, Fig. 1: state (B, 4) → p of each action (B, 2), value V (B, 1)."""
        glorot = keras.initializers.GlorotUniform(keras.random.SeedGenerator(self.seed))
        l_input = keras.Input((NUM_STATES,), name="state")
        l_dense = keras.layers.Dense(16, "relu", kernel_initializer=glorot, name="hidden")(l_input)
        out_actions = keras.layers.Dense(
            NUM_ACTIONS, "softmax", kernel_initializer=glorot, name="policy")(l_dense)
        out_value = keras.layers.Dense(
            1, "linear", kernel_initializer=glorot, name="value")(l_dense)
        return keras.Model(l_input, [out_actions, out_value], name="A3C")

    def _check_model(self):
        """Raise ValueError for a network that LocalBrain.predict_p cannot repeat in NumPy."""
        layers, source = self._model.layers[1:], self._model.inputs[0]
        for layer, activation in zip(layers, ["relu"] * (len(layers) - 2) + ["softmax", "linear"]):
            if not (isinstance(layer, keras.layers.Dense) and layer.use_bias
                    and layer.activation.__name__ == activation and layer.input is source):
                raise ValueError(f"layer {layer.name!r}: predict_p knows only a chain of Dense relu"
                                 " layers, then a Dense softmax and a Dense linear")
            source = layer.output if activation == "relu" else source

    @staticmethod
    def pack(arrays):
        """Join arrays of any shape into one vector (W,), float32."""
        return np.concatenate([np.ravel(array) for array in arrays]).astype(np.float32)

    def unpack(self, vector):
        """Cut a vector (W,) of NumPy or TensorFlow into kernels and biases, the model's order."""
        reshape = np.ndarray.reshape if isinstance(vector, np.ndarray) else tf.reshape
        return [reshape(vector[start:end], shape) for start, end, shape in self.slices]

    def apply_update(self, batch, weights):
        """Let one gradient step reach the shared weights, or refuse it once a worker has learned.

        Steps of several threads overlap and none is lost, as XLA locks the variables that a call
        changes; a Python lock around the call cost 10 % of the steps/s with 8 workers.
        Raises FloatingPointError, naming the step, when the loss or a weight is not finite.
        """
        with self.lock:
            if self.is_learned.is_set():
                return
            self.updates_under_way += 1
        try:
            weights, loss, updates = [t.numpy() for t in self.update_graph(batch, weights)]
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss or a weight is not finite at step {self.frames}")
        finally:
            with self.idle:
                self.updates_under_way -= 1
                self.idle.notify_all()
        with self.lock:
            self.newest = max(self.newest, (int(updates), weights), key=lambda pair: pair[0])

    def finish_episode(self, name, trial, step, mean):
        """Record an episode; True for one worker at the most, the first to meet the stop rule."""
        limit = gym.spec(self.env).max_episode_steps
        with self.lock:
            if self.stop.is_set():
                return False
            self.episodes += 1
            seconds = time.perf_counter() - self.started
            self.history.append(Episode(name, trial, step, mean, self.frames, seconds))
            if mean > limit - 1:
                self.winner = name
                self.is_learned.set()
            if self.winner or self.episodes >= self.max_episodes:
                self.stop.set()
            return self.winner == name


class LocalBrain:
    """A thread's own copy of the network: it acts, gathers samples and turns them into updates.

    Article: 「LocalBrain」. Paper: the thread's parameters θ', θv' and its gradients dθ, dθv.
    `train_queue`: five lists, s (4,), a one-hot (2,), R, s' (4,), mask (0 at the end, else 1).
    """

    def __init__(self, name, parameter_server):
        self.name, self.parameter_server = name, parameter_server
        self.train_queue = [[], [], [], [], []]
        self._model = None
        if parameter_server.update_graph is None:       # one for all brains, and before any thread
            parameter_server.update_graph = self._build_graph()     # starts: tracing there races
        self.pull_parameter_server()

    @property
    def model(self):
        """The brain's own Keras model, built when first asked for: acting needs only its weights.

        Who holds it may change it, so from then on every use reads the weights back from it.
        """
        if self._model is None:
            model = self.parameter_server._build_model()
            model.set_weights(self._layers)
            self._model = model
        return self._model

    def _local_weights(self):
        if self._model is not None:
            self._adopt(self.parameter_server.pack(self._model.get_weights()))
        return self._weights

    def _adopt(self, weights):
        self._weights = weights                                 # (W,)
        self._layers = self.parameter_server.unpack(weights)    # kernel, bias, kernel, bias, …

    @staticmethod
    def loss_total(p, v, a, r):
        """Loss of each sample (B, 1), from p (B, 2), V(s) (B, 1), a one-hot (B, 2) and R (B, 1).

        Article: 「Actor-Critic」. Paper: section 4, log π(a|s; θ')·(R − V) and (R − V)², and the
        entropy of π, to be large.
        """
        log_prob = tf.math.log(tf.reduce_sum(p * a, axis=1, keepdims=True) + 1e-10)
        advantage = r - v
        loss_policy = -log_prob * tf.stop_gradient(advantage)   # for the actor it is a constant
        loss_value = LOSS_V * tf.square(advantage)              # for the critic the error to reduce
        entropy = LOSS_ENTROPY * tf.reduce_sum(p * tf.math.log(p + 1e-10), axis=1, keepdims=True)
        return loss_policy + loss_value + entropy

    def gradients(self, batch, weights):
        """Mean loss of a batch and its gradients, shaped like the list of weights they are for.

        A row of the batch (B, 13): s, a one-hot, R of N_STEP_RETURN rewards, s', mask of s', and 1
        for a sample or 0 for a row that only fills up.
        """
        sizes = [NUM_STATES, NUM_ACTIONS, 1, NUM_STATES, 1, 1]
        s, a, r, s_, s_mask, is_sample = tf.split(batch, sizes, axis=1)
        network = self.parameter_server._model.stateless_call   # the one definition, our weights
        (_, v), _ = network(weights, [], s_)                    # constant V(s'): not on the tape
        r = r + GAMMA_N * v * s_mask
        with tf.GradientTape() as tape:
            tape.watch(weights)
            (p, v), _ = network(weights, [], s)
            losses = self.loss_total(p, v, a, r) * is_sample
            loss = tf.reduce_sum(losses) / tf.reduce_sum(is_sample)
        return loss, tape.gradient(loss, weights)

    def _build_graph(self):
        """Compile, for all brains, gradient on local weights and RMSProp step on the server's.

        Returns a function of batch (B, 13) and local weights (W,) that gives the server's weights
        after the step (W,), the loss, and the number of steps. By XLA a call takes 170 µs, as a
        plain graph 270 µs, which is what runs, under a lock, where TensorFlow comes without XLA.
        """
        server = self.parameter_server
        shared, state = server._model.trainable_variables, server.optimizer.variables

        def update(batch, weights):
            loss, grads = self.gradients(batch, server.unpack(weights))
            server.optimizer.apply_gradients(zip(grads, shared))
            flat = tf.concat([tf.reshape(w.value, [-1]) for w in shared], axis=0)
            loss += 0 * tf.reduce_sum(flat)     # NaN if any weight is not finite
            return flat, loss, tf.identity(server.optimizer.iterations.value)

        batch = np.ones((BATCH_ROWS, 2 * NUM_STATES + NUM_ACTIONS + 3), np.float32)
        before = [variable.numpy() for variable in shared + state]
        for xla in True, False:
            with contextlib.suppress(*[tf.errors.OpError] if xla else []):
                graph = tf.function(update, jit_compile=xla, autograph=False)
                usual = graph.get_concrete_function(batch, server.newest[1])
                usual(tf.constant(batch), tf.constant(server.newest[1]))    # compiles; undone below
                break
        for variable, value in zip(shared + state, before):
            variable.assign(value)
        exclusive = contextlib.nullcontext() if xla else threading.Lock()
        call, captured = usual.inference_fn.call_flat, usual.captured_inputs    # 60 µs less a call

        def run(batch, weights):
            with exclusive:
                if len(batch) != BATCH_ROWS:
                    return graph(batch, weights)
                return call(tf.constant(batch), tf.constant(weights), *captured)
        return run

    def pull_parameter_server(self):
        """Copy all weights from the server, as the latest update or push of any brain left them.

        Every update hands the weights it made to the server in NumPy: a pull needs no TensorFlow.
        """
        server = self.parameter_server
        self._adopt(server.pack(server._model.get_weights()) if server.model_is_out
                    else server.newest[1])
        if self._model is not None:
            self._model.set_weights(self._layers)

    def push_parameter_server(self):
        """Copy all weights to the server, between two updates and never in the midst of one."""
        weights, server = self._local_weights(), self.parameter_server
        with server.idle:
            server.idle.wait_for(lambda: not server.updates_under_way)
            server._model.set_weights(self._layers)
            server.newest = server.newest[0], weights

    def update_parameter_server(self):
        """Empty the queue into one RMSProp step on the server's weights; below MIN_BATCH, wait.

        Raises FloatingPointError when the step leads to NaN or infinity.
        """
        s, a, r, s_, s_mask = self.train_queue
        if len(s) < MIN_BATCH:
            return
        self.train_queue = [[], [], [], [], []]
        batch = np.zeros((max(BATCH_ROWS, len(s)), 2 * NUM_STATES + NUM_ACTIONS + 3), np.float32)
        rows, R = batch[:len(s)], NUM_STATES + NUM_ACTIONS      # R: the column after s and a
        rows[:, :NUM_STATES] = s
        rows[:, NUM_STATES:R] = a
        rows[:, R] = r
        rows[:, R + 1:-2] = s_
        rows[:, -2] = s_mask
        rows[:, -1] = 1
        self.parameter_server.apply_update(batch, self._local_weights())

    def predict_p(self, s):
        """Probability of each action: s (B, 4) → p (B, 2), rows sum to 1.

        In NumPy, on the weights pulled, for any number of hidden layers: 8 µs; as a graph 240 µs.
        """
        self._local_weights()
        *hidden, kernel, bias, _, _ = self._layers
        for w, b in zip(hidden[::2], hidden[1::2]):
            s = np.maximum(s @ w + b, 0)                # .dot would let go of the interpreter
        p = (s @ kernel + bias).T       # (2, B)        # lock: 11 500 in place of 18 000 steps/s
        p = np.exp(p - np.maximum.reduce(p))            # safe from overflow
        return (p / np.add.reduce(p)).T

    def train_push(self, s, a, r, s_):
        """Queue a sample: s (4,), a one-hot (2,), R, s' (4,) n steps later or None at the end."""
        for column, value in zip(self.train_queue, (s, a, r, NONE_STATE if s_ is None else s_,
                                                    0. if s_ is None else 1.)):
            column.append(value)


class Agent:
    """The pole on its cart that decides what to do, and remembers its last N_STEP_RETURN steps.

    Article: 「Agent」 and 「Advantage」. `memory`: (s, a one-hot, r, s') of each of these steps.
    """

    def __init__(self, name, parameter_server):
        self.parameter_server = parameter_server
        self.brain = LocalBrain(name, parameter_server)
        self.memory = collections.deque()
        seed = parameter_server.seed
        self.random = random.Random(None if seed is None else f"{seed} {name}")     # no one else's

    def epsilon(self):
        """Share of random actions at the shared step count, by now."""
        server = self.parameter_server
        share = min(1, server.frames * N_WORKERS / (EPS_STEPS * server.workers))
        return EPS_START + share * (EPS_END - EPS_START)

    def act(self, s, *, greedy=False):
        """Choose an action for s (4,): at random by ε, else by p; `greedy`: the most probable."""
        if not greedy and self.random.random() < self.epsilon():
            return self.random.randrange(NUM_ACTIONS)
        p = self.brain.predict_p(s[np.newaxis])[0]
        return int(p.argmax()) if greedy else self.random.choices(range(NUM_ACTIONS), p.tolist())[0]

    def advantage_push_local_brain(self, s, a, r, s_):
        """Remember a step; hand the brain each sample whose n-step return is complete.

        R = r0 + γ·r1 + … + γ^(n-1)·r(n-1) over the n steps remembered; the brain adds γ^n·V(s').
        At the episode's end (s_ is None) the memory runs empty, with ever shorter sums.
        Paper: Algorithm S3, R ← r + γR.
        """
        a_cats = np.zeros(NUM_ACTIONS, np.float32)
        a_cats[a] = 1
        self.memory.append((s, a_cats, r, s_))
        while len(self.memory) >= N_STEP_RETURN or (s_ is None and self.memory):
            R = sum(GAMMA ** k * r_k for k, (_, _, r_k, _) in enumerate(self.memory))
            s0, a0, _, _ = self.memory.popleft()
            self.brain.train_push(s0, a0, R, s_)


class Environment:
    """One CartPole with its agent. Article: 「Environment」, steps 1 to 9 of 「Asynchronous」."""

    def __init__(self, name, thread_type, parameter_server):
        self.name, self.thread_type, self.parameter_server = name, thread_type, parameter_server
        self.env = gym.make(parameter_server.env, disable_env_checker=True,
                            render_mode="rgb_array" if thread_type == "test" else None)
        self.limit = self.env.spec.max_episode_steps    # 200 in CartPole-v0, 500 in v1
        self.agent = Agent(name, parameter_server)
        self.total_reward_vec = np.zeros(10)            # steps of the last 10 episodes
        self.count_trial_each_thread = 0

    def run(self):
        """Play one episode and return its steps, or None if it was cut short.

        A learning thread updates the server and pulls from it every T_MAX steps and at the end.
        """
        server, agent, learning = self.parameter_server, self.agent, self.thread_type == "learning"
        agent.brain.pull_parameter_server()
        first = self.count_trial_each_thread == 0
        if first and not learning and server.film:
            self.env = server.film(self.env)
        s, _ = self.env.reset(seed=agent.random.getrandbits(31) if first else None)
        step, done = 0, False
        while not done:
            if server.stop.is_set() if learning else server.interrupted:
                return None
            a = agent.act(s, greedy=not learning)
            s_, _, terminated, truncated, _ = self.env.step(a)
            step += 1
            done = terminated or truncated
            r = 0 if not done else -1 if step < self.limit - 1 else 1
            if learning:
                with server.lock:
                    server.frames += 1
                agent.advantage_push_local_brain(s, a, r, None if done else s_)
                if done or step % T_MAX == 0:
                    agent.brain.update_parameter_server()
                    agent.brain.pull_parameter_server()
            s = s_

        self.total_reward_vec = np.hstack((self.total_reward_vec[1:], step))
        self.count_trial_each_thread += 1
        if learning and server.finish_episode(self.name, self.count_trial_each_thread, step,
                                              self.total_reward_vec.mean()):
            agent.brain.push_parameter_server()     # the winner's weights, no update follows them
        return step


class WorkerThread:
    """What a thread runs: a "learning" worker until learning is over, the "test" worker from then.

    Article: 「Worker_Thread」.
    """

    def __init__(self, thread_name, thread_type, parameter_server):
        self.name, self.thread_type = thread_name, thread_type
        self.parameter_server = parameter_server
        self.environment = Environment(thread_name, thread_type, parameter_server)

    def run(self):
        """Learn, and stop all others on any failure; or wait, play, and return steps an episode."""
        server = self.parameter_server
        try:
            if self.thread_type == "learning":
                while not (server.stop.is_set() or server.is_learned.is_set()):
                    self.environment.run()
                return None
            while not (server.stop.is_set() or server.is_learned.is_set()):
                time.sleep(.05)
            return self._test()
        except BaseException:
            with server.lock:
                first, server.failed = not server.failed, server.failed or self.name
                server.stop.set()
            if first:       # in a thread, `threading` prints it with the thread's name
                raise
        finally:
            self.environment.env.close()

    def _test(self):
        played = []
        for episode in range(1, self.parameter_server.test_episodes + 1):
            steps = self.environment.run()
            if steps is None:
                break
            played.append(steps)
            say(f"{self.name}  episode {episode}  steps {steps}")
        if played:
            say(f"test: mean of {len(played)} episodes {np.mean(played):.1f} steps")
        return played


def main(argv=None):
    """Run the program and return its exit status. Article: 「メイン関数」, steps M0 to M3."""
    args = parse_arguments(argv)
    lost = []       # the promised products that could not be made
    attempt = functools.partial(attempt_product, lost)
    began = time.time()

    # M0. What all threads share
    server = ParameterServer(
        env=args.env, workers=args.workers, seed=args.seed, max_episodes=args.max_episodes,
        test_episodes=args.test_episodes, film=lambda env: film(env, args, attempt))
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, functools.partial(note_signal, server))

    # M1. The workers
    workers = [] if args.play else [WorkerThread(f"local_thread{i + 1}", "learning", server)
                                    for i in range(args.workers)]
    test = WorkerThread("test_thread", "test", server)

    # M2. Each learning worker runs in a thread of its own; what they learn is safe before all else
    if args.play:
        load_weights(server, args.play)
    else:
        say(learn(server, workers, Watch(server, workers, args, attempt)))
        attempt("weights", save_weights, server, args.out)
        if not server.interrupted:
            attempt("learning_curve.png", draw_learning_curve, server, args.out)
            attempt("A3C.png", draw_network, server, args)

    # M3. The test runs on the main thread: macOS opens windows nowhere else
    if server.is_learned.is_set() and not server.interrupted:
        attempt("test", test.run)
    for path in sorted(args.out.iterdir()):
        if path.stat().st_mtime >= began - 1:   # some file systems keep whole seconds
            say(f"wrote {path}")
    if server.interrupted:
        say(f"interrupted by {signal.Signals(server.interrupted).name}")
        return 128 + server.interrupted
    return 0 if server.is_learned.is_set() and not (server.failed or lost) else 1


# -- all that is not A3C: the command line, faults and signals, and what a watcher sees ------------

def parse_arguments(argv):
    """Read the command line and try all that the run will need, before any work."""
    def whole(lowest):
        def read(text):
            if not text.isdecimal() or int(text) < lowest:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} up")
            return int(text)
        return read

    def cartpole(text):
        if text not in ("CartPole-v0", "CartPole-v1"):
            raise argparse.ArgumentTypeError(f"{text!r} is not CartPole-v0 or CartPole-v1, the only"
                                             " ones whose reward rule this is")
        return text

    parser = argparse.ArgumentParser(
        prog="a3c_cartpole.py", description="Learn CartPole with A3C, then film what was learned.",
        formatter_class=functools.partial(argparse.ArgumentDefaultsHelpFormatter,
                                          max_help_position=34))
    parser.error = refuse
    option = parser.add_argument
    option("--env", type=cartpole, default=ENV, metavar="{CartPole-v0,CartPole-v1}",
           help="the pole to balance, for 200 or 500 steps")
    option("--workers", type=whole(1), default=N_WORKERS, metavar="N", help="learning threads")
    option("--seed", type=whole(0), metavar="N", help="repeats a run of one worker to the step")
    option("--test-episodes", type=whole(0), default=10, metavar="N", help="episodes of the test")
    option("--max-episodes", type=whole(1), default=20_000, metavar="N",
           help="episodes of all workers after which to give up")
    option("--out", type=Path, default=Path("movie", "A3C"), metavar="DIR", help="where files go")
    option("--render", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
           help="show the test in a window (default: where there is a screen)")
    option("--play", type=Path, metavar="WEIGHTS", help="do not learn, test this file")
    option("--log", action="store_true", help="a line for each episode, not a live table")
    args = parser.parse_args(argv)
    args.render = getattr(args, "render", has_screen())
    for package in "moviepy", "matplotlib", "pygame":
        if importlib.util.find_spec(package) is None:
            refuse(f"package {package} is missing: {INSTALL}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        refuse(f"argument --out: cannot write to {str(args.out)!r} ({error.strerror}); name a"
               " folder that can be created and written")
    return args


def refuse(message):
    """Say in one line what is wrong and what would be right, and exit with status 2."""
    print(f"a3c_cartpole.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def has_screen():
    """Whether there is a screen to open a window on."""
    return sys.platform in ("darwin", "win32") or any(
        name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def say(line):
    """Print a line at once; that nobody reads on (`| head`) must not cost the run."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def note_signal(server, number, _frame):
    """Let every loop know of a signal; a second one ends the program at once."""
    server.interrupted = number
    signal.signal(number, signal.SIG_DFL)


def attempt_product(lost, name, make, *arguments):
    """Return what make returns; its failure costs this product, a line on stderr, the status."""
    try:
        return make(*arguments)
    except Exception as error:
        lost.append(name)
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"{name} lost: {cause[:300]}", file=sys.stderr, flush=True)


def save_weights(server, out):
    """Write the weights, if finite, beside their place, then rename: never half a file."""
    if not all(np.isfinite(weight).all() for weight in server.model.get_weights()):
        return
    name = "A3C.weights.h5" if server.is_learned.is_set() else "A3C.unfinished.weights.h5"
    part = out / "part.weights.h5"
    try:
        server.model.save_weights(part)
        os.replace(part, out / name)
    finally:
        part.unlink(missing_ok=True)


def load_weights(server, path):
    """Take the weights from a file of an earlier run, learned by that, or exit with status 2."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")      # Keras only warns of layers that it leaves alone
            server.model.load_weights(path)
    except Exception as error:
        cause = type(error).__name__ if path.is_file() else "no such file"
        refuse(f"argument --play: {str(path)!r} holds no weights of this network ({cause}); name"
               " the A3C.weights.h5 of an earlier run")
    server.is_learned.set()


def learn(server, workers, watch):
    """Run the workers until learning is over, and return a line that says what came of it."""
    threads = [threading.Thread(target=worker.run, name=worker.name, daemon=True)
               for worker in workers]
    server.started = time.perf_counter()
    with watch:
        for thread in threads:
            thread.start()
        while not (server.stop.wait(.1) or server.interrupted):
            watch.look()
        seconds = time.perf_counter() - server.started
        server.stop.set()
        for thread in threads:
            thread.join(max(0, server.started + seconds + 2 - time.perf_counter()))
        watch.look(last=True)
    figures = (f"{server.frames} steps, {server.episodes} episodes, {server.workers} workers,"
               f" {server.frames / seconds:.0f} steps/s")
    if server.is_learned.is_set():
        return f"learned in {seconds:.1f} s: {figures}"
    if server.episodes >= server.max_episodes:
        return f"not learned within {server.episodes} episodes: {seconds:.1f} s, {figures}"
    reason = f"{server.failed} failed" if server.failed else "interrupted"
    return f"not learned, {reason} after {seconds:.1f} s: {figures}"


class Watch:
    """Empties the server's history into history.csv and a live table or a line an episode."""

    def __init__(self, server, workers, args, attempt):
        self.server, self.workers, self.attempt = server, workers, attempt
        self.path = args.out / HISTORY
        self.live, self.last, self.shown = None, {}, 0.
        self.as_lines = args.log or not sys.stdout.isatty()

    def __enter__(self):
        self.file = self.attempt(HISTORY, open, self.path, "w", 1) or open(os.devnull, "w")
        self._write(Episode._fields)
        if not self.as_lines:
            from rich.live import Live
            self.live = Live(self.table(), auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()
        self.attempt(HISTORY, self.file.close)

    def _write(self, row):
        if self.attempt(HISTORY, csv.writer(self.file, lineterminator="\n").writerow, row) is None:
            self.file = open(os.devnull, "w")       # said once, and the run goes on

    def look(self, last=False):
        """Show and keep what came since the last look; the table at most 2 times a second."""
        while self.server.history:
            e = self.server.history.popleft()
            self.last[e.thread] = e
            self._write(e._replace(seconds=f"{e.seconds:.3f}"))
            if self.as_lines:
                say(f"{e.thread}  episode {e.episode}  steps {e.steps}"
                    f"  mean of last 10 {e.mean_of_last_10:.1f}")
        if self.live and (last or time.perf_counter() > self.shown + .5):
            self.shown = time.perf_counter()
            self.live.update(self.table(), refresh=True)

    def table(self):
        """Return the live table, as a rich renderable that fits into 80 columns."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        server, environment = self.server, self.workers[0].environment
        seconds = time.perf_counter() - server.started
        table = Table(box=None, caption_justify="left", caption=(
            f"{server.frames} steps  {server.episodes} episodes"
            f"  {server.frames / seconds:.0f} steps/s  {seconds:.1f} s"
            f"  ε {environment.agent.epsilon():.2f}"))
        for heading in "worker", "episodes", "last steps", "mean of last 10":
            table.add_column(heading, justify="right")
        table.add_column(f"0 to {environment.limit}")
        rows = [self.last.get(w.name, Episode(w.name, 0, 0, 0., 0, 0.)) for w in self.workers]
        if len(rows) > 16:      # what fits on 24 lines
            rows = sorted(rows, key=lambda e: -e.mean_of_last_10)[:16]
        for e in rows:
            won = server.winner == e.thread
            bar = ProgressBar(environment.limit, e.mean_of_last_10, width=20)
            table.add_row(("★ " if won else "") + e.thread, str(e.episode), str(e.steps),
                          f"{e.mean_of_last_10:.1f}", bar, style="bold green" if won else None)
        return table


def draw_learning_curve(server, out):
    """Draw history.csv: each worker's mean of its last 10 episodes over the steps of all."""
    from matplotlib.figure import Figure  # without pyplot it opens no window
    curves = collections.defaultdict(lambda: ([], []))
    with open(out / HISTORY, newline="") as file:
        for row in csv.DictReader(file):
            for curve, name in zip(curves[row["thread"]], ("total_steps", "mean_of_last_10")):
                curve.append(float(row[name]))
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(0, EPS_STEPS * server.workers / N_WORKERS, color="gold", alpha=.3,
                 label=f"ε falls from {EPS_START} to {EPS_END:g}")
    limit = gym.spec(server.env).max_episode_steps - 1
    axes.axhline(limit, color="black", linestyle="--", label=f"learned above {limit}")
    for thread, curve in curves.items():
        won = thread == server.winner
        axes.plot(*curve, linewidth=2.5 if won else .8, alpha=1 if won else .6,
                  zorder=3 if won else 2, label=f"{thread}, the first to learn" if won else None)
    axes.set(title=f"A3C on {server.env}, {server.workers} workers", xlabel="steps of all workers",
             ylabel="steps an episode, mean of a worker's last 10", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(out / "learning_curve.png")


def draw_network(server, args):
    """Draw the network, where pydot and Graphviz are; elsewhere say so."""
    try:
        keras.utils.plot_model(server.model, args.out / "A3C.png", show_shapes=True)
    except ImportError:
        say("no A3C.png, the picture of the network: it takes pydot and Graphviz")
        if args.log:
            server.model.summary(print_fn=say, line_length=80)


def film(env, args, attempt):
    """Wrap the test's environment: every episode is filmed and, with a screen, shown."""
    def open_screen():
        # else Mesa's OpenGL brings an LLVM of its own beside TensorFlow's, and the process crashes
        os.environ["SDL_FRAMEBUFFER_ACCELERATION"] = "0"
        import pygame
        pygame.display.init()
        return True

    shown = args.render and attempt("window", open_screen)
    if not shown:
        os.environ["SDL_VIDEODRIVER"] = "dummy"     # CartPole draws for a film with no screen, too
    env = attempt("video", Film, env, args.out, attempt) or env
    return Window(env, attempt) if shown else env


class Film(gym.wrappers.RecordVideo):
    """Films every episode; a film that fails is the last, and the test goes on without."""

    def __init__(self, env, out, attempt):
        super().__init__(env, str(out), lambda _: True, name_prefix="A3C", disable_logger=True)
        self.attempt = attempt

    def step(self, action):
        """Make a step; with an episode's last one its film is complete."""
        result = super().step(action)
        if self.recording and (result[2] or result[3]):
            self.stop_recording()
        return result

    def stop_recording(self):
        """Write the film, and make sure that it can be read."""
        path = Path(self.video_folder, f"{self.name_prefix}-episode-{self.episode_id}.mp4")
        if not self.attempt(path.name, self._write, path):
            path.unlink(missing_ok=True)
            self.recording, self.recorded_frames, self.episode_trigger = False, [], None

    def _write(self, path):
        from imageio_ffmpeg import count_frames_and_secs
        frames = len(self.recorded_frames)
        hold = getattr(signal, "pthread_sigmask", lambda *_: None)  # a terminal sends Ctrl-C to
        hold(signal.SIG_BLOCK, [signal.SIGINT])                     # ffmpeg too
        try:
            super().stop_recording()
        finally:
            hold(signal.SIG_UNBLOCK, [signal.SIGINT])
        if count_frames_and_secs(str(path))[0] != frames:
            raise OSError(f"{path} is not complete")
        return True


class Window(gym.wrappers.HumanRendering):
    """Shows each step at its real speed, until the window is closed or fails."""

    def __init__(self, env, attempt):
        super().__init__(env)
        self.attempt, self.is_open = attempt, True

    def _render_frame(self):
        self.is_open = self.is_open and bool(self.attempt("window", self._show))

    def _show(self):
        import pygame
        super()._render_frame()
        if not pygame.event.get(pygame.QUIT):
            return True
        print("window closed, the test goes on", file=sys.stderr)
        pygame.display.quit()
        return False


if __name__ == "__main__":
    sys.exit(main())
