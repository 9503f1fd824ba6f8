"""A3C with processes in place of threads, so that several cores learn together.

Python has a lock, the GIL, because of which only one thread of a process runs Python code at a
time. So more cores help the threads of a3c_cartpole.py little. Processes run at the same time, but
each has a memory of its own. So here θ, the weights of the network, lies in memory that all
processes share, and each process changes θ without a lock.

    python companions/a3c_processes.py      # learns within seconds; its films are then in
                                            # movie/a3c_processes

This redoes in Keras rarilurelo's post 「PyTorchでA3C」 (blog rarilureloの日記, 2017) and its
repository of the same day, https://github.com/rarilurelo/pytorch_a3c/tree/c36074b. (In its
afterword the author says that a policy that once breaks never recovers, and that synchronous
updates are held to be better.) Read a3c_cartpole.py first: it explains actor, critic and advantage.
Then look at these places:

    the loop of each process                        train
    the returns and the loss                        compute_returns, compute_loss
    how a process copies θ                          Policy.sync
    how it changes θ for all, without a lock        AsyncRMSprop.step
    what all processes share                        as_arrays, and the first lines of `learn`

Symbols: θ the shared weights; θ' a process's copy; p the probability of each action; V what the
critic expects (here of normalised returns, see compute_returns). A rollout is the steps that a
process plays with one copy; T is their number. As in the paper (https://arxiv.org/abs/1602.01783),
and not as in a3c_cartpole.py, a return looks ahead to the end of its rollout, and the loss is a
sum. companions/README.md lists what differs from the post.
"""
# ruff: noqa: E402  (quick_start is called before the imports that take seconds)
import collections
import contextlib
import multiprocessing as mp
import os
import random
import signal
import sys
from multiprocessing import connection


def quick_start():
    """To save seconds, start a server that imports TensorFlow now, too (Linux only; skip this).

    Each process that learns is then a copy of the server. Return how processes are to be started.
    """
    if sys.platform != "linux":
        return "spawn"          # each process is a new Python
    from multiprocessing import forkserver
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)    # so that the server finds `common`
    forkserver.set_forkserver_preload(["common"])           # (`common` imports TensorFlow)
    forkserver.ensure_running()                             # a second time this does nothing
    return "forkserver"


if __name__ == "__main__":
    quick_start()

import common

import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

NAME = "a3c_processes"

# -- the game
ENV = "CartPole-v0"
NUM_ACTIONS = 2
DIM_OBS = 4             # numbers in one frame

# -- constants: FRAME_NUM and GAMMA are the post's, the others below are its repository's
NUM_PROCESS = 8
FRAME_NUM = 4           # frames that the network sees together (one, with velocities, would do)
LOCAL_T_MAX = 50        # steps of a rollout, at most
GAMMA = .99             # γ: a reward k steps ahead counts γ^k
V_LOSS_COEFF = .5       # coefficient of the value loss, half the squared error
ENTROPY_BETA = .01      # coefficient of the entropy
LR = 1.1e-3             # learning rate at the first step
MAX_EPISODES = 20_000   # of all processes together; not in the post
EPOCH = 10_000_000      # steps of all processes together, at most (these are no epochs of Keras)
ALPHA = .99             # how much of its mean of squared gradients RMSProp keeps at each update
EPS = .1                # added to the divisors of RMSProp (there it is large) and of the returns,
                        # and in the entropy's logarithm (large, too): never 0


