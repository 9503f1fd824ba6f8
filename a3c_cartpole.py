# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#   'tensorflow-cpu>=2.21,<2.22; sys_platform != "darwin" and platform_machine in "x86_64 AMD64"',
#   'tensorflow>=2.21,<2.22; sys_platform == "darwin" or platform_machine not in "x86_64 AMD64"',
#   'keras>=3.12,<4', 'gymnasium[classic-control]>=1.4,<2', 'numpy>=2.1,<3', 'rich>=13.7,<16',
#   'moviepy>=2.1,<3', 'matplotlib>=3.9,<4']
# ///
"""A3C on CartPole, complete in this one file: Keras, TensorFlow and threads, on the CPU.

The program of the article 「【強化学習】実装しながら学ぶA3C【CartPoleで棒立て:1ファイルで完結】」
(Sugulu, 2017, https://qiita.com/sugulu/items/acbc909dd9b74b043e45) for today's libraries, with its
classes, methods and constants in its order; README.md lists the differences. "The paper" is Mnih
et al., https://arxiv.org/abs/1602.01783, whose Algorithm S3 it follows, as does Jaromír Janisch's
"Let's make an A3C", https://jaromiru.com/2017/02/16/lets-make-an-a3c-theory/.
`python a3c_cartpole.py` learns, then films the learned policy; `--help` lists the options.
Shapes in comments: B samples in a batch, W weights in the network (131), all in one vector θ.
"""
import argparse
import bisect
import contextlib
import ctypes
import functools
import itertools
import os
import queue
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import deque, namedtuple
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"               # CPU only: so small a network gains nothing
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")      # TensorFlow's start-up chatter,
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")     # and its notice of kernels unused here

import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

# -- constants of Game
ENV = "CartPole-v0"
NUM_STATES = 4          # position (m), velocity (m/s) of the cart; angle (rad), rad/s of the pole
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right
NONE_STATE = np.zeros(NUM_STATES)       # stands for s' where the episode is over
ONE_HOT = np.eye(NUM_ACTIONS)           # row a stands for action a

# -- constants of LocalBrain
MIN_BATCH = 5           # samples; fewer wait in the queue for the next update
LOSS_V = .5             # weight of the value loss
LOSS_ENTROPY = .01      # weight of the entropy, which keeps the policy from settling too early
LEARNING_RATE = 5e-3    # η of RMSProp
RMSPROP_DECAY = .99     # α, the share of its mean square that RMSProp keeps at each update

# -- constants of Advantage, the Bellman equation
GAMMA = .99             # γ, discount of a reward, per step
N_STEP_RETURN = 5       # n, rewards summed before V(s') stands for all that follow
GAMMA_N = GAMMA ** N_STEP_RETURN

# -- constants of the threads
N_WORKERS = 8           # learning threads
T_MAX = 10              # steps of a thread between two of its updates

# -- constants of ε-greedy
EPS_START = .5          # share of random actions at the first step,
EPS_END = 0.            # and from EPS_STEPS on; linear in between
EPS_STEPS = 200 * N_WORKERS     # steps of all threads together

# -- a batch: columns of s, a one-hot, R, s', mask of s', and 1 (0 where a row only fills up)
COLUMNS = [NUM_STATES, NUM_ACTIONS, 1, NUM_STATES, 1, 1]
BATCH_ROWS = MIN_BATCH - 1 + T_MAX + N_STEP_RETURN - 1      # the most samples that can wait


