# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#   'tensorflow-cpu>=2.21,<2.22; sys_platform != "darwin" and platform_machine in "x86_64 AMD64"',
#   'tensorflow>=2.21,<2.22; sys_platform == "darwin" or platform_machine not in "x86_64 AMD64"',
#   'keras>=3.12,<4', 'gymnasium[classic-control]>=1.4,<2', 'numpy>=2.1,<3', 'moviepy>=2.1,<3',
#   'matplotlib>=3.9,<4']
# ///
"""A3C on CartPole, complete in this one file: Keras, TensorFlow and threads, on the CPU.

The program of the article 「【強化学習】実装しながら学ぶA3C【CartPoleで棒立て:1ファイルで完結】」
(Sugulu, 2017, https://qiita.com/sugulu/items/acbc909dd9b74b043e45) for today's libraries, with its
classes, methods and constants in its order; README.md lists every difference. "The paper" is Mnih
et al., https://arxiv.org/abs/1602.01783, whose Algorithm S3 this is, by way of Jaromír Janisch's
"Let's make an A3C", https://jaromiru.com/2017/02/16/lets-make-an-a3c-theory/.
`python a3c_cartpole.py` learns, then films the learned policy; `--help` lists the options.
Shapes in comments: B samples in a batch, W weights in the network (131 of them).
"""
import argparse
import bisect
import collections
import contextlib
import csv
import ctypes
import functools
import gc
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
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")    # compiles 0.2 s faster
INSTALL = "on Python 3.10 to 3.13 this installs it: python -m pip install -r requirements.txt"
sys.modules.setdefault("matplotlib", None)      # Keras would import it for plots: 0.45 s more
host_collects = gc.isenabled()
gc.disable()                                    # searching the imports for garbage: 0.4 s more
try:
    import gymnasium as gym
    import keras
    import numpy as np
    import tensorflow as tf
except ImportError as missing:
    if __name__ != "__main__":
        raise
    print(f"a3c_cartpole.py: error: {missing}; {INSTALL}", file=sys.stderr)
    sys.exit(2)
finally:
    gc.freeze()
    if host_collects:
        gc.enable()
    if sys.modules["matplotlib"] is None:
        del sys.modules["matplotlib"]
with contextlib.suppress(RuntimeError):     # a host that has started TensorFlow keeps its settings
    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_inter_op_parallelism_threads(1)     # calls this small only lose time
    tf.config.threading.set_intra_op_parallelism_threads(1)     # between TensorFlow's own threads
warnings.filterwarnings("ignore", ".*(CartPole-v0 is out of date|Overwriting existing videos)")

# -- constants of Game
ENV = "CartPole-v0"
NUM_STATES = 4          # position (m), velocity (m/s) of the cart; angle (rad), rad/s of the pole
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right
NONE_STATE = np.zeros(NUM_STATES, np.float32)   # stands for s' where the episode is over
ONE_HOT = np.eye(NUM_ACTIONS, dtype=np.float32)     # row a stands for action a

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
SAMPLE = [NUM_STATES, NUM_ACTIONS, 1, NUM_STATES, 1, 1]     # columns of s, a, R, s', mask, and 1
BATCH_COLUMNS = sum(SAMPLE)

# -- constants of ε-greedy
EPS_START = .5          # share of random actions at the first step,
EPS_END = 0.            # and from EPS_STEPS on; linear in between
EPS_STEPS = 200 * N_WORKERS     # steps of all threads together

Episode = collections.namedtuple(
    "Episode", "thread episode steps mean_of_last_10 total_steps seconds")


