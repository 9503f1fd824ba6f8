"""A3C in processes, on one machine or on many: the post's shared memory becomes an actor of Ray.

The program of rarilurelo's post 「PyTorchでA3C」 (2017, https://github.com/rarilurelo/pytorch_a3c)
for Keras and Ray Core. "The paper" is Mnih et al., https://arxiv.org/abs/1602.01783. To look at:
`Worker.train` is the post's loop in the post's order; where that writes to shared memory, this
calls `Server.update`, which takes a gradient and answers with θ, here or on another machine.
Shapes: W weights in the network, all in one vector θ (19 075 with 4 frames: 76 kB), T steps between
two updates, F numbers in the stacked frames (16).
"""
import logging
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # when run by its path
import a3c_cartpole as common  # noqa: I001  before Keras, whose backend it sets
import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf
try:
    import ray
except ImportError:
    ray = None              # main says how to install it

NAME, ENV = "a3c_processes", "CartPole-v0"
LIMIT = gym.spec(ENV).max_episode_steps     # 200
GAMMA = .99                 # γ, discount of a reward, per step
RMSPROP_ALPHA = .99         # α, the share of its mean square that RMSProp keeps at each update
EPS = .01                   # the post's eps: in RMSProp, the entropy's logarithm, beside the std
LOOK_SECONDS = .5           # between two looks of the main process at the server,
SAVE_SECONDS = 10           # and between two files of weights that it writes meanwhile
WORKER_ENVIRONMENT = dict(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", OMP_NUM_THREADS="1",
                          TF_NUM_INTEROP_THREADS="1", TF_NUM_INTRAOP_THREADS="1")


class Policy:
    """The network. Post: 「Policy」; its first weights are drawn as by PyTorch's `Linear`."""

    def __init__(self, num_actions, dim_obs, frame_num=4, seed=None):
        seeds = keras.random.SeedGenerator(seed)

        def linear(x, size, activation, name):
            bound = x.shape[-1] ** -.5
            start = keras.initializers.RandomUniform(-bound, bound, seeds)
            return keras.layers.Dense(size, activation, True, start, start, name=name)(x)
        frames = keras.Input((dim_obs * frame_num,), name="frames")
        x = linear(linear(frames, 128, "relu", "fc1"), 128, "relu", "fc2")
        heads = [linear(x, num_actions, "softmax", "p"), linear(x, 1, "linear", "v")]
        self.model = keras.Model(frames, heads, name=NAME)
        weights = self.model.get_weights()
        ends = np.cumsum([0] + [w.size for w in weights])
        self.places = [(slice(*ends[i:i + 2]), w.shape) for i, w in enumerate(weights)]
        self.sync(np.concatenate([w.ravel() for w in weights]))

    def unpack(self, theta, reshape=np.ndarray.reshape):
        """Cut θ (W,) into kernels and biases, in the model's order."""
        return [reshape(theta[place], shape) for place, shape in self.places]

    def forward(self, x):
        """In NumPy: x (F,) → p of each action (2,), which sum to 1, and V."""
        k1, b1, k2, b2, kp, bp, kv, bv = self.weights
        x = np.maximum(np.maximum(x @ k1 + b1, 0) @ k2 + b2, 0)
        p = np.exp(x @ kp + bp - np.max(x @ kp + bp))
        return p / p.sum(), (x @ kv + bv)[0]

    def sync(self, theta):
        """Take over θ (W,) of the server."""
        self.theta, self.weights = theta, self.unpack(theta)