class ParameterServer:
    """The weights θ that all threads share, and all else that they share.

    Article: 「ParameterServer」, Fig. 2. Paper: the global parameters θ, θv and the counter T.
    θ and the mean square are replaced, never written to: who holds one reads on without a lock.
    """

    def __init__(self, *, env=ENV, workers=N_WORKERS, seed=None, max_episodes=20_000,
                 test_episodes=10, log=False):
        self.env, self.workers, self.seed, self.log = env, workers, seed, log
        self.max_episodes, self.test_episodes = max_episodes, test_episodes
        self.limit = gym.spec(env).max_episode_steps    # 200 in CartPole-v0, 500 in v1
        self._model = self._build_model()
        weights = self._model.get_weights()
        ends = np.cumsum([0] + [weight.size for weight in weights])
        self.places = [(slice(a, b), w.shape) for a, b, w in zip(ends, ends[1:], weights)]
        self.theta = self.pack(weights)                 # (W,), the one truth about the weights
        self.mean_square = np.ones_like(self.theta)     # (W,), of gradients; 1 as in TensorFlow 1
        self.update_graph = None                # see LocalBrain._build_graph
        self.updates = 0                        # that have changed θ,
        self.update_lock = threading.Lock()     # one after the other, or some would be lost
        self.frames = 0                         # steps of all learning threads
        self.history = []                       # an Episode for each one that they finished
        self.counter_lock = threading.Lock()    # of frames and history; one for all: half as fast
        self.is_learned = threading.Event()     # θ is the winner's and stays as it is
        self.stop = threading.Event()           # learning is over for any reason
        self.started, self.failed = time.perf_counter(), []     # names of threads that failed

    def _build_model(self):
        """Define the network, Fig. 1: state (B, 4) → p of each action (B, 2), value V (B, 1)."""
        glorot = keras.initializers.GlorotUniform(keras.random.SeedGenerator(self.seed))
        dense = functools.partial(keras.layers.Dense, kernel_initializer=glorot)
        l_input = keras.Input((NUM_STATES,), name="state")
        l_dense = dense(16, "relu", name="hidden")(l_input)
        out_actions = dense(NUM_ACTIONS, "softmax", name="policy")(l_dense)
        out_value = dense(1, "linear", name="value")(l_dense)
        return keras.Model(l_input, [out_actions, out_value], name="A3C")

    @property
    def model(self):
        """The Keras model with the weights as they are now; changing it does not change θ."""
        self._model.set_weights(self.unpack(self.theta))
        return self._model

    def pack(self, weights):
        """Join kernels and biases of any shape into one vector (W,)."""
        return np.concatenate([weight.ravel() for weight in weights])

    def unpack(self, theta, reshape=np.ndarray.reshape):
        """Cut a vector (W,) into kernels and biases; tf.reshape does so to a tensor."""
        return [reshape(theta[place], shape) for place, shape in self.places]

    @staticmethod
    def rmsprop(theta, mean_square, gradient):
        """One step of shared RMSProp, all (W,): paper, section 4, with TensorFlow 1's ε."""
        mean_square = RMSPROP_DECAY * mean_square + (1 - RMSPROP_DECAY) * gradient ** 2
        return theta - LEARNING_RATE * gradient / tf.sqrt(mean_square + 1e-10), mean_square

    def apply_update(self, batch, local_theta):
        """Let the gradient of a batch (B, 13) at θ' (W,) change θ; nothing once learning is over.

        Raises FloatingPointError, and leaves θ, if the loss or a weight would not be finite.
        """
        with self.update_lock:
            if self.stop.is_set():
                return
            packed = np.concatenate([batch.ravel(), local_theta, self.theta, self.mean_square])
            updated = self.update_graph(packed).numpy()
            if not np.isfinite(updated).all():
                raise FloatingPointError(f"loss or a weight is not finite at step {self.frames}")
            self.theta, self.mean_square = updated[:-1].reshape(2, -1)
            self.updates += 1

    def finish_episode(self, name, trial, step, mean):
        """Record an episode; True for one worker at the most, the first to meet the stop rule."""
        with self.counter_lock:
            if self.stop.is_set():
                return False
            seconds = round(time.perf_counter() - self.started, 3)
            self.history.append(Episode(name, trial, step, mean, self.frames, seconds))
            if self.log:
                say_episode(self.history[-1])
            is_winner = mean > self.limit - 1
            if is_winner or len(self.history) >= self.max_episodes:
                self.stop.set()
            return is_winner