class Policy:
    """The network, and the weights with which a process plays. Post: `Policy`.

    The actor is the output p, the critic is the output v. They share two hidden layers.
    """

    def __init__(self):
        l_input = keras.Input((DIM_OBS * FRAME_NUM,))
        fc1 = self.linear(l_input, 128, "relu")
        fc2 = self.linear(fc1, 128, "relu")
        p = self.linear(fc2, NUM_ACTIONS, "softmax")
        v = self.linear(fc2, 1, "linear")
        self.model = keras.Model(l_input, [p, v], name=NAME)
        self.weights = self.model.get_weights()     # θ'. (The model's own weights do not change.)
        self.numpy_forward = common.numpy_forward(self.model)   # in NumPy: faster for one state

    @staticmethod
    def linear(x, size, activation):
        """Add a layer with the first weights of PyTorch's `Linear`: uniform, ±1/√n for n inputs."""
        bound = x.shape[-1] ** -.5
        uniform = keras.initializers.RandomUniform(-bound, bound)
        return keras.layers.Dense(size, activation, kernel_initializer=uniform,
                                  bias_initializer=uniform)(x)

    def forward(self, x):
        """Compute p (2,) and V, a number, of a state x (16,), four frames. Post: `forward`."""
        policy, value = self.numpy_forward(self.weights, x)
        return policy, value[0]

    def sync(self, global_weights):
        """Copy the shared weights: θ' ← θ. Post: `sync`.

        Another process may be writing meanwhile. Then the copy is partly older and partly newer.
        That does little harm, because one update changes θ little.
        """
        self.weights = [w.copy() for w in global_weights]


def train(rng, global_weights, local_policy, compute_gradients, optimizer, env, global_t, sender):
    """Learn until all processes together have made EPOCH steps. Post: `train`.

    `global_weights`, θ (the post's `global_policy`), and `global_t` (1,), the number of steps, are
    arrays in shared memory. Through the pipe `sender` the main process hears of each episode.
    Usually it ends all much earlier, when the last ten episodes of one process average above 199
    steps (not as in the post).
    """
    o, _ = env.reset()
    sum_rewards = 0
    while global_t[0] < EPOCH:
        # 1. Copy the shared weights: θ' ← θ.
        local_policy.sync(global_weights)

        # 2. Play a rollout: LOCAL_T_MAX steps, or fewer if the episode ends.
        observations = []
        actions = []
        rewards = []
        R = 0       # it stays 0 at a fall and, wrongly, as in the post, at the time limit
        for _ in range(LOCAL_T_MAX):
            # `+=` changes the array itself, so all processes see it. No lock: see AsyncRMSprop.
            global_t += 1
            p, _ = local_policy.forward(o)      # (the post keeps p and V for step 4)
            a = rng.choices(range(NUM_ACTIONS), p.tolist())[0]
            observations.append(o)      # (the post appends the next state, and does not use it)
            actions.append(a)
            o, r, terminated, truncated, _ = env.step(a)
            rewards.append(r)
            sum_rewards += r
            if terminated or truncated:
                o, _ = env.reset()
                sender.send(int(sum_rewards))
                sum_rewards = 0
                break
        else:
            # No `break`: the episode goes on. V of the next state stands for all later rewards.
            _, R = local_policy.forward(o)

        # 3. Compute the return of each step.
        returns = compute_returns(rewards, R)

        # 4. Compute the gradients of the loss at θ'. Other processes may have changed θ meanwhile.
        gradients = compute_gradients(
            [tf.constant(w) for w in local_policy.weights], tf.constant(np.array(observations)),
            tf.constant(actions), tf.constant(returns))

        # 5. Change θ, for all processes. The learning rate falls from LR to 0 (the post's even
        #    below 0); in a usual run, of 70 000 steps, it falls by less than 1 %.
        new_lr = max(0, EPOCH - int(global_t[0])) / EPOCH * LR
        optimizer.step(new_lr, [gradient.numpy() for gradient in gradients])


def compute_returns(rewards, R):
    """Compute the return of each step of a rollout (T,), the discounted rewards from it on.

    R stands for the rewards after the rollout. The returns are then normalised, as in the post.
    """
    returns = []
    for r in rewards[::-1]:
        R = r + GAMMA * R
        returns.insert(0, R)
    returns = np.array(returns, np.float32)

    # Normalise: to a mean of 0 and a standard deviation near 1 (ddof=1: PyTorch's). This has two
    # faults. The level is lost: early steps of any rollout get positive returns, late ones negative
    # ones, however well it went. And it mixes two units: V learns normalised returns, so R, a V, is
    # near 0, but stands above for later rewards that are not normalised, whose sum may be near 80.
    # So the end of a rollout looks nearly like the end of the episode. (Presumably it learns by the
    # rollouts that end with a fall: there an action that brings the fall nearer lowers its return.
    # The author took the normalisation out later.)
    if len(returns) > 1:        # (one number has no deviation)
        returns = (returns - returns.mean()) / (returns.std(ddof=1) + EPS)
    return returns


