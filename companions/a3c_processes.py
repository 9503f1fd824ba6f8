"""A3C with processes that share memory, so that all cores of a machine learn together.

Python runs the threads of a program one at a time, so those of a3c_cartpole.py use one core.
Processes run at the same time, but each has a memory of its own. So here the weights θ of the
network lie in a piece of memory that belongs to all processes. Each process copies θ, plays up to
50 steps of a CartPole of its own with the copy θ' (a rollout), computes a gradient from them, and
changes θ by it, at once and without a lock.

    python -m companions.a3c_processes          # eight processes; --num-process N for others

Read a3c_cartpole.py, the main file, first: it explains actor, critic and advantage.

To understand             read
the shared memory         share_memory; then learn, which makes it, and run_process, which maps it
the loop of a process     train: the numbers 1. to 5. stand in the order of the post's `train`
the network, the loss     Policy, then compute_loss
writing without a lock    Policy.sync reads θ, AsyncRMSprop.step writes it
All of A3C stands above the line "Not needed to understand A3C". At first, skip the quick start
before the imports, pack(), unpack() and compile_gradient().

Symbols: θ all weights of the shared network; θ' a process's copy; p the probability of each action;
V(s) what the critic expects of the state s; R the discounted sum of the rewards that came after s
in the rollout and, if the episode goes on then, of V of the next state. The post calls it a return.
Shapes: W weights of the network (19 075), T steps of a rollout (at most 50), F numbers in the
frames that the network sees together (4 frames of 4 numbers, 16).

This is the program of rarilurelo's post 「PyTorchでA3C」 (2017), whose repository is
https://github.com/rarilurelo/pytorch_a3c (commit c36074b is of the same day), with Keras and
TensorFlow in place of PyTorch. "The paper" is Mnih et al., 2016, https://arxiv.org/abs/1602.01783.

What differs from the post, and is needed to read the code:
- All weights are one vector, as in the main file, and lie in a RawArray that NumPy maps. The post
  explains this way, and then lets PyTorch's share_memory do it. TensorFlow has nothing like it.
- A process plays in NumPy, and TensorFlow computes the gradient from the states afterwards. The
  post keeps what PyTorch computed while playing, and goes back through it.
- The policy loss is written out with log p. PyTorch had `reinforce` for it, and has it no more.
What the post has wrong:
- In its repository each process makes the mean square of RMSProp for itself, so it is not shared.
  (Its author corrected this a month later.)
- All its processes draw the same random numbers, because they are copies of one that was seeded.
- Its learning rate becomes negative if a process comes late, after the last step.
- `--gamma`, the variable `step` and the list `observations` have no effect there. The list holds
  the states that follow the actions. Here it holds those in which the actions were chosen, because
  the gradient is computed from them.
What is added for convenience:
- Learning ends when the last ten episodes of a process had more than 199 steps on average. The mean
  of the ten θ' of these episodes is kept, as in the main file.
- An error in one process ends the run. The test is part of it, and takes the more probable action.
- The processes start quickly, because TensorFlow is imported once for all of them.
"""
import argparse
import collections
import contextlib
import math
import multiprocessing as mp
import os
import random
import signal
import sys
import traceback
from multiprocessing import connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # to run it by its path, too

# The threads that NumPy would start would only take time from the other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Not in the post, and not needed to understand A3C: a quick start. Each process needs TensorFlow,
# and to import it takes seconds. A "forkserver" is a process that imports it once and then makes
# the others as copies of itself. It is started here, before the imports below, so that both import
# at the same time. Only Linux is sure to have it. Elsewhere each process is a new Python ("spawn").
if sys.platform == "linux":
    from multiprocessing import forkserver
    START_METHOD = "forkserver"
    # What it imports: this file (if it is run by its path) and, with the main file, TensorFlow.
    forkserver.set_forkserver_preload(["__main__", "a3c_cartpole"])
    if __name__ == "__main__":
        # It inherits that Ctrl-C is ignored. Only this process shall obey it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, handler)
else:
    START_METHOD = "spawn"

import a3c_cartpole as base  # isort: skip  (before Keras, which it sets up)
import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

NAME = "a3c_processes"

# -- the game
ENV = "CartPole-v0"
LIMIT = 200             # steps of an episode, at most
NUM_ACTIONS = 2
DIM_OBS = 4             # numbers in one frame