class LocalBrain:
    """A thread's own copy of the weights: it acts, gathers samples and turns them into updates.

    Article: 「LocalBrain」. Paper: the thread's parameters θ', θv' and its gradients dθ, dθv.
    `theta`: θ' (W,). `train_queue`: lists of s (4,), a one-hot (2,), R, s' (4,), its mask.
    """

    def __init__(self, name, parameter_server):
        self.name, self.parameter_server = name, parameter_server
        self.train_queue, self.cut = [[], [], [], [], []], [None]       # see predict_p
        self.pull_parameter_server()
        if parameter_server.update_graph is None:       # one for all brains, and before any thread
            parameter_server.update_graph = self._build_graph()     # starts: tracing there races

    @staticmethod
    def loss_total(p, v, a, r):
        """Loss of each sample (B, 1), from p (B, 2), V(s) (B, 1), a one-hot (B, 2) and R (B, 1).

        Article: 「Actor-Critic」. Paper, section 4: log π·(R − V) up, (R − V)² and Σ p·log p down.
        """
        log_prob = tf.math.log(tf.reduce_sum(p * a, axis=1, keepdims=True) + 1e-10)
        advantage = r - v
        loss_policy = -log_prob * tf.stop_gradient(advantage)   # for the actor it is a constant
        loss_value = LOSS_V * tf.square(advantage)              # for the critic the error to reduce
        entropy = LOSS_ENTROPY * tf.reduce_sum(p * tf.math.log(p + 1e-10), axis=1, keepdims=True)
        return loss_policy + loss_value + entropy

    def gradient(self, batch, theta):
        """Mean loss of a batch (B, 13) at θ' (W,), and its gradient (W,)."""
        s, a, r, s_, s_mask, is_sample = tf.split(batch, COLUMNS, axis=1)
        network, unpack = self.parameter_server._model.stateless_call, self.parameter_server.unpack
        (_, v), _ = network(unpack(theta, tf.reshape), [], s_)
        r = r + GAMMA_N * v * s_mask        # V(s') is a constant: the tape has not begun
        with tf.GradientTape() as tape:
            tape.watch(theta)
            (p, v), _ = network(unpack(theta, tf.reshape), [], s)
            losses = self.loss_total(p, v, a, r) * is_sample
            loss = tf.reduce_sum(losses) / tf.reduce_sum(is_sample)
        return loss, tape.gradient(loss, theta)

    def _build_graph(self):
        """Compile an update, a pure function: (batch, θ', θ, mean square) → (θ, mean square, loss).

        From one vector to one: every array that passes between NumPy and TensorFlow takes 10 µs.
        """
        W = len(self.theta)

        def update(packed):
            batch = tf.reshape(packed[:-3 * W], [-1, sum(COLUMNS)])
            local_theta, theta, mean_square = tf.split(packed[-3 * W:], 3)
            loss, gradient = self.gradient(batch, local_theta)
            theta, mean_square = self.parameter_server.rmsprop(theta, mean_square, gradient)
            return tf.concat([theta, mean_square, [loss]], axis=0)

        example = np.ones(BATCH_ROWS * sum(COLUMNS) + 3 * W, np.float32)
        graph = tf.function(update, jit_compile=True)
        usual = graph.get_concrete_function(tf.constant(example))   # 100 µs faster than `graph`
        usual(tf.constant(example))                                 # XLA compiles at first call
        return lambda packed: (usual if len(packed) == len(example) else graph)(tf.constant(packed))

    def pull_parameter_server(self):
        """Take over all weights from the server, as the latest update or push left them."""
        self.theta = self.parameter_server.theta

    def push_parameter_server(self):
        """Hand all weights to the server, between two updates and never in the midst of one."""
        with self.parameter_server.update_lock:
            self.parameter_server.theta = self.theta

    def update_parameter_server(self):
        """Empty the queue into one step on the server's weights; below MIN_BATCH samples, wait."""
        if len(self.train_queue[0]) < MIN_BATCH:
            return
        s, a, r, s_, s_mask = self.train_queue
        self.train_queue = [[], [], [], [], []]
        batch = np.zeros((max(BATCH_ROWS, len(s)), sum(COLUMNS)), np.float32)
        batch[:len(s)] = np.column_stack([s, a, r, s_, s_mask, np.ones(len(s))])
        self.parameter_server.apply_update(batch, self.theta)

    def predict_p(self, s):
        """Probability of each action, s (B, 4) → p (B, 2), for any number of Dense relu layers.

        In NumPy: 7 µs, where the Keras model takes 1600.
        """
        if self.cut[0] is not self.theta:       # once a pull, not once a step
            *hidden, kernel, bias, _, _ = self.parameter_server.unpack(self.theta)
            self.cut = self.theta, list(zip(hidden[::2], hidden[1::2])), kernel, bias
        _, hidden, kernel, bias = self.cut
        for k, b in hidden:
            s = np.maximum(s @ k + b, 0)
        z = s @ kernel + bias
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
        self.parameter_server, self.memory = parameter_server, deque()
        self.brain = LocalBrain(name, parameter_server)
        seed = parameter_server.seed
        self.random = random.Random(None if seed is None else f"{seed} {name}")     # no one else's

    def epsilon(self):
        """Share of random actions by now; EPS_STEPS are for N_WORKERS, fewer for fewer workers."""
        server = self.parameter_server
        share = min(1, server.frames * N_WORKERS / (EPS_STEPS * server.workers))
        return EPS_START + share * (EPS_END - EPS_START)

    def act(self, s, *, greedy=False):
        """Choose an action for s (4,): at random by ε, else by p; `greedy`: the most probable."""
        if not greedy and self.random.random() < self.epsilon():
            return self.random.randrange(NUM_ACTIONS)
        p = self.brain.predict_p(s[np.newaxis])[0].tolist()
        if greedy:
            return p.index(max(p))
        *bounds, _ = itertools.accumulate(p)        # random.choices(range(NUM_ACTIONS), p)[0]
        return bisect.bisect(bounds, self.random.random())      # does the same, 5 % slower in all

    def advantage_push_local_brain(self, s, a, r, s_):
        """Remember a step; hand the brain each sample whose n-step return is complete.

        R = r0 + γ·r1 + … + γ^(n-1)·r(n-1); the brain adds γ^n·V(s'). Paper: Algorithm S3, R ← r+γR.
        At the episode's end (s_ is None) the memory runs empty, with ever shorter sums.
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
        self.total_reward_vec = np.zeros(10)            # steps of the last 10 episodes,
        self.thetas = deque(maxlen=10)                  # and θ' at the end of each
        self.count_trial_each_thread = 0
        self.turn = self.next_turn = queue.SimpleQueue()    # always its own turn, but see learn
        self.turn.put("go")

    def run(self):
        """Play one episode; return its steps, or None if learning was over before its end."""
        server, agent, learning = self.parameter_server, self.agent, self.thread_type == "learning"
        agent.brain.pull_parameter_server()
        seed = None if self.count_trial_each_thread else agent.random.getrandbits(31)
        (s, _), step, done = self.env.reset(seed=seed), 0, False
        while not done:
            a = agent.act(s, greedy=not learning)
            s_, _, terminated, truncated, _ = self.env.step(a)
            step += 1
            done = terminated or truncated
            if learning:
                with server.counter_lock:
                    server.frames += 1
                r = 0 if not done else -1 if step < server.limit - 1 else 1
                agent.advantage_push_local_brain(s, a, r, None if done else s_)
                if done or step % T_MAX == 0:
                    agent.brain.update_parameter_server()
                    agent.brain.pull_parameter_server()
                    if not done:
                        self.next_turn.put("go")
                        self.turn.get()
                    if server.stop.is_set():
                        return None
            s = s_

        self.count_trial_each_thread += 1
        self.total_reward_vec = np.hstack((self.total_reward_vec[1:], step))
        self.thetas.append(agent.brain.theta)
        if learning and server.finish_episode(self.name, self.count_trial_each_thread, step,
                                              self.total_reward_vec.mean()):
            agent.brain.theta = np.mean(self.thetas, axis=0)    # of all that met the rule together
            agent.brain.push_parameter_server()
            server.is_learned.set()
        return step


class WorkerThread:
    """What a "learning" or the "test" thread runs. Article: 「Worker_Thread」."""

    def __init__(self, thread_name, thread_type, parameter_server):
        self.name, self.thread_type = thread_name, thread_type
        self.parameter_server = parameter_server
        self.environment = Environment(thread_name, thread_type, parameter_server)

    def run(self):
        """Learn until learning is over, or end it by failing; the test worker plays."""
        server, environment = self.parameter_server, self.environment
        try:
            if self.thread_type == "test":
                return play(environment.run, server.test_episodes, self.name)
            while not server.stop.is_set():
                environment.turn.get()
                if not server.stop.is_set():
                    environment.run()
                environment.next_turn.put("go")
        finally:
            server.stop.set()
            environment.next_turn.put("go")
            environment.env.close()


def main(argv=None):
    """Run the program and return its exit status. Article: 「メイン関数」, steps M0 to M3."""
    args = parse_arguments(
        argv, "Learn CartPole with A3C, then film what was learned.", "movie/A3C",
        ("--env", dict(default=ENV, choices=["CartPole-v0", "CartPole-v1"],
                       help="200 or 500 steps; no other, for the rewards are CartPole's")),
        ("--workers", dict(default=N_WORKERS, type=from_1, help="learning threads")),
        ("--max-episodes", dict(default=20_000, type=from_1, help="of all workers together")))
    run = Run(args.out)
    # M0. What all threads share
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")    # set-up −0.3 s
    os.environ.update(TF_NUM_INTEROP_THREADS="1", TF_NUM_INTRAOP_THREADS="1")   # steps/s +50 %
    server = ParameterServer(env=args.env, workers=args.workers, seed=args.seed, log=args.log,
                             max_episodes=args.max_episodes, test_episodes=args.test_episodes)

    # M1. The workers
    workers = [WorkerThread(f"local_thread{i + 1}", "learning", server)
               for i in range(0 if args.play else args.workers)]
    test = WorkerThread("test_thread", "test", server)

    # M2. The learning workers run, each in a thread
    if args.play:
        server.theta = server.pack(load_weights(server.model, args.play).get_weights())
        server.is_learned.set()
    else:
        learn(server, workers, run)

    # M3. The test worker runs on the main thread: macOS opens windows nowhere else
    if server.is_learned.is_set():
        with run.attempt("test"):
            test.environment.env = film(test.environment.env, args.out, "A3C", args.render)
            test.run()
    return 0 if server.is_learned.is_set() and not run.lost else 1


def learn(server, workers, run):
    """M2: run the workers until learning is over, and keep what came of it, however it ended."""
    if server.seed is not None:     # in turns, any number of workers repeats to the last bit
        for worker, following in zip(workers, workers[1:] + workers[:1]):
            worker.environment.next_turn = following.environment.turn
        for worker in workers[1:]:
            worker.environment.turn.get()
    server.started, epsilon = time.perf_counter(), workers[0].environment.agent.epsilon
    try:
        with live_table(server.history, server.limit, lambda: f"ε {epsilon():.2f}", server.log):
            run_threads({w.name: w.run for w in workers}, server.stop, server.failed)
    finally:
        learned, seconds = server.is_learned.is_set(), time.perf_counter() - server.started
        say(summary(learned, seconds, server.frames, len(server.history), server.workers,
                    server.max_episodes, server.failed))
        run.keep({"A3C": server.model}, learned, server.history, server.limit,
                 f"A3C on {server.env}, {server.workers} workers")


# -- all that is not A3C: it knows nothing of what stands above, and other scripts import it -------

Episode = namedtuple("Episode", "thread episode steps mean_of_last_10 total_steps seconds")


def parse_arguments(argv, description, out, *more):
    """Read the options that such scripts share, and more; a bad one: one line, exit status 2."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, option = refuse, parser.add_argument
    screen = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}
    for name, keywords in more:
        option(name, **keywords)
    option("--seed", type=from_0, help="of all random numbers")
    option("--test-episodes", type=from_0, default=10, help="episodes of the test")
    option("--out", type=Path, default=Path(out), metavar="DIR", help="where files go")
    option("--play", type=Path, metavar="WEIGHTS", help="do not learn, test this file")
    option("--render", action=argparse.BooleanOptionalAction, default=bool(screen),
           help="show the test in a window")
    option("--log", action="store_true", default=not (sys.stdout and sys.stdout.isatty()),
           help="a line for each episode, no table")
    return parser.parse_args(argv)