def compile_gradients(model):
    """Compile a static graph of the loss's gradients for any T. (The post's is dynamic.)"""

    def gradients(weights, observations, actions, returns):
        with tf.GradientTape() as tape:     # records what is computed, to find its gradients
            tape.watch(weights)             # with respect to these
            # The model with these weights. ([] and _ are for other state, which it lacks.)
            (p, v), _ = model.stateless_call(weights, [], observations)
            loss = compute_loss(p, v[:, 0], actions, returns)
        return tape.gradient(loss, weights)

    return tf.function(gradients, autograph=False).get_concrete_function(
        [tf.TensorSpec(w.shape) for w in model.get_weights()],
        tf.TensorSpec(model.input_shape), tf.TensorSpec([None], tf.int32), tf.TensorSpec([None]))


def compute_loss(p, v, actions, returns):
    """Compute the loss, a sum over a rollout: p (T, 2), V (T,), actions (T,), returns (T,)."""
    advantage = returns - v     # how much the normalised return exceeds V

    # The actor: make actions with a positive advantage more probable, others less. The advantage
    # is a constant here. A drawn action has no derivative, so REINFORCE takes that of log p: the
    # post's `a.reinforce(x)` adds the gradient of -x·log p. (Why log: see a3c_cartpole.py.)
    p_action = tf.gather(p, actions, axis=1, batch_dims=1)      # p of the action that was chosen
    log_prob = tf.math.log(p_action + 1e-10)                    # 1e-10: never log 0
    policy_loss = -tf.reduce_sum(log_prob * tf.stop_gradient(advantage))

    # The critic: move V towards the return.
    v_loss = .5 * V_LOSS_COEFF * tf.reduce_sum(tf.square(advantage))

    # Minus the entropy, Σ p·log p (but for EPS). Its minimum is at p = ½, so it works against a p
    # near 0 or 1. (The post calls it `entropy`.)
    minus_entropy = ENTROPY_BETA * tf.reduce_sum(p * tf.math.log(p + EPS))

    return policy_loss + v_loss + minus_entropy


class AsyncRMSprop:
    """RMSProp on weights in shared memory. Repository: `AsyncRMSprop`."""

    def __init__(self, global_weights, mean_squares):
        self.global_weights = global_weights    # θ
        self.mean_squares = mean_squares        # means of squared gradients, shared, too; from 0

    def step(self, lr, gradients):
        """Change θ by gradients, in the shared memory itself.

        RMSProp divides each gradient by its own usual size, √m. EPS is added, so where √m is far
        below EPS the divisor is about EPS, and small gradients make small changes.

        No lock: `-=` reads a weight, subtracts, and stores. If two processes do so to a weight at
        the same moment, one of the two changes is lost. The paper accepts that, too.
        """
        for w, m, g in zip(self.global_weights, self.mean_squares, gradients):
            m *= ALPHA
            m += (1 - ALPHA) * g ** 2
            w -= lr * g / (np.sqrt(m) + EPS)


def as_arrays(memory, policy):
    """Show RawArrays as NumPy arrays, without a copy: what one process writes, all others read.

    Each process must do so itself: an array that is sent to it would be a copy. (The post describes
    this way first, calls it bothersome, and lets PyTorch's `share_memory` do all of it.)
    """
    return [np.frombuffer(m, np.float32).reshape(w.shape) for m, w in zip(memory, policy.weights)]