class Server:
    """An actor: what all processes share. Post: `global_policy`, `optimizer`, `global_t`.

    `theta`, `mean_square`: (W,). `episodes`, `restarted`: what was not reported yet.
    """

    def __init__(self, theta, args):
        self.theta, self.mean_square, self.args = theta, np.zeros_like(theta), args
        self.global_t, self.began, self.learned, self.over = 0, None, False, False     # began: s
        self.lengths = [[] for _ in range(args.num_process)]    # of each worker's episodes
        self.started, self.episodes, self.restarted = set(), [], []
        self.turns = [queue.SimpleQueue() for _ in self.lengths]
        self.turns[0].put("your turn")
        self.lock = threading.Lock()

    def update(self, rank, gradient=None, steps=0, length=None):
        """Let a worker's gradient (W,) over so many steps change θ; return θ, and if it is over.

        `length`: steps of the episode that ended with them. Without a gradient θ is only read. With
        a seed workers calculate side by side, but are served in turn, so that a run repeats.
        """
        if self.args.seed is not None:
            self.turns[rank].get()
        with self.lock:
            if gradient is None:
                self.restarted += {rank} & self.started
                self.started.add(rank)
                self.began = self.began or time.perf_counter()
            elif not self.over:
                self.global_t += steps
                self.step(gradient)
                self.over = self.global_t >= self.args.epoch
                if length:
                    self.finish_episode(rank, length)
            answer = self.theta, self.over
        self.turns[(rank + 1) % len(self.turns)].put("your turn")
        return answer

    def step(self, gradient):
        """Shared RMSProp, paper, section 4; η falls from args.lr to 0 at step args.epoch."""
        eta = self.args.lr * max(0, 1 - self.global_t / self.args.epoch)
        self.mean_square = RMSPROP_ALPHA * self.mean_square + (1 - RMSPROP_ALPHA) * gradient ** 2
        self.theta = self.theta - eta * gradient / np.sqrt(self.mean_square + EPS)

    def finish_episode(self, rank, length):
        """Record an episode, as Episode's fields; once one worker meets the stop rule, θ stays."""
        self.lengths[rank].append(length)
        mean = sum(self.lengths[rank][-10:]) / 10
        self.episodes.append((f"worker_{rank + 1}", len(self.lengths[rank]), length, mean,
                              self.global_t, round(time.perf_counter() - self.began, 3)))
        self.learned = mean > LIMIT - 1
        self.over |= self.learned or sum(map(len, self.lengths)) >= self.args.episodes

    def report(self):
        """What is new: episodes, workers that began again; θ, steps, if learned, if over."""
        with self.lock:
            new = self.episodes, self.restarted
            self.episodes, self.restarted = [], []
            return *new, self.theta, self.global_t, self.learned, self.over


class Worker:
    """An actor: a process with an environment and a network of its own. Post: 「mp.Process」."""

    def __init__(self, rank, args):
        self.rank, self.args, self.env = rank, args, make_env(args.frame_num)
        self.random = random.Random(None if args.seed is None else f"{args.seed} worker {rank}")
        self.local_policy = Policy(2, 4, args.frame_num)
        T, F, W = args.local_t_max, 4 * args.frame_num, self.local_policy.theta.size
        graph = tf.function(lambda *batch: self.gradient(*batch),   # Ray adds arguments to methods
                            jit_compile=True, autograph=False)
        self.compiled = graph.get_concrete_function(
            tf.TensorSpec([W]), tf.TensorSpec([T, F]), tf.TensorSpec([T], tf.int32),
            tf.TensorSpec([T]))

    def machine(self):
        """Ray's name of the machine that this process runs on."""
        return ray.get_runtime_context().get_node_id()

    def train(self, server):
        """Learn until the server says that it is over. Post: 「train」.

        Raises FloatingPointError, before θ has suffered, if a gradient is not finite.
        """
        o, step = self.env.reset(seed=self.random.getrandbits(31))[0], 0        # o: (F,)
        theta, over = ray.get(server.update.remote(self.rank))
        while not over:
            self.local_policy.sync(theta)
            observations, actions, rewards, done = [], [], [], False
            while not done and len(rewards) < self.args.local_t_max:
                p, _ = self.local_policy.forward(o)
                a = self.random.choices(range(2), p)[0]
                observations.append(o)
                o, r, terminated, truncated, _ = self.env.step(a)
                step, done = step + 1, terminated or truncated
                actions.append(a)
                rewards.append(r)
            R = 0 if done else self.local_policy.forward(o)[1]
            fill = self.args.local_t_max - len(rewards)     # rows, with no action
            batch = (theta, np.array(observations + [o] * fill), actions + [-1] * fill,
                     np.append(self.returns(rewards, R), np.zeros(fill, np.float32)))
            gradient = self.compiled(*map(tf.constant, batch)).numpy()
            if not np.isfinite(gradient).all():
                raise FloatingPointError(f"a gradient of worker_{self.rank + 1} is not finite")
            theta, over = ray.get(server.update.remote(
                self.rank, gradient, len(rewards), step if done else None))
            if done:
                o, step = self.env.reset()[0], 0

    def returns(self, rewards, R):
        """R ← r + γR, from the last of T steps back to the first: (T,). R: V(s') of the last."""
        returns = []
        for r in rewards[::-1]:
            R = r + GAMMA * R
            returns.insert(0, R)
        if self.args.normalise and len(returns) > 1:
            returns = (returns - np.mean(returns)) / (np.std(returns, ddof=1) + EPS)
        return np.float32(returns)

    def gradient(self, theta, x, a, returns):
        """Gradient (W,) of the post's loss at θ (W,), summed over x (T, F), a (T,), returns (T,).

        −log π(a|x)·(R − V) with R − V held constant, ½·v_loss_coeff·(R − V)², and entropy_beta·
        Σ p·log p, which is to be small. Paper: Algorithm S3. Rows with a = -1 count nothing.
        """
        with tf.GradientTape() as tape:
            tape.watch(theta)
            weights = self.local_policy.unpack(theta, tf.reshape)
            (p, v), _ = self.local_policy.model.stateless_call(weights, [], x)
            advantage = returns - v[:, 0]
            a = tf.one_hot(a, 2)
            log_prob = tf.math.log(tf.reduce_sum(p * a, axis=1) + 1e-10)
            policy_loss = -log_prob * tf.stop_gradient(advantage)
            v_loss = .5 * self.args.v_loss_coeff * tf.square(advantage)
            entropy = self.args.entropy_beta * tf.reduce_sum(p * tf.math.log(p + EPS), axis=1)
            loss = tf.reduce_sum((policy_loss + v_loss + entropy) * tf.reduce_sum(a, axis=1))
        return tape.gradient(loss, theta)


