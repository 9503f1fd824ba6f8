"""A3C in processes, on one machine or on many: the post's shared memory becomes an actor of Ray.

The program of rarilurelo's post 「PyTorchでA3C」 (2017, https://github.com/rarilurelo/pytorch_a3c)
for Keras and Ray Core; the paper is Mnih et al., https://arxiv.org/abs/1602.01783; README.md lists
the differences. Look at `Worker.train`: the post's loop in the post's order, but where that writes
to shared memory, this calls `Server.update`, which takes a gradient and answers with θ.
Shapes: W weights, all in one vector θ (19 075 with 4 frames: 76 kB); T steps between two updates;
F numbers in the frames that are seen at once (16).
"""
import collections
import contextlib
import logging
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # to run it by its path too
import a3c_cartpole as base  # isort: skip  (before Keras, which it sets up)
import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

try:
    import ray
except ImportError:
    ray = None              # main says how to install it

NAME, ENV, LIMIT = "a3c_processes", "CartPole-v0", 200      # an episode's steps at the most
GAMMA = .99                 # γ, discount of a reward, per step
RMSPROP_ALPHA = .99         # α, the share of its mean square that RMSProp keeps at each update
EPS = .01                   # beside the mean square, and in the entropy's logarithm
SAVE_SECONDS = 10           # between two files of the weights while learning
WORKER_ENVIRONMENT = dict(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", OMP_NUM_THREADS="1",
                          TF_NUM_INTEROP_THREADS="1", TF_NUM_INTRAOP_THREADS="1")


class Policy:
    """The network. Post: 「Policy」; its first weights are drawn as PyTorch's `Linear` does."""

    def __init__(self, num_actions, dim_obs, frame_num, seed=None):
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
        self.places = [(slice(a, b), w.shape) for a, b, w in zip(ends, ends[1:], weights)]
        self.sync(np.concatenate([w.ravel() for w in weights]))

    def unpack(self, theta, reshape=np.ndarray.reshape):
        """Cut θ (W,) into kernels and biases, in the model's order."""
        return [reshape(theta[place], shape) for place, shape in self.places]

    def sync(self, theta):
        """Take over θ (W,) of the server."""
        self.theta, self.weights = theta, self.unpack(theta)

    def forward(self, x):
        """In NumPy: x (F,) → p of each action (2,), which sum to 1, and V."""
        k1, b1, k2, b2, kp, bp, kv, bv = self.weights
        x = np.maximum(np.maximum(x @ k1 + b1, 0) @ k2 + b2, 0)
        p = np.exp(x @ kp + bp - np.max(x @ kp + bp))
        return p / p.sum(), (x @ kv + bv)[0]