class ParameterServer:
    """The network that all threads share, its optimiser, and all else that they share.

    Article: 「ParameterServer」, Fig. 2. Paper: the global parameters θ, θv and the counter T.
    `seed` is that of weights, agents and environments; `max_episodes` counts those of all workers.
    """

    def __init__(self, *, env=ENV, workers=N_WORKERS, seed=None, max_episodes=math.inf,
                 test_episodes=10):
        self.env, self.workers, self.seed = env, workers, seed
        self.names = [f"local_thread{i + 1}" for i in range(workers)]
        self.max_episodes, self.test_episodes = max_episodes, test_episodes
        self.limit = gym.spec(env).max_episode_steps    # 200 in CartPole-v0, 500 in v1
        self.frames = self.episodes = 0         # steps and episodes of all learning threads so far
        self.history = collections.deque()      # an Episode for each, until somebody takes it out
        self.is_learned = threading.Event()     # set by the first worker to meet the stop rule
        self.stop = threading.Event()           # set when learning is over for any reason
        self.winner = self.failed = None        # names of threads
        self.interrupted = 0                    # a signal's number
        self.started = time.perf_counter()
        self.lock = threading.Lock()            # for every counter here
        self.idle = threading.Condition(self.lock)      # told when an update ends
        self.updates_under_way, self.update_graph = 0, None
        self._model, self.model_is_out = self._build_model(), False
        self.optimizer = keras.optimizers.RMSprop(LEARNING_RATE, RMSPROP_DECAY, epsilon=1e-10)
        self.optimizer.build(self._model.trainable_variables)
        for mean_square in self.optimizer.variables[2:]:    # after the step count and the rate;
            mean_square.assign(tf.ones_like(mean_square))   # TensorFlow 1 began at 1, Keras at 0
        weights = self._model.get_weights()
        shapes = [weight.shape for weight in weights]
        ends = [0, *itertools.accumulate(map(math.prod, shapes))]
        self.slices = list(zip(ends, ends[1:], shapes))         # where each weight lies in (W,)
        self.newest = 0, self.pack(weights)                     # updates made, weights (W,)

    @property
    def model(self):
        """The shared Keras model. Its holder may change it: from then on each pull reads it."""
        self.model_is_out = True
        return self._model

    def _build_model(self):
        """Define the network, Fig. 1: state (B, 4) → p of each action (B, 2), value V (B, 1)."""
        glorot = keras.initializers.GlorotUniform(keras.random.SeedGenerator(self.seed))
        dense = functools.partial(keras.layers.Dense, kernel_initializer=glorot)
        l_input = keras.Input((NUM_STATES,), name="state")
        l_dense = dense(16, "relu", name="hidden")(l_input)
        out_actions = dense(NUM_ACTIONS, "softmax", name="policy")(l_dense)
        out_value = dense(1, "linear", name="value")(l_dense)
        return keras.Model(l_input, [out_actions, out_value], name="A3C")

    @staticmethod
    def pack(arrays):
        """Join arrays of any shape into one vector, float32."""
        return np.concatenate([array.ravel() for array in arrays])

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
        updates = -1
        try:
            made = self.update_graph(self.pack([batch, weights]))
            weights, (loss, updates) = made[:-2], made[-2:].tolist()
        finally:
            with self.idle:
                if updates >= self.newest[0]:
                    self.newest = updates, weights
                self.updates_under_way -= 1
                self.idle.notify_all()
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss or a weight is not finite at step {self.frames}")

    def epsilon(self):
        """Share of random actions by now: EPS_STEPS are for N_WORKERS, fewer for fewer workers."""
        share = min(1, self.frames * N_WORKERS / (EPS_STEPS * self.workers))
        return EPS_START + share * (EPS_END - EPS_START)

    def finish_episode(self, name, trial, step, mean):
        """Record an episode; True for one worker at the most, the first to meet the stop rule."""
        with self.lock:
            if self.stop.is_set():
                return False
            self.episodes += 1
            self.history.append(Episode(name, trial, step, mean, self.frames,
                                        time.perf_counter() - self.started))
            if mean > self.limit - 1:
                self.winner = name
                self.is_learned.set()
            if self.winner or self.episodes >= self.max_episodes:
                self.stop.set()
            return self.winner == name