# -- the post's constants. All but GAMMA and ALPHA are defaults of options: `args` has the value.
NUM_PROCESS = 8
LOCAL_T_MAX = 50        # steps of a rollout, at most; paper: t_max
FRAME_NUM = 4           # frames that the network sees together
GAMMA = .99             # γ: a reward k steps ahead counts γ^k
V_LOSS_COEFF = .5       # coefficient of the value loss
ENTROPY_BETA = .01      # coefficient of the entropy
LR = 1.1e-3             # learning rate at the first step
EPOCH = 10_000_000      # steps of all processes together, at most (these are no epochs of Keras)
ALPHA = .99             # how much of its mean of squared gradients RMSProp keeps at each update
EPS = .1                # keeps the divisors of RMSProp and of the returns, and the argument of the
                        # entropy's logarithm, away from 0


def share_memory(array):
    """Copy an array to memory that processes can share. Post: 「Pythonのmultiprocessing」.

    Returns a RawArray, which a process can be given when it starts. There np.frombuffer makes a
    NumPy array of it without a copy: what one process writes, all others read.
    """
    shared = mp.RawArray(np.ctypeslib.as_ctypes_type(array.dtype), len(array))
    np.frombuffer(shared, array.dtype)[:] = array
    return shared


class Policy:
    """The network and one set of its weights. Post: `Policy`.

    The actor is the output p, the probability of each action. The critic is the output V. They
    share two hidden layers.
    """

    def __init__(self, num_actions, dim_obs, frame_num, seed=None):
        if seed is not None:
            keras.utils.set_random_seed(seed)
        self.dim_input = dim_obs * frame_num    # F
        l_input = keras.Input((self.dim_input,), name="frames")
        fc1 = self.linear(l_input, 128, "relu", "fc1")
        fc2 = self.linear(fc1, 128, "relu", "fc2")
        p = self.linear(fc2, num_actions, "softmax", "p")
        v = self.linear(fc2, 1, "linear", "v")
        self.model = keras.Model(l_input, [p, v], name=NAME)
        weights = self.model.get_weights()      # a list: kernel, bias, kernel, bias, ...
        self.shapes = [weight.shape for weight in weights]
        self.sync(self.pack(weights))           # the first θ' are the model's random weights

    @staticmethod
    def linear(x, size, activation, name):
        """Add a dense layer with the first weights that PyTorch's `Linear` has.

        They are uniform between ±1/√n for n inputs.
        """
        bound = x.shape[-1] ** -.5
        uniform = keras.initializers.RandomUniform
        layer = keras.layers.Dense(size, activation, name=name,
                                   kernel_initializer=uniform(-bound, bound),
                                   bias_initializer=uniform(-bound, bound))
        return layer(x)

    def sync(self, global_theta):
        """Copy the shared weights (W,): θ' ← θ. Post: `sync`.

        Another process may be writing to θ while this one reads. Then θ' is partly old and partly
        new. That does little harm, because one update changes θ very little.
        """
        self.theta = global_theta.copy()
        self.weights = self.unpack(self.theta)

    @staticmethod
    def pack(weights):
        """Join kernels and biases into one vector (W,)."""
        return np.concatenate([weight.ravel() for weight in weights])

    def unpack(self, theta):
        """Cut a vector (W,) into kernels and biases."""
        weights = []
        start = 0
        for shape in self.shapes:
            end = start + math.prod(shape)
            weights.append(theta[start:end].reshape(shape))
            start = end
        return weights

    def forward(self, x):
        """The frames x (F,) → p of each action (2,) and V, a number. Post: `forward`.

        In NumPy, because for a single state this is 100 times as fast as asking Keras. It must
        agree with the model (__init__): change both together.
        """
        fc1_kernel, fc1_bias, fc2_kernel, fc2_bias, p_kernel, p_bias, v_kernel, v_bias = \
            self.weights
        x = np.maximum(x @ fc1_kernel + fc1_bias, 0)        # relu
        x = np.maximum(x @ fc2_kernel + fc2_bias, 0)
        z = x @ p_kernel + p_bias
        exp_z = np.exp(z - z.max())                         # - max, so that it cannot overflow
        p = exp_z / exp_z.sum()                             # softmax
        v = x @ v_kernel + v_bias
        return p, v[0]

    def network(self, theta, observations):
        """The same in TensorFlow, to learn: θ' (W,), observations (T, F) → p (T, 2) and V (T, 1).

        All are tensors. Keras calls a model "stateless" if the weights come from outside.
        """
        parts = tf.split(theta, [math.prod(shape) for shape in self.shapes])
        weights = [tf.reshape(part, shape) for part, shape in zip(parts, self.shapes)]
        outputs, _ = self.model.stateless_call(weights, [], observations)
        return outputs