class Server:
    """An actor: what all processes share, one call at a time. Post: `global_policy`, `global_t`."""

    def __init__(self, theta, args):
        self.theta, self.mean_square, self.args = theta, np.zeros_like(theta), args     # (W,)
        self.global_t, self.learned, self.over, self.began = 0, False, False, time.perf_counter()
        self.last = [collections.deque([(0, theta)] * 10, 10) for _ in range(args.num_process)]
        self.best, self.history, self.joined = (0, theta), [], collections.Counter()    # see report

    def join(self, rank):
        """Let a worker begin, or begin anew: θ (W,), and if learning is over."""
        self.joined[rank] += 1
        return self.theta, self.over

    def update(self, rank, gradient, steps, length=None):
        """Let a worker's gradient (W,) over so many steps change θ; return what `join` does.

        `length`: steps of the episode that ended with them.
        """
        if not self.over:
            self.global_t += steps
            self.step(gradient)
            if length:
                self.finish_episode(rank, length)
            self.over |= self.global_t >= self.args.epoch
        return self.theta, self.over

    def step(self, gradient):
        """Shared RMSProp, paper, section 4; η falls from args.lr to 0 at step args.epoch."""
        eta = self.args.lr * max(0, 1 - self.global_t / self.args.epoch)
        self.mean_square = RMSPROP_ALPHA * self.mean_square + (1 - RMSPROP_ALPHA) * gradient ** 2
        self.theta = self.theta - eta * gradient / np.sqrt(self.mean_square + EPS)

    def finish_episode(self, rank, length):
        """Record an episode; who meets the rule leaves the mean of the θ of its last ten."""
        self.last[rank].append((length, self.theta))
        mean, name = sum(steps for steps, _ in self.last[rank]) / 10, f"worker_{rank + 1}"
        count = 1 + sum(row[0] == name for row in self.history)
        seconds = round(time.perf_counter() - self.began, 3)
        self.history.append((name, count, length, mean, self.global_t, seconds))
        self.best = max(self.best, (mean, self.theta), key=lambda best: best[0])
        self.learned = mean > LIMIT - 1
        if self.learned:
            self.theta = np.mean([theta for _, theta in self.last[rank]], axis=0)
        self.over |= self.learned or len(self.history) >= self.args.episodes

    def report(self, episodes):
        """Rows after so many episodes, joins of each, the θ to keep, steps, if learned, if over."""
        best = self.args.save_mode == "max" and not self.learned
        theta = self.best[1] if best else self.theta
        return self.history[episodes:], self.joined, theta, self.global_t, self.learned, self.over


class Worker:
    """An actor: a process with an environment and a network of its own. Post: 「mp.Process」."""

    def __init__(self, rank, args):
        self.rank, self.args, self.env = rank, args, make_env(args.frame_num)
        self.random = random.Random(None if args.seed is None else f"{args.seed} {rank}")
        self.local_policy = Policy(2, 4, args.frame_num)
        T, W = args.local_t_max, len(self.local_policy.theta)
        graph = tf.function(lambda *batch: self.gradient(*batch), jit_compile=True, autograph=False)
        self.compiled = graph.get_concrete_function(    # a call takes 0.4 ms, of `graph` itself 2
            *map(tf.TensorSpec, [[W], [T, 4 * args.frame_num], [T], [T]]))

    def train(self, server):
        """Learn until the server says that it is over. Post: 「train」.

        Raises FloatingPointError, before θ has suffered, if a gradient is not finite.
        """
        T, step, o = self.args.local_t_max, 0, self.env.reset(seed=self.random.getrandbits(31))[0]
        theta, over = ray.get(server.join.remote(self.rank))
        while not over:
            self.local_policy.sync(theta)
            observations, actions, rewards, done = [], [], [], False
            while not done and len(rewards) < T:
                p, _ = self.local_policy.forward(o)
                observations.append(o)
                actions.append(self.random.choices(range(2), p)[0])
                o, r, terminated, truncated, _ = self.env.step(actions[-1])
                rewards.append(r)
                step, done = step + 1, terminated or truncated
            R = 0. if done else self.local_policy.forward(o)[1]
            rest = T - len(rewards)             # rows without a step, and so without an action
            batch = (theta, observations + [o] * rest, actions + [-1] * rest,
                     returns(rewards, R) + [0] * rest)
            gradient = self.compiled(*map(tf.constant, map(np.float32, batch))).numpy()
            if not np.isfinite(gradient).all():
                raise FloatingPointError(f"a gradient of worker_{self.rank + 1} is not finite")
            theta, over = ray.get(server.update.remote(
                self.rank, gradient, len(rewards), step if done else None))
            if done:
                o, step = self.env.reset()[0], 0

    def gradient(self, theta, x, a, R):
        """Gradient (W,) at θ (W,) of the post's loss, summed over x (T, F), a (T,) and R (T,).

        −log π(a|x)·(R − V) with R − V held constant, ½·v_loss_coeff·(R − V)², and entropy_beta·
        Σ p·log p, which is to be small. Paper: Algorithm S3. Rows with a = -1 count nothing.
        """
        with tf.GradientTape() as tape:
            tape.watch(theta)
            weights = self.local_policy.unpack(theta, tf.reshape)
            (p, v), _ = self.local_policy.model.stateless_call(weights, [], x)
            a, advantage = tf.one_hot(tf.cast(a, tf.int32), 2), R - v[:, 0]
            log_prob = tf.math.log(tf.reduce_sum(p * a, axis=1) + 1e-10)
            v_loss = .5 * self.args.v_loss_coeff * tf.square(advantage)
            entropy = self.args.entropy_beta * tf.reduce_sum(p * tf.math.log(p + EPS), axis=1)
            losses = v_loss + entropy - log_prob * tf.stop_gradient(advantage)
            loss = tf.reduce_sum(losses * tf.reduce_sum(a, axis=1))
        return tape.gradient(loss, theta)