class LocalBrain:
    """A thread's own copy of the network: it acts, gathers samples and turns them into updates.

    Article: 「LocalBrain」. Paper: the thread's parameters θ', θv' and its gradients dθ, dθv.
    `train_queue`: five lists, s (4,), a one-hot (2,), R, s' (4,), mask (0 at the end, else 1).
    Raises ValueError for a network that predict_p does not repeat.
    """

    def __init__(self, name, parameter_server):
        self.name, self.parameter_server = name, parameter_server
        self.train_queue, self._model = [[], [], [], [], []], None
        self.pull_parameter_server()
        if parameter_server.update_graph is None:       # one for all brains, and before any thread
            parameter_server.update_graph = self._build_graph()     # starts: tracing there races

    @property
    def model(self):
        """The brain's own Keras model, built when first asked for, and from then on read back."""
        if self._model is None:
            model = self.parameter_server._build_model()
            model.set_weights(self.parameter_server.unpack(self._weights))
            self._model = model
        return self._model

    def _local_weights(self):
        if self._model is not None:     # who holds it may have changed it
            self._adopt(self.parameter_server.pack(self._model.get_weights()))
        return self._weights

    def _adopt(self, weights):
        self._weights = weights         # (W,)
        *hidden, kernel, bias, _, _ = [
            w.reshape(-1, w.shape[-1]) for w in self.parameter_server.unpack(weights)]
        self._hidden, self._head = list(zip(hidden[::2], hidden[1::2])), (kernel, bias)

    @staticmethod
    def loss_total(p, v, a, r):
        """Loss of each sample (B, 1), from p (B, 2), V(s) (B, 1), a one-hot (B, 2) and R (B, 1).

        Article: 「Actor-Critic」. Paper, section 4: log π(a|s; θ')·(R − V) and the entropy of π, to
        be large, and (R − V)², to be small.
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
        s, a, r, s_, s_mask, is_sample = tf.split(batch, SAMPLE, axis=1)
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
        """Build, for all brains, gradient on the local weights and RMSProp step on the server's.

        Returns a function of one vector, batch (B, 13) and local weights (W,) joined, that gives
        another: the server's weights after the step (W,), the loss, the number of steps so far.
        """
        server, size, right = self.parameter_server, len(self._weights), False
        s = np.linspace(-1, 1, 8 * NUM_STATES, dtype=np.float32).reshape(8, NUM_STATES)
        with contextlib.suppress(ValueError):
            right = np.allclose(self.predict_p(s), server._model(s)[0], atol=1e-5)
        if not right:
            raise ValueError("predict_p knows only a chain of Dense relu layers, then a Dense"
                             " softmax and a Dense linear")
        shared = server._model.trainable_variables

        def update(packed):     # one vector in, one out: a tensor's conversion takes 8 µs
            batch, weights = tf.reshape(packed[:-size], (-1, BATCH_COLUMNS)), packed[-size:]
            loss, grads = self.gradients(batch, server.unpack(weights))
            server.optimizer.apply_gradients(zip(grads, shared))
            flat = tf.concat([tf.reshape(w.value, [-1]) for w in shared], axis=0)
            loss += 0 * tf.reduce_sum(flat)     # NaN if any weight is not finite
            steps = tf.cast(server.optimizer.iterations, tf.float32)
            return tf.concat([flat, [loss, steps]], axis=0)

        return compile_by_xla(update, BATCH_ROWS * BATCH_COLUMNS + size,
                              shared + server.optimizer.variables)

    def pull_parameter_server(self):
        """Copy all weights from the server, as the latest update or push of any brain left them.

        Every update hands the weights it made to the server in NumPy: a pull needs no TensorFlow.
        """
        server = self.parameter_server
        self._adopt(server.pack(server._model.get_weights()) if server.model_is_out
                    else server.newest[1])
        if self._model is not None:
            self._model.set_weights(server.unpack(self._weights))

    def push_parameter_server(self):
        """Copy all weights to the server, between two updates and never in the midst of one."""
        weights, server = self._local_weights(), self.parameter_server
        with server.idle:
            server.idle.wait_for(lambda: not server.updates_under_way)
            server._model.set_weights(server.unpack(weights))
            server.newest = server.newest[0], weights

    def update_parameter_server(self):
        """Empty the queue into one RMSProp step on the server's weights; below MIN_BATCH, wait.

        Raises FloatingPointError when the step leads to NaN or infinity.
        """
        s, a, r, s_, s_mask = self.train_queue
        if len(s) < MIN_BATCH:
            return
        self.train_queue = [[], [], [], [], []]
        batch = np.zeros((max(BATCH_ROWS, len(s)), BATCH_COLUMNS), np.float32)
        rows, R = batch[:len(s)], NUM_STATES + NUM_ACTIONS      # R: the column after s and a
        rows[:, :NUM_STATES], rows[:, NUM_STATES:R], rows[:, R] = s, a, r
        rows[:, R + 1:-2], rows[:, -2], rows[:, -1] = s_, s_mask, 1
        self.parameter_server.apply_update(batch, self._local_weights())

    def predict_p(self, s):
        """Probability of each action: s (B, 4) → p (B, 2), rows sum to 1.

        In NumPy, on the weights pulled, for any number of hidden layers: 6 µs; as a graph 240 µs.
        """
        self._local_weights()
        for kernel, bias in self._hidden:
            s = np.maximum(s @ kernel + bias, 0)
        kernel, bias = self._head
        z = s @ kernel + bias       # .dot would let go of the interpreter lock: 36 % fewer steps/s
        return np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True, dtype=float))   # softmax

    def train_push(self, s, a, r, s_):
        """Queue a sample: s (4,), a one-hot (2,), R, s' (4,) n steps later or None at the end."""
        sample = (s, a, r, NONE_STATE, 0.) if s_ is None else (s, a, r, s_, 1.)
        for column, value in zip(self.train_queue, sample):
            column.append(value)