class Saver:
    """Post: 「save_mode」. Puts into a Policy the θ worth keeping, and at times into a file."""

    def __init__(self, policy, mode, folder):
        self.policy, self.mode, self.folder = policy, mode, folder
        self.best, self.due = 0, time.monotonic() + SAVE_SECONDS

    def look(self, theta, steps, mean):
        """Take θ as it is after so many steps; in mode max only if `mean` is the best so far."""
        if self.mode != "max" or mean > self.best:
            self.policy.sync(theta)
            self.best = mean
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + SAVE_SECONDS
            self.policy.model.set_weights(self.policy.weights)
            name = f"{NAME}.{steps}" if self.mode == "all" else f"{NAME}.unfinished"
            common.save_weights(self.policy.model, self.folder / f"{name}.weights.h5")


def make_env(frame_num, wrap=lambda env: env, **options):
    """CartPole that shows its last frames at once, the oldest first, as (4 · frame_num,)."""
    env = wrap(gym.make(ENV, disable_env_checker=True, **options))
    return gym.wrappers.FlattenObservation(gym.wrappers.FrameStackObservation(env, frame_num))


def main(argv=None):
    """Run the program and return its exit status."""
    args = common.parse_arguments(
        argv, "Learn CartPole with A3C in processes, then film what was learned.", f"movie/{NAME}",
        ("--address", dict(help="HOST:PORT of a Ray cluster; without it this machine alone")),
        ("--num-process", dict(type=common.from_1, default=8, help="workers")),
        ("--local-t-max", dict(type=common.from_1, default=5, help="steps between two updates")),
        ("--entropy-beta", dict(type=float, default=.01, help="weight of the entropy")),
        ("--v-loss-coeff", dict(type=float, default=.5, help="weight of the value loss")),
        ("--frame-num", dict(type=common.from_1, default=4, help="frames that are seen at once")),
        ("--lr", dict(type=float, default=7e-4, help="learning rate at the first step")),
        ("--epoch", dict(type=common.from_1, default=10_000_000, help="steps until it is 0")),
        ("--episodes", dict(type=common.from_1, default=20_000, help="of all workers, at most")),
        ("--save-mode", dict(choices=["all", "last", "max"], default="max", help="what to keep")),
        ("--normalise", dict(action="store_true", help="normalise returns, as the post does")))
    if not (ray or args.play):
        common.refuse("Ray is missing; `python -m pip install -r tests/requirements.txt` brings it")
    with common.Run(args.out) as run:
        policy, learned = Policy(2, 4, args.frame_num, args.seed), True
        if args.play:
            common.load_weights(policy.model, args.play)
            policy.weights = policy.model.get_weights()
        else:
            try:
                start_ray(args.address)
                learned = learn(policy, args, run)
            finally:
                ray.shutdown()
        if learned:
            with run.attempt("test"):
                test(policy, args)
    return 0 if learned and not run.lost else 1