def returns(rewards, R):
    """R ← r + γR, from the last of T steps back to the first: a list. R: V(s') of the last."""
    result = []
    for r in rewards[::-1]:
        R = r + GAMMA * R
        result.insert(0, R)
    return result


def make_env(frame_num, **options):
    """CartPole that shows its last frames at once, the oldest first, as (4 · frame_num,)."""
    env = gym.make(ENV, disable_env_checker=True, **options)
    return gym.wrappers.FlattenObservation(gym.wrappers.FrameStackObservation(env, frame_num))


def start_ray(address, run):
    """Start Ray on this machine, or join the cluster at `address`; if there is none, status 2."""
    own = {} if address else dict(include_dashboard=False, object_store_memory=10**8)   # bytes
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        if address:     # Ray itself takes minutes to give up
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                if connection.recv(4)[3:] != b"\4":    # how gRPC begins
                    raise ConnectionError("who answers is not Ray")
        # cut short while it starts, Ray leaves processes behind
        with contextlib.nullcontext() if address else run.uninterrupted():
            ray.init(address or "local", logging_level=logging.CRITICAL, log_to_driver=False,
                     runtime_env={"env_vars": WORKER_ENVIRONMENT}, **own)
            signal.signal(signal.SIGTERM, run.interrupt)        # Ray has put its own there
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        base.refuse(f"argument --address: no Ray cluster at {address!r} ({cause}); give HOST:PORT "
                    "of one" if address else f"Ray does not start: {cause}")
    ray._private.worker._worker_logs_enabled = False    # or it prints lines of its own of a loss
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])     # sent to other machines


def answer(calls):
    """What calls of actors return; raises what was raised there."""
    try:
        return ray.get(calls)
    except ray.exceptions.RayActorError as error:
        if "creation task" in str(error):
            raise RuntimeError(f"no worker starts: {str(error).splitlines()[-1]}") from None
        raise ConnectionError("the server's process is gone, and with it the run") from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def start_actors(theta, args):
    """Start workers all over the cluster, and the server; return it, them and their calls."""
    worker = ray.remote(num_cpus=.001, scheduling_strategy="SPREAD", max_restarts=-1,
                        max_task_retries=-1)(Worker)    # without any CPU it would not spread
    workers = [worker.remote(rank, args) for rank in range(args.num_process)]
    answer([worker.__ray_ready__.remote() for worker in workers])
    server = ray.remote(num_cpus=0)(Server).remote(theta, args)
    calls = [worker.train.remote(server) for worker in workers]     # made anew after a loss
    return server, workers, calls


def end_ray(workers):
    """End the workers, which would outlive Ray by seconds, and Ray, or leave its cluster."""
    for worker in workers:
        ray.kill(worker)
    ray.shutdown()