class AsyncRMSprop:
    """RMSProp on weights in shared memory. Post's repository: `AsyncRMSprop`; paper: section 4."""

    def __init__(self, global_theta, mean_square, eps):
        self.global_theta = global_theta    # θ (W,)
        self.mean_square = mean_square      # mean of squared gradients (W,), shared, too; from 0
        self.eps = eps

    def step(self, lr, gradient):
        """Change θ by a gradient (W,), in the shared memory itself and without a lock.

        RMSProp divides the gradient of each weight by its usual size. Where that is far below eps,
        eps is the divisor, so that small gradients make small changes.

        `-=` reads θ, subtracts, and writes. If two processes do so at the same moment, the change
        of one of them is lost for some of the weights. The next gradients make up for it.
        """
        self.mean_square *= ALPHA
        self.mean_square += (1 - ALPHA) * gradient ** 2
        self.global_theta -= lr * gradient / (np.sqrt(self.mean_square) + self.eps)


class StackEnv:
    """Shows the last few frames as one observation. Post's repository: `StackEnv`.

    In other games this lets the network see movement. (CartPole's frames tell it the velocities.)
    """

    def __init__(self, env, frame_num):
        self.env = env
        self.frames = collections.deque(maxlen=frame_num)   # each (4,), the oldest first

    def seed(self, seed):
        """Fix the random numbers of all later episodes."""
        self.env.reset(seed=seed)

    def reset(self):
        """Start an episode and return the first observation (F,): the same frame repeatedly."""
        frame, _ = self.env.reset()
        for _ in range(self.frames.maxlen):
            self.frames.append(frame)
        return np.concatenate(self.frames)

    def step(self, action):
        """Do an action; return the observation (F,), the reward, and whether that was the end.

        The time limit counts as an end, as in the post.
        """
        frame, reward, terminated, truncated, _ = self.env.step(action)
        self.frames.append(frame)
        return np.concatenate(self.frames), reward, terminated or truncated


def train(rank, global_theta, local_policy, optimizer, env, global_t, report, args):
    """Learn until all processes together have made `args.epoch` steps. Post: `train`.

    `global_theta` (W,) is θ, and `global_t` (1,) counts the steps. Both lie in shared memory, and
    both are changed without a lock. Usually the parent, which is the program that you start, ends
    this process much earlier, because one of the processes has learned.

    Raises FloatingPointError if a gradient is not finite, before it changes θ.
    """
    compute_gradient = compile_gradient(local_policy, args)
    # Not in the post: each process has random numbers of its own.
    rng = random.Random(None if args.seed is None else f"{args.seed} {rank}")
    env.seed(rng.getrandbits(31))
    o = env.reset()
    sum_rewards = 0
    while global_t[0] < args.epoch:
        # 1. Copy the shared weights: θ' ← θ.
        local_policy.sync(global_theta)

        # 2. Play a rollout: local_t_max steps, or fewer if the episode ends.
        observations = []
        actions = []
        rewards = []
        R = 0
        for _ in range(args.local_t_max):
            global_t += 1
            p, _ = local_policy.forward(o)
            a = rng.choices(range(NUM_ACTIONS), p.tolist())[0]
            observations.append(o)
            actions.append(a)
            o, r, done = env.step(a)
            sum_rewards += r
            rewards.append(r)
            if done:
                o = env.reset()
                report.finish_episode(int(sum_rewards), local_policy.theta, int(global_t[0]))
                sum_rewards = 0
                break
        else:
            # The loop has ended without `break`: the episode goes on. V of the next state stands
            # for all rewards that will follow.
            _, R = local_policy.forward(o)

        # 3. Compute the return of each step, from the last one back to the first.
        returns = []
        for r in rewards[::-1]:
            R = r + GAMMA * R
            returns.insert(0, R)
        returns = normalise(np.array(returns, np.float32), args.eps)

        # 4. Compute the gradient of the loss at θ'. Other processes may have changed θ meanwhile.
        gradient = compute_gradient(
            tf.constant(local_policy.theta), tf.constant(np.array(observations)),
            tf.constant(actions), tf.constant(returns)).numpy()
        if not np.isfinite(gradient).all():     # not in the post
            raise FloatingPointError(f"the gradient is not finite after {global_t[0]} steps")

        # 5. Change θ, for all processes at once. The learning rate falls from lr to 0. (Without
        #    `max` it would be negative for a process that comes after the last step.)
        new_lr = max(0, args.epoch - int(global_t[0])) / args.epoch * args.lr
        optimizer.step(new_lr, gradient)