class Agent:
    """The pole on its cart that decides what to do, and remembers its last N_STEP_RETURN steps.

    Article: 「Agent」 and 「Advantage」. `memory`: (s, a one-hot, r, s') of each of these steps.
    """

    def __init__(self, name, parameter_server):
        self.parameter_server, self.memory = parameter_server, collections.deque()
        self.brain = LocalBrain(name, parameter_server)
        seed = parameter_server.seed
        self.random = random.Random(None if seed is None else f"{seed} {name}")     # no one else's

    def act(self, s, *, greedy=False):
        """Choose an action for s (4,): at random by ε, else by p; `greedy`: the most probable."""
        if not greedy and self.random.random() < self.parameter_server.epsilon():
            return self.random.randrange(NUM_ACTIONS)
        p = self.brain.predict_p(s[np.newaxis])[0]
        if greedy:
            return int(p.argmax())
        *bounds, _ = itertools.accumulate(p.tolist())       # 1 µs less than random.choices
        return bisect.bisect(bounds, self.random.random())

    def advantage_push_local_brain(self, s, a, r, s_):
        """Remember a step; hand the brain each sample whose n-step return is complete.

        R = r0 + γ·r1 + … + γ^(n-1)·r(n-1) over the n steps remembered; the brain adds γ^n·V(s').
        At the episode's end (s_ is None) the memory runs empty, with ever shorter sums.
        Paper: Algorithm S3, R ← r + γR.
        """
        self.memory.append((s, ONE_HOT[a], r, s_))
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
        s, _ = self.env.reset(seed=agent.random.getrandbits(31) if first else None)
        step, done = 0, False
        while not done:
            if server.stop.is_set() if learning else server.interrupted:
                return None
            a = agent.act(s, greedy=not learning)
            s_, _, terminated, truncated, _ = self.env.step(a)
            step += 1
            done = terminated or truncated
            r = 0 if not done else -1 if step < server.limit - 1 else 1
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
        server, played = self.parameter_server, []
        try:
            while not (server.stop.is_set() or server.is_learned.is_set()):
                if self.thread_type == "learning":
                    self.environment.run()
                else:
                    time.sleep(.05)
            while self.thread_type == "test" and len(played) < server.test_episodes:
                step = self.environment.run()
                if step is None:
                    break
                played.append(step)
                say(f"{self.name}  episode {len(played)}  steps {step}")
            if played:
                say(f"test: mean of {len(played)} episodes {np.mean(played):.1f} steps")
            return played
        except BaseException:
            with server.lock:
                first, server.failed = not server.failed, server.failed or self.name
                server.stop.set()
            if first:       # in a thread, `threading` prints it with the thread's name
                raise
        finally:
            self.environment.env.close()