def learn(policy, args, run):
    """Run server and workers until learning is over, and keep what came of it; True if learned."""
    history, workers, steps, learned, over = [], [], 0, False, False
    known = collections.Counter(range(args.num_process))    # each worker joins once
    began = saved = time.perf_counter()
    try:
        with run.attempt("learning"), base.live_table(
                history, LIMIT, lambda: f"{args.num_process} processes", args.log):
            server, workers, calls = start_actors(policy.theta, args)
            began = saved = time.perf_counter()
            while not over:
                answer(ray.wait(calls, timeout=.5)[0])
                rows, joined, theta, steps, learned, over = answer(
                    server.report.remote(len(history)))
                policy.sync(theta)
                for rank in (joined - known).elements():
                    base.say(f"worker_{rank + 1} was lost; Ray has started it anew")
                known |= joined
                for row in rows:
                    history.append(base.Episode(*row))
                    if args.log:
                        base.say_episode(history[-1])
                if time.perf_counter() > saved + SAVE_SECONDS:
                    saved = time.perf_counter()
                    with run.attempt("weights"):
                        save(policy, steps, args)
    finally:
        with run.uninterrupted():
            seconds = time.perf_counter() - began
            end_ray(workers)
            most = len(history) if over else args.episodes
            base.say(base.summary(learned, seconds, steps, len(history), args.num_process, most,
                                  [lost for lost in run.lost if lost == "learning"]))
            policy.model.set_weights(policy.weights)
            run.keep({NAME: policy.model}, learned, history, LIMIT,
                     f"A3C on {ENV}, {args.num_process} processes")
    if learned and "weights" not in run.lost:
        (args.out / f"{NAME}.unfinished.weights.h5").unlink(missing_ok=True)
    return learned


def save(policy, steps, args):
    """Write weights while learning goes on; only mode all leaves the earlier ones."""
    name = f"{NAME}.{steps if args.save_mode == 'all' else 'unfinished'}.weights.h5"
    policy.model.set_weights(policy.weights)
    base.save_weights(policy.model, args.out / name)


def play(policy, env):
    """Play an episode, always by the more probable action, and return its steps."""
    (o, _), steps, done = env.reset(), 0, False
    while not done:
        o, _, terminated, truncated, _ = env.step(int(policy.forward(o)[0].argmax()))
        steps, done = steps + 1, terminated or truncated
    return steps


def main(argv=None):
    """Learn, keep what was learned, play with it; return the exit status."""
    args = base.parse_arguments(
        argv, "Learn CartPole with A3C in processes, then film what was learned.", f"movie/{NAME}",
        ("--address", dict(help="HOST:PORT of a Ray cluster; without it this machine alone")),
        ("--num-process", dict(type=base.from_1, default=8, help="workers")),
        ("--local-t-max", dict(type=base.from_1, default=5, help="steps between two updates")),
        ("--entropy-beta", dict(type=float, default=.01, help="weight of the entropy")),
        ("--v-loss-coeff", dict(type=float, default=.5, help="weight of the value loss")),
        ("--frame-num", dict(type=base.from_1, default=4, help="frames that are seen at once")),
        ("--lr", dict(type=float, default=7e-4, help="learning rate at the first step")),
        ("--epoch", dict(type=base.from_1, default=10_000_000, help="most steps; there it is 0")),
        ("--episodes", dict(type=base.from_1, default=20_000, help="of all workers, at the most")),
        ("--save-mode", dict(choices=["all", "last", "max"], default="max", help="if it fails")))
    if not (ray or args.play):
        base.refuse("Ray is missing; `python -m pip install -r tests/requirements.txt` brings it")
    run, learned = base.Run(args.out), True
    policy = Policy(2, 4, args.frame_num, args.seed)
    if args.play:
        policy.weights = base.load_weights(policy.model, args.play).get_weights()
    else:
        start_ray(args.address, run)
        learned = learn(policy, args, run)
    if learned:
        with run.attempt("test"):
            env = make_env(args.frame_num, render_mode="rgb_array")
            env.reset(seed=args.seed)
            with base.film(env, args.out, NAME, args.render) as env:
                base.play(lambda: play(policy, env), args.test_episodes, "test")
    return 0 if learned and not run.lost else 1


if __name__ == "__main__":
    sys.exit(main())