def normalise(returns, eps):
    """Give the returns (T,) of a rollout a mean of 0 and a standard deviation near 1.

    So V learns how a return compares with the others of its rollout. But then V(s'), with which R
    begins, is on another scale than the rewards that are added to it. This is the post's rule. It
    learns, but so does a program without it.
    """
    if len(returns) == 1:
        return returns
    return (returns - returns.mean()) / (returns.std(ddof=1) + eps)


def compute_loss(p, v, actions, returns, args):
    """The post's loss, a sum over a rollout: p (T, 2), V (T,), actions (T,), returns (T,)."""
    advantage = returns - v     # how much better it went than the critic expected

    # The actor: make actions with a positive advantage more likely, others less. The advantage is
    # a constant here. Post: `a.reinforce(r - v.data)`.
    p_action = tf.gather(p, actions, axis=1, batch_dims=1)      # p of the action that was chosen
    log_prob = tf.math.log(p_action + 1e-10)
    policy_loss = -tf.reduce_sum(log_prob * tf.stop_gradient(advantage))

    # The critic: move V towards the return.
    v_loss = .5 * args.v_loss_coeff * tf.reduce_sum(advantage ** 2)

    # The post's `entropy` is Σ p·log p, which is minus the entropy. To make it small keeps the
    # policy from settling too early.
    entropy = args.entropy_beta * tf.reduce_sum(p * tf.math.log(p + args.eps))

    return policy_loss + v_loss + entropy


def compile_gradient(policy, args):
    """Compile a function that computes the gradient (W,) of the loss at θ' (W,), for any T."""

    def gradient(theta, observations, actions, returns):
        # The tape records what is computed inside `with`, to find the gradient of it.
        with tf.GradientTape() as tape:
            tape.watch(theta)
            p, v = policy.network(theta, observations)
            loss = compute_loss(p, v[:, 0], actions, returns, args)
        return tape.gradient(loss, theta)

    # autograph would translate Python's loops and `if`s, of which there are none.
    return tf.function(gradient, autograph=False).get_concrete_function(
        tf.TensorSpec(policy.theta.shape), tf.TensorSpec([None, policy.dim_input]),
        tf.TensorSpec([None], tf.int32), tf.TensorSpec([None]))


def learn(policy, args):
    """Let processes learn, and keep the results. Return True if they have learned.

    Post: what stands below `if __name__ == '__main__'`. `policy` gives the first weights, and gets
    those that are kept.
    """
    # What all processes share.
    theta = share_memory(policy.theta)
    mean_square = share_memory(np.zeros_like(policy.theta))
    global_t = share_memory(np.zeros(1, np.int64))

    progress = base.Progress(ENV, max_episodes=math.inf)
    workers = {}                        # {name: a process, as its parent sees it}
    context = mp.get_context(START_METHOD)
    try:
        with base.no_interruption():    # new processes inherit it, and are not interrupted
            for rank in range(args.num_process):
                messages, sender = context.Pipe(duplex=False)       # from the process to its parent
                process = context.Process(
                    target=run_process, args=(rank, theta, mean_square, global_t, sender, args),
                    name=f"process_{rank}", daemon=True)
                process.start()         # from here on run_process goes on by itself
                sender.close()          # now only the process has it, so its death closes the pipe
                workers[process.name] = Worker(process, messages, policy, progress, args)
        watch(workers, progress, args.log)      # shows the episodes until learning is over
    finally:
        with base.no_interruption():
            end_processes(workers)
            is_learned = keep_results(workers, progress, policy, int(global_t[0]), args)
    return is_learned