def main(argv=None):
    """Run the program and return its exit status. Article: 「メイン関数」, steps M0 to M3."""
    args, began, lost = parse_arguments(argv), time.time(), []
    attempt = functools.partial(attempt_product, lost)

    # M0. What all threads share
    server = ParameterServer(env=args.env, workers=args.workers, seed=args.seed,
                             max_episodes=args.max_episodes, test_episodes=args.test_episodes)
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, functools.partial(note_signal, server))

    # M1. The workers
    workers = [] if args.play else [WorkerThread(n, "learning", server) for n in server.names]
    test = WorkerThread("test_thread", "test", server)

    # M2. Each learning worker runs in a thread of its own; what they learn is safe before all else
    if args.play:
        load_weights(server, args.play)
    else:
        say(learn(server, workers, Watch(server, args, attempt)))
        attempt("weights", save_weights, server, args.out)
        if not server.interrupted:
            attempt("learning_curve.png", draw_learning_curve, server, args.out)
            attempt("A3C.png", draw_network, server, args)

    # M3. The test runs on the main thread: macOS opens windows nowhere else
    if server.is_learned.is_set() and not server.interrupted:
        film(test.environment, args, attempt)
        attempt("test", test.run)
    for path in sorted(args.out.iterdir()):
        if path.stat().st_mtime >= began - 1:   # some file systems keep whole seconds
            say(f"wrote {path}")
    if server.interrupted:
        say(f"interrupted by {signal.Signals(server.interrupted).name}")
        return 128 + server.interrupted
    return 0 if server.is_learned.is_set() and not (server.failed or lost) else 1


def learn(server, workers, watch):
    """M2: run the workers until learning is over, and return a line that says what came of it."""
    threads = [threading.Thread(target=w.run, name=w.name, daemon=True) for w in workers]
    server.started = time.perf_counter()
    with watch.display:
        for thread in threads:
            thread.start()
        while not (server.stop.wait(.1) or server.interrupted):
            watch.look()
        seconds = time.perf_counter() - server.started
        server.stop.set()
        for thread in threads:      # one that hangs must not hold up the end: 2 s for all together
            thread.join(max(0, server.started + seconds + 2 - time.perf_counter()))
        watch.look()
    figures = (f"{server.frames} steps, {server.episodes} episodes, {server.workers} workers,"
               f" {server.frames / seconds:.0f} steps/s")
    if server.is_learned.is_set():
        return f"learned in {seconds:.1f} s: {figures}"
    if server.episodes >= server.max_episodes:
        return f"not learned within {server.episodes} episodes: {seconds:.1f} s, {figures}"
    reason = f"{server.failed} failed" if server.failed else "interrupted"
    return f"not learned, {reason} after {seconds:.1f} s: {figures}"


# -- all that is not A3C: the compiler, the command line, faults, and what a watcher sees ----------

def compile_by_xla(function, size, variables):
    """Return a function of one vector compiled, from NumPy to NumPy, and fastest at this size.

    A call takes 155 µs, without XLA 255. Compiling makes one; then the variables are set back.
    """
    graph = tf.function(function, jit_compile=True, autograph=False)
    concrete = graph.get_concrete_function(tf.ones([size]))
    before = [variable.numpy() for variable in variables]
    concrete(tf.ones([size]))
    for variable, value in zip(variables, before):
        variable.assign(value)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)    # gives back what the compiler took, some 50 MB
    call, captured = concrete.inference_fn.call_flat, concrete.captured_inputs  # 60 µs less

    def run(vector):
        tensor = tf.constant(vector)
        return (call(tensor, *captured)[0] if len(vector) == size else graph(tensor)).numpy()
    return run