def from_0(text, lowest=0, highest=2**32 - 1):
    """The type of a whole number in the command line; libraries take no larger seed."""
    if not text.isdecimal() or not lowest <= int(text) <= highest:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {lowest} to {highest}")
    return int(text)


from_1 = functools.partial(from_0, lowest=1)


def refuse(message):
    """Say in one line what is wrong and what would be right, and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def say(line):
    """Print a line at once; that nobody reads on (`| head`) must not cost the run."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def say_episode(e):
    """Print an Episode as the article does."""
    say("{}  episode {}  steps {}  mean of last 10 {:.1f}".format(*e))


def run_threads(jobs, over, failed):
    """Run {name: function} in threads until the event `over`; what hangs then is left after 2 s.

    The first that fails ends all, is shown, and named in `failed`. They share a core where the
    system can: Python runs one at a time, and waking one elsewhere takes longer.
    """
    def work(name):
        try:
            jobs[name]()
        except Exception:
            failed.append(name)
            over.set()
            if failed[0] == name:       # `threading` prints it, with the thread's name
                raise

    core = ctypes.CDLL(None).sched_getcpu() if sys.platform == "linux" else None
    threads = [threading.Thread(target=work, args=[n], name=n, daemon=True) for n in jobs]
    try:
        for thread in threads:
            thread.start()
            with contextlib.suppress(AttributeError, OSError):
                os.sched_setaffinity(thread.native_id, {core})
        while not over.wait(.1):    # a wait without end would keep Ctrl-C out on Windows
            pass
    finally:
        over.set()
        end = time.monotonic() + 2
        for thread in filter(threading.Thread.is_alive, threads):
            thread.join(max(0, end - time.monotonic()))