def run_process(rank, theta, mean_square, global_t, messages, args):
    """Run in a process of its own: map the shared memory, make what is not shared, and train."""
    with guard(messages):   # sends an error to the parent
        # The shared memory, as arrays.
        global_theta = np.frombuffer(theta, np.float32)
        global_mean_square = np.frombuffer(mean_square, np.float32)
        global_t = np.frombuffer(global_t, np.int64)

        # What belongs to this process alone.
        local_policy = Policy(NUM_ACTIONS, DIM_OBS, args.frame_num)
        optimizer = AsyncRMSprop(global_theta, global_mean_square, args.eps)
        env = StackEnv(make_env(), args.frame_num)
        report = Report(rank, messages, args.save_mode)
        train(rank, global_theta, local_policy, optimizer, env, global_t, report, args)


# == Not needed to understand A3C: the test, options, what processes tell their parent, faults =====

def main(argv=None):
    """Learn, keep what was learned, play with it; return the exit status."""
    args = read_options(argv)
    policy = Policy(NUM_ACTIONS, DIM_OBS, args.frame_num, args.seed)
    if args.play:
        policy.sync(policy.pack(base.load_weights(policy.model, args.play)))
    elif not learn(policy, args):
        return 1
    game = make_env(render_mode="rgb_array")
    game.reset(seed=args.seed)      # seeds all later resets; before the film begins
    with contextlib.closing(base.film(game, args.out, NAME, args.render)) as film:
        env = StackEnv(film, args.frame_num)
        base.play(lambda: play(policy, env), args.test_episodes)
    return 0


def play(policy, env):
    """Play an episode, always by the more probable action, and return its steps."""
    o = env.reset()
    steps = 0
    done = False
    while not done:
        p, _ = policy.forward(o)
        o, _, done = env.step(int(p.argmax()))
        steps += 1
    return steps


def read_options(argv):
    """Read the command line. The defaults are the post's."""
    parser = base.make_parser("Learn CartPole with A3C in processes, then film what was learned.",
                              f"movie/{NAME}")
    parser.add_argument("--num-process", type=base.positive, default=NUM_PROCESS,
                        help="processes that learn")
    parser.add_argument("--local-t-max", type=base.positive, default=LOCAL_T_MAX,
                        help="steps between two updates, at most")
    parser.add_argument("--entropy-beta", type=number, default=ENTROPY_BETA,
                        help="coefficient of the entropy")
    parser.add_argument("--v-loss-coeff", type=number, default=V_LOSS_COEFF,
                        help="coefficient of the value loss")
    parser.add_argument("--frame-num", type=base.positive, default=FRAME_NUM,
                        help="frames that the network sees together")
    parser.add_argument("--lr", type=number, default=LR,
                        help="learning rate at the first step")
    parser.add_argument("--eps", type=number, default=EPS,
                        help="is added to the divisors of RMSProp and of the returns, and inside"
                             " the logarithm of the entropy")
    parser.add_argument("--epoch", type=base.positive, default=EPOCH,
                        help="steps of all processes, at most; the learning rate is 0 then")
    parser.add_argument("--save-mode", choices=["all", "last", "max"], default="max",
                        help="which weights of process 0 to keep if the run does not learn: of its"
                             " best episode, of its last, or a file for each")
    return base.check_options(parser, parser.parse_args(argv))