def parse_arguments(argv):
    """Read the command line and try all that the run will need, before any work."""
    def whole(lowest, text):
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} up")
        return int(text)

    def cartpole(text):
        if text not in ("CartPole-v0", "CartPole-v1"):
            raise argparse.ArgumentTypeError(f"{text!r} is not CartPole-v0 or CartPole-v1, the only"
                                             " ones whose reward rule this is")
        return text

    from_0, from_1 = functools.partial(whole, 0), functools.partial(whole, 1)
    parser = argparse.ArgumentParser(
        "a3c_cartpole.py", description="Learn CartPole with A3C, then film what was learned.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, option = refuse, functools.partial(parser.add_argument, metavar="N")
    option("--env", type=cartpole, default=ENV, metavar="{CartPole-v0,CartPole-v1}",
           help="the pole to balance, for 200 or 500 steps")
    option("--workers", type=from_1, default=N_WORKERS, help="learning threads")
    option("--seed", type=from_0, help="repeats a run of one worker to the step")
    option("--test-episodes", type=from_0, default=10, help="episodes of the test")
    option("--max-episodes", type=from_1, default=20_000, help="of all workers, then give up")
    option("--out", type=Path, default=Path("movie", "A3C"), metavar="DIR", help="where files go")
    option("--play", type=Path, metavar="WEIGHTS", help="do not learn, test this file")
    parser.add_argument("--render", action=argparse.BooleanOptionalAction,
                        default=argparse.SUPPRESS,
                        help="show the test in a window (default: where there is a screen)")
    parser.add_argument("--log", action="store_true", help="a line for each episode, no table")
    args = parser.parse_args(argv)
    screen = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}
    args.render = getattr(args, "render", bool(screen))
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
    """Return what make does, or False: a failure costs this product, a line, the exit status."""
    try:
        return name not in lost and make(*arguments)
    except Exception as error:
        lost.append(name)
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"{name} lost: {cause[:300]}", file=sys.stderr, flush=True)
        return False


def save_weights(server, out):
    """Write the weights, if finite, beside their place, then rename: never half a file."""
    name = "A3C.weights.h5" if server.is_learned.is_set() else "A3C.unfinished.weights.h5"
    part = out / "part.weights.h5"
    if all(np.isfinite(weight).all() for weight in server.model.get_weights()):
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


HISTORY = "history.csv"