def summary(learned, seconds, steps, episodes, workers, max_episodes, failed):
    """The line that says what came of learning, and that tools read."""
    facts = f"{steps} steps, {episodes} episodes, {workers} workers, {steps / seconds:.0f} steps/s"
    if learned:
        return f"learned in {seconds:.1f} s: {facts}"
    if episodes >= max_episodes:
        return f"not learned within {episodes} episodes: {seconds:.1f} s, {facts}"
    reason = f"{failed[0]} failed" if failed else "interrupted"
    return f"not learned, {reason} after {seconds:.1f} s: {facts}"


class Run:
    """What a script leaves in a folder, and how it ends: Ctrl-C and SIGTERM exit with 130 and 143.

    They run every `finally` on their way. `lost`: what failed; each costs a line on stderr.
    """

    def __init__(self, folder):
        self.folder, self.lost, self.status, self.must_finish = folder, [], None, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            refuse(f"argument --out: {error}; name a folder that can be created and written")
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, self.interrupt)
        gym.logger.min_level = gym.logger.ERROR     # or it says that v0 is old, and films replaced

    def interrupt(self, number, _frame):
        """End the program, or let it end as soon as what must be finished is."""
        self.status = 128 + number
        if not self.must_finish:
            sys.exit(self.status)

    @contextlib.contextmanager
    def uninterrupted(self):
        """Put off Ctrl-C and SIGTERM to the end of the block."""
        self.must_finish = True
        try:
            yield
        finally:
            self.must_finish = False
        if self.status:
            sys.exit(self.status)

    @contextlib.contextmanager
    def attempt(self, product):
        """Turn a failure in the block into a line."""
        try:
            yield
        except Exception as error:
            self.lost.append(product)
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"{product} lost: {cause[:300]}", file=sys.stderr, flush=True)

    def keep(self, models, learned, history, limit, title):
        """Write what was learned, and first of all the weights of `models`, {name: Keras model}."""
        with self.uninterrupted():
            for name, model in models.items():
                with self.attempt("weights"):
                    name += ".weights.h5" if learned else ".unfinished.weights.h5"
                    save_weights(model, self.folder / name)
            with self.attempt("history.csv"):
                lines = [",".join(map(str, row)) + "\n" for row in [Episode._fields, *history]]
                (self.folder / "history.csv").write_text("".join(lines))
            with self.attempt("learning_curve.png"):
                draw_learning_curve(history, self.folder / "learning_curve.png", limit, title)
            for name, model in models.items():
                with self.attempt(f"{name}.png"):
                    try:
                        keras.utils.plot_model(model, self.folder / f"{name}.png",
                                               show_shapes=True, show_layer_names=True)
                    except ImportError as error:    # without pydot or Graphviz
                        say(f"no {name}.png: {error}")
            say(f"all files are in {self.folder}")