def start_ray(address):
    """Start Ray on this machine, or join the cluster at `address`; if there is none, status 2."""
    own = {} if address else dict(include_dashboard=False, object_store_memory=10**8)   # bytes
    if address:     # first, for Ray itself takes two minutes to give up
        try:
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError, OverflowError) as error:
            common.refuse(f"argument --address: no Ray cluster at {address!r} ({error}); "
                          "`ray start --head --port 6379` starts one")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    terminate = signal.getsignal(signal.SIGTERM)
    ray.init(address or "local", logging_level=logging.CRITICAL, log_to_driver=False,
             runtime_env={"env_vars": WORKER_ENVIRONMENT}, **own)
    signal.signal(signal.SIGTERM, terminate)        # Ray has put its own there
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])     # so only packages are
                                                    # needed on other machines, not this file


def start_actors(theta, args):
    """Start the server, and the workers all over the cluster; return it, and calls of train."""
    server = ray.remote(Server).options(num_cpus=0, max_concurrency=args.num_process + 1).remote(
        theta, args)        # so many calls wait in it at once when workers are served in turn
    actor = ray.remote(Worker).options(     # Ray spreads only what takes a part of a core,
        num_cpus=.001, scheduling_strategy="SPREAD", max_restarts=-1, max_task_retries=-1)
    workers = [actor.remote(rank, args) for rank in range(args.num_process)]
    machines = set(ray.get([worker.machine.remote() for worker in workers]))
    common.say(f"workers: {args.num_process}, machines: {len(machines)}")
    return server, [worker.train.remote(server) for worker in workers]      # again after a restart


def learn(policy, args, run):
    """Run server and workers until learning is over, and keep what came of it; True if learned."""
    history, steps, learned, over = [], 0, False, False
    saver, began = Saver(policy, args.save_mode, args.out), time.perf_counter()
    try:
        with run.attempt("learning"), common.live_table(
                history, LIMIT, lambda: f"{args.num_process} processes", args.log):
            server, calls = start_actors(policy.theta, args)
            began = time.perf_counter()
            while not over:
                ended, calls = ray.wait(calls, timeout=LOOK_SECONDS)
                try:
                    new, restarted, theta, steps, met, over = ray.get(server.report.remote())
                except ray.exceptions.RayActorError:
                    gone = "the server's process is gone, and with it the run"
                    raise ConnectionError(gone) from None
                ray.get(ended if not over else [])      # raises what a worker has raised
                for rank in restarted:
                    common.say(f"worker_{rank + 1} was lost; Ray has started it anew")
                for row in new:
                    history.append(common.Episode(*row))
                    if args.log:
                        common.say_episode(history[-1])
                with run.attempt("weights"):
                    saver.look(theta, steps, max((row[3] for row in new), default=0))
            if met:
                policy.sync(theta)
                learned = True
                (args.out / f"{NAME}.unfinished.weights.h5").unlink(missing_ok=True)
    finally:
        policy.model.set_weights(policy.weights)
        most = len(history) if steps >= args.epoch else args.episodes
        common.say(common.summary(learned, time.perf_counter() - began, steps, len(history),
                                  args.num_process, most, run.lost))
        run.keep({NAME: policy.model}, learned, history, LIMIT,
                 f"A3C on {ENV}, {args.num_process} processes")
    return learned


def test(policy, args):
    """Play by the most probable action, and film it."""
    env = make_env(args.frame_num, lambda env: common.film(env, args.out, NAME, args.render),
                   render_mode="rgb_array")
    seeds = iter([args.seed])

    def episode():
        (o, _), steps, done = env.reset(seed=next(seeds, None)), 0, False
        while not done:
            o, _, terminated, truncated, _ = env.step(int(policy.forward(o)[0].argmax()))
            steps, done = steps + 1, terminated or truncated
        return steps
    try:
        common.play(episode, args.test_episodes, "test")
    finally:
        env.close()


if __name__ == "__main__":
    sys.exit(main())