def number(text):
    """Read an option that is a number, at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value


def make_env(**options):
    """Make a CartPole."""
    gym.logger.min_level = gym.logger.ERROR     # do not say that CartPole-v0 is old
    return gym.make(ENV, disable_env_checker=True, **options)


class Report:
    """Tells the parent about each episode of a process. The post prints those of process 0."""

    def __init__(self, rank, messages, save_mode):
        self.rank = rank
        self.messages = messages        # a pipe to the parent
        self.save_mode = save_mode
        self.max_sum_rewards = 0
        self.last_rewards = collections.deque([0] * 10, maxlen=10)
        self.last_thetas = collections.deque(maxlen=10)     # θ' of each of these ten episodes

    def finish_episode(self, sum_rewards, theta, global_t):
        """Send the steps of an episode, and the weights if they are to be kept.

        As each step gives a reward of 1, the sum of the rewards is the number of steps.
        """
        self.last_rewards.append(sum_rewards)
        self.last_thetas.append(theta)
        mean = sum(self.last_rewards) / 10
        kept = None
        if mean > LIMIT - 1:
            kept = np.mean(self.last_thetas, axis=0)    # as in the main file
        elif self.rank == 0:
            # As in the post, process 0 decides: each time, or if this was its best episode.
            if self.save_mode != "max" or sum_rewards > self.max_sum_rewards:
                self.max_sum_rewards = sum_rewards
                kept = theta
        self.messages.send((sum_rewards, mean, global_t, kept))


@contextlib.contextmanager
def guard(messages):
    """Run what stands in the `with` in a process of its own: only its parent can interrupt it.

    An error is sent to the parent, as text.
    """
    # A terminal sends Ctrl-C to all processes. The parent obeys, and then ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError):      # the parent is gone, and nobody listens
            messages.send(traceback.format_exc())


def watch(workers, progress, log):
    """Show the episodes of all processes until learning is over."""
    # Wait until the first process has played an episode, or has failed. Only then does the clock of
    # the summary start, because until then nothing has been learned.
    connection.wait([worker.messages for worker in workers.values()])
    base.run_threads({name: worker.follow for name, worker in workers.items()}, progress, log)


def end_processes(workers):
    """End all processes, and wait for their end."""
    for worker in workers.values():
        worker.process.kill()       # it has no files and no locks to put in order
    for worker in workers.values():
        worker.process.join()


def keep_results(workers, progress, policy, steps, args):
    """Give `policy` the weights to keep, save them, and say how it went. Return True if learned."""
    # The first episode that meets the rule is the last of the history. Its process hands over the
    # weights. If there is none, process 0 does, as in the post.
    is_learned = False
    keeper = "process_0"
    if progress.history and progress.history[-1].mean_of_last_10 > LIMIT - 1:
        is_learned = True
        keeper = progress.history[-1].thread
    if keeper in workers:
        policy.sync(workers[keeper].kept)
    policy.model.set_weights(policy.weights)
    base.keep({NAME: policy.model}, progress, is_learned, steps,
              f"A3C on {ENV}, {args.num_process} processes", args.out)
    return is_learned


class Worker:
    """A process, as its parent sees it."""

    def __init__(self, process, messages, policy, progress, args):
        self.name = process.name
        self.process = process
        self.messages = messages        # the pipe from the process
        self.policy = policy
        self.progress = progress
        self.save_all = args.save_mode == "all"
        self.out = args.out
        self.episodes = 0
        self.kept = policy.theta        # the weights (W,) that this process wants to be kept

    def follow(self):
        """Record the episodes of the process, until learning is over or the process has ended."""
        while not self.progress.stop.is_set():
            if not self.messages.poll(.1):
                continue
            try:
                message = self.messages.recv()
            except (EOFError, OSError):
                self.explain_end()
                return
            if isinstance(message, str):
                self.fail(f"failed:\n{message}")
                return
            self.record(*message)

    def record(self, steps, mean, global_t, kept):
        """Record an episode. The first one that meets the rule ends learning."""
        self.episodes += 1
        is_counted = self.progress.finish_episode(
            self.name, self.episodes, steps, mean, global_t, mean > LIMIT - 1)
        if is_counted and kept is not None:
            self.kept = kept
            if self.save_all:
                self.policy.model.set_weights(self.policy.unpack(kept))
                base.save_weights(self.policy.model, self.out / f"{NAME}.{global_t}.weights.h5")

    def explain_end(self):
        """Note a failure if the process has ended otherwise than after the last step of the run."""
        self.process.join()
        if self.process.exitcode < 0:
            self.fail(f"was killed by signal {-self.process.exitcode}")
        elif self.process.exitcode > 0:
            self.fail(f"ended with exit status {self.process.exitcode}")

    def fail(self, reason):
        """Note that this process has failed, and say why, if it is the first one."""
        with self.progress.lock:
            is_first = self.progress.failed is None
            if is_first:
                self.progress.failed = self.name
        if is_first:
            print(f"error: {self.name} {reason}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    base.run_program(main)