def save_weights(model, path):
    """Write weights beside their place, then rename: their name never stands for half a file."""
    part = path.with_name("part.h5")
    with tempfile.TemporaryDirectory() as folder:   # there first: HDF5 crashes on a full disk
        model.save_weights(Path(folder, path.name))
        part.write_bytes(Path(folder, path.name).read_bytes())
    os.replace(part, path)


def load_weights(model, path):
    """Fill a Keras model from the file of an earlier run and return it, or exit with status 2."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)     # for layers that Keras leaves alone
            model.load_weights(path)
    except Exception as error:
        cause = type(error).__name__ if path.is_file() else "no such file"
        refuse(f"argument --play: {str(path)!r} holds no weights of this network ({cause}); name"
               f" the {model.name}.weights.h5 of an earlier run")
    return model


def live_table(history, limit, note, log=False):
    """Show in a `with`, unless `log`, the 16 best threads of a growing list, and `note()`."""
    began = time.perf_counter()

    def table():
        last, seconds = {e.thread: e for e in history}, time.perf_counter() - began
        steps = history[-1].total_steps if history else 0
        numbers = [Column(heading, justify="right") for heading in
                   ("worker", "episodes", "last steps", "mean of last 10")]
        footer = (f"{steps} steps  {len(history)} episodes  {steps / seconds:.0f} steps/s"
                  f"  {seconds:.1f} s  {note()}")
        table = Table(*numbers, f"0 to {limit}", box=None, caption=footer, caption_justify="left")
        best = sorted(last.values(), key=lambda e: -e.mean_of_last_10)[:16]
        for e in sorted(best, key=lambda e: (len(e.thread), e.thread)):
            won = e.mean_of_last_10 > limit - 1
            bar = ProgressBar(limit, e.mean_of_last_10, width=20)
            table.add_row("★ " * bool(won) + e.thread, str(e.episode), str(e.steps),
                          f"{e.mean_of_last_10:.1f}", bar, style="bold green" if won else None)
        return table
    return contextlib.nullcontext() if log else Live(get_renderable=table, refresh_per_second=2)


def draw_learning_curve(history, path, limit, title):
    """Draw each thread's mean of its last 10 episodes over the steps of all, the winner strong."""
    from matplotlib.figure import Figure  # takes 0.3 s; without pyplot it opens no window
    axes = Figure(figsize=(8, 5), dpi=100, layout="constrained").add_subplot()
    axes.axhline(limit - 1, color="black", linestyle="--", label=f"learned above {limit - 1}")
    for thread in {e.thread: None for e in history}:
        steps, means = zip(*[(e.total_steps, e.mean_of_last_10) for e in history
                             if e.thread == thread])
        won = means[-1] > limit - 1
        axes.plot(steps, means, linewidth=2.5 if won else .8, alpha=1 if won else .6,
                  zorder=3 if won else 2, label=f"{thread} has learned" if won else None)
    axes.set(title=title, xlabel="steps in all", xlim=(0, None), ylim=(0, None),
             ylabel="steps an episode, mean of the last 10")
    axes.legend(loc="lower right")
    axes.figure.savefig(path)


def film(env, folder, name, shown):
    """Wrap an environment: each episode goes to a film and, if `shown`, to a window."""
    os.environ["SDL_FRAMEBUFFER_ACCELERATION"] = "0"    # else Mesa's LLVM crashes beside XLA's
    if not shown:
        os.environ["SDL_VIDEODRIVER"] = "dummy"         # CartPole draws with no screen, too
    env = gym.wrappers.RecordVideo(env, str(folder), lambda _: True, name_prefix=name)
    return gym.wrappers.HumanRendering(env) if shown else env


def play(episode, count, name):
    """Call `episode` `count` times, say the steps it returns and, however it ends, their mean."""
    played = []
    try:
        while len(played) < count:
            played.append(episode())
            say(f"{name}  episode {len(played)}  steps {played[-1]}")
    finally:
        if played:
            say(f"test: mean of {len(played)} episodes {np.mean(played):.1f} steps")


if __name__ == "__main__":
    sys.exit(main())