def learn(policy, num_process, seed, run):
    """Let processes learn until the rule is met, one has crashed, or all have made EPOCH steps.

    `policy` gives the first θ. `run`, a common.Run, records episodes and applies the rule.
    """
    # The memory that all processes share: θ, RMSProp's mean squares (from 0), the count of steps.
    shared_weights = [mp.RawArray("f", w.ravel()) for w in policy.weights]
    shared_squares = [mp.RawArray("f", w.size) for w in policy.weights]
    shared_t = mp.RawArray("q", 1)
    global_weights = as_arrays(shared_weights, policy)

    context = mp.get_context(quick_start())
    processes = {}      # the process of each receiver
    try:
        for rank in range(num_process):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=run_process, name=f"process_{rank}",
                args=(seed, shared_weights, shared_squares, shared_t, sender),
                daemon=True)            # Python's exit ends it, and does not wait for it
            process.start()             # from here on run_process goes on by itself
            sender.close()              # so that `recv` fails when the process has ended
            processes[receiver] = process
        for name, steps in receive(dict(processes)):
            if not run.history:
                run.start_clock()       # at the first episode: to start processes does not count
            run.steps = shared_t[0]
            policy.sync(global_weights)         # θ as it is now, a little after the episode
            if run.finish_episode(name, steps, policy.weights):
                break
    finally:
        for process in processes.values():
            process.kill()              # it has no files to put in order
            process.join()


def receive(processes):
    """Yield a process's name and an episode's steps, until all have ended or one has crashed."""
    while processes:
        for receiver in connection.wait(processes):
            process = processes[receiver]
            try:
                yield process.name, receiver.recv()
            except (EOFError, OSError):         # the process has ended
                process.join()
                if process.exitcode != 0:       # (it is 0 after EPOCH steps)
                    sys.exit(f"error: {process.name} ended with exit code {process.exitcode}")
                del processes[receiver]


def run_process(seed, shared_weights, shared_squares, shared_t, sender):
    """Do what one process does: make what belongs to it alone, and train."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the main process obeys Ctrl-C, and ends this
    # --seed fixes these random numbers, but it does not repeat a run, because the order in which
    # the processes change θ is left to the system.
    rng = random.Random(None if seed is None else f"{seed} {mp.current_process().name}")
    gym.logger.min_level = gym.logger.ERROR         # do not say that CartPole-v0 is old
    env = StackEnv(gym.make(ENV, disable_env_checker=True))
    env.reset(seed=rng.getrandbits(31))             # fixes all later resets, too
    local_policy = Policy()
    compute_gradients = compile_gradients(local_policy.model)
    global_weights = as_arrays(shared_weights, local_policy)
    optimizer = AsyncRMSprop(global_weights, as_arrays(shared_squares, local_policy))
    global_t = np.frombuffer(shared_t, np.int64)
    with contextlib.suppress(BrokenPipeError):      # nobody receives: the main process was killed
        train(rng, global_weights, local_policy, compute_gradients, optimizer, env, global_t,
              sender)


class StackEnv(gym.Wrapper):
    """Shows the last few frames as one state (16,). Repository: `StackEnv`."""

    def __init__(self, env, frame_num=FRAME_NUM):
        super().__init__(env)
        self.frames = collections.deque(maxlen=frame_num)   # each (4,), the oldest first

    def reset(self, **options):
        """Start an episode; the first state holds the same frame four times."""
        frame, info = self.env.reset(**options)
        self.frames.extend([frame] * self.frames.maxlen)
        return np.concatenate(self.frames), info

    def step(self, action):
        """Do an action."""
        frame, *others = self.env.step(action)
        self.frames.append(frame)
        return np.concatenate(self.frames), *others


# == Not needed to understand A3C: options and test ================================================

def main(argv=None):
    """Learn, keep what was learned, play with it; return the exit status."""
    parser = common.make_parser("Learn CartPole with A3C in processes, then film it.", NAME,
                                MAX_EPISODES)
    parser.add_argument("--num-process", type=common.positive_number, default=NUM_PROCESS,
                        help="processes that learn")
    args = common.parse_options(parser, argv)
    if args.seed is not None:
        keras.utils.set_random_seed(args.seed)
    policy = Policy()
    run = common.Run(policy.model, StackEnv(gym.make(ENV, render_mode="rgb_array")),
                     f"A3C on {ENV}, {args.num_process} processes", args,
                     [f"process_{rank}" for rank in range(args.num_process)])
    if not args.play:
        with run:
            learn(policy, args.num_process, args.seed, run)

    def act(weights, o):
        p, _ = policy.numpy_forward(weights, o)
        return int(p.argmax())          # the more probable action

    return run.test(act)


if __name__ == "__main__":
    common.run_program(main)