class Watch:
    """Takes episodes out of the server's history, into history.csv and a live table or lines."""

    def __init__(self, server, args, attempt):
        self.server, self.attempt, self.path = server, attempt, args.out / HISTORY
        self.last = {name: Episode(name, 0, 0, 0., 0, 0.) for name in server.names}
        self.as_lines, self.display = args.log or not sys.stdout.isatty(), contextlib.nullcontext()
        if not self.as_lines:
            from rich.live import Live
            self.display = Live(get_renderable=self.table, refresh_per_second=2)
        self.attempt(HISTORY, self._write, "w", [Episode._fields])

    def _write(self, mode, rows):
        with open(self.path, mode, newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    def look(self):
        """Show and keep what came since the last look."""
        new = [self.server.history.popleft() for _ in range(len(self.server.history))]
        for e in new:
            self.last[e.thread] = e
            if self.as_lines:
                say(f"{e.thread}  episode {e.episode}  steps {e.steps}"
                    f"  mean of last 10 {e.mean_of_last_10:.1f}")
        if new:
            rows = [e._replace(seconds=f"{e.seconds:.3f}") for e in new]
            self.attempt(HISTORY, self._write, "a", rows)

    def table(self):
        """Return the live table, as a rich renderable that fits into 80 columns and 24 lines."""
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table
        server, seconds = self.server, time.perf_counter() - self.server.started
        numbers = [Column(heading, justify="right") for heading in
                   ("worker", "episodes", "last steps", "mean of last 10")]
        table = Table(
            *numbers, f"0 to {server.limit}", box=None, caption_justify="left",
            caption=f"{server.frames} steps  {server.episodes} episodes  "
            f"{server.frames / seconds:.0f} steps/s  {seconds:.1f} s  ε {server.epsilon():.2f}")
        best = sorted(self.last.values(), key=lambda e: -e.mean_of_last_10)[:16]
        for e in best if len(self.last) > 16 else self.last.values():
            won = e.thread == server.winner
            bar = ProgressBar(server.limit, e.mean_of_last_10, width=20)
            table.add_row("★ " * won + e.thread, str(e.episode), str(e.steps),
                          f"{e.mean_of_last_10:.1f}", bar, style="bold green" if won else None)
        return table


def draw_learning_curve(server, out):
    """Draw history.csv: each worker's mean of its last 10 episodes over the steps of all."""
    from matplotlib.figure import Figure  # without pyplot it opens no window
    rows = np.atleast_1d(np.genfromtxt(out / HISTORY, delimiter=",", names=True, dtype=None,
                                       encoding="utf-8"))
    axes = Figure(figsize=(8, 5), dpi=100, layout="constrained").add_subplot()
    axes.axvspan(0, EPS_STEPS * server.workers / N_WORKERS, color="gold", alpha=.3,
                 label=f"ε falls from {EPS_START} to {EPS_END:g}")
    axes.axhline(server.limit - 1, color="black", linestyle="--",
                 label=f"learned above {server.limit - 1}")
    for thread in np.unique(rows["thread"]):
        curve, won = rows[rows["thread"] == thread], thread == server.winner
        axes.plot(curve["total_steps"], curve["mean_of_last_10"], linewidth=2.5 if won else .8,
                  alpha=1 if won else .6, zorder=3 if won else 2,
                  label=f"{thread}, the first to learn" if won else None)
    axes.set(title=f"A3C on {server.env}, {server.workers} workers", xlabel="steps of all workers",
             ylabel="steps an episode, mean of a worker's last 10", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="lower right")
    axes.figure.savefig(out / "learning_curve.png")


def draw_network(server, args):
    """Draw the network, where pydot and Graphviz are; elsewhere say so."""
    try:
        keras.utils.plot_model(server.model, args.out / "A3C.png", True, show_layer_names=True)
    except ImportError:
        say("no A3C.png, the picture of the network: it takes pydot and Graphviz")
        if args.log:
            server.model.summary(print_fn=say, line_length=80)


def film(environment, args, attempt):
    """Wrap the test's environment: every episode is filmed and, with a screen, shown."""
    os.environ["SDL_FRAMEBUFFER_ACCELERATION"] = "0"    # else Mesa's LLVM crashes beside XLA's
    import pygame
    shown = args.render and attempt("window", pygame.display.init) is not False
    if not shown:
        os.environ["SDL_VIDEODRIVER"] = "dummy"     # CartPole draws for a film with no screen, too
    environment.env = attempt("video", Film, environment.env, args.out, attempt) or environment.env
    if shown:
        window = environment.env = Window(environment.env)
        window._render_frame = functools.partial(attempt, "window", window._render_frame)


class Film(gym.wrappers.RecordVideo):
    """Films every episode, each frame at once to ffmpeg; the first film that fails is the last."""

    def __init__(self, env, out, attempt):
        super().__init__(env, str(out), lambda _: True, name_prefix="A3C")
        self.attempt, self.part, self.writer, self.frames = attempt, out / "part.mp4", None, 0

    def _capture_frame(self):
        self.attempt("video", self._write)

    def _write(self):
        from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter
        frame = self.env.render()
        if self.writer is None:
            size, hold = frame.shape[1::-1], getattr(signal, "pthread_sigmask", lambda *_: None)
            hold(signal.SIG_BLOCK, [signal.SIGINT])     # a terminal sends Ctrl-C to ffmpeg too
            self.writer = FFMPEG_VideoWriter(str(self.part), size, self.frames_per_sec)
            hold(signal.SIG_UNBLOCK, [signal.SIGINT])
        self.writer.write_frame(frame)
        self.frames += 1

    def stop_recording(self):
        """Let ffmpeg end, and put the film into its place if every frame can be read from it."""
        if self.writer:
            _, said = self.writer.proc.communicate()
            self.attempt("video", self._finish, self.writer.proc.returncode, said.decode())
            self.part.unlink(missing_ok=True)
        self.recording, self.writer, self.frames = False, None, 0

    def _finish(self, status, said):
        from imageio_ffmpeg import count_frames_and_secs
        if status:
            raise OSError(f"ffmpeg ended with status {status}: {said}")
        path = self.part.with_stem(self._video_name)
        if count_frames_and_secs(str(self.part))[0] != self.frames:
            raise OSError(f"{path} is not complete")
        os.replace(self.part, path)


class Window(gym.wrappers.HumanRendering):
    """Shows each step at its real speed, until the window is closed."""

    def _render_frame(self):
        import pygame
        super()._render_frame()
        if pygame.event.get(pygame.QUIT):
            print("window closed, the test goes on", file=sys.stderr)
            pygame.display.quit()
            self._render_frame = lambda: None


if __name__ == "__main__":
    sys.exit(main())
