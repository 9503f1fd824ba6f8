"""A3C with processes in place of threads, so that all cores of a machine learn together.

Python runs the threads of a program one at a time, so those of a3c_cartpole.py use one core.
Processes run at the same time, but each has a memory of its own. So here the weights θ of the
network lie in memory that all processes share, and each process changes θ without a lock.

    python -m companions.a3c_processes      # learns within seconds; films: movie/a3c_processes

This is the program of rarilurelo's post 「PyTorchでA3C」 (blog rarilureloの日記, 2017). Its
repository is https://github.com/rarilurelo/pytorch_a3c; what is said of it here is about commit
c36074b, of the day of the post. Read a3c_cartpole.py first: it explains actor, critic and
advantage. (Other than there, each step looks ahead to the end of its rollout, not n = 5 steps, the
loss is a sum, not a mean, and there is no ε.) Then look at `train`, the loop of each process, and
at the places where it meets the others: Policy.sync reads θ, AsyncRMSprop.step changes θ and the
mean squares, and `global_t += 1` counts the steps of all. `learn` makes the shared memory and
starts the processes.

Symbols: θ the shared weights; θ' a process's copy; p the probability of each action; V(s) what the
critic expects of the state s. A rollout is the steps that a process plays with one copy; T is their
number. Weights are lists of eight arrays: kernel and bias of fc1, fc2, p and v.

What differs from the post, and is needed to read the code:
- The post is about PyTorch's share_memory. All programs here use one framework, Keras, so this one
  shares memory in the older way that the post describes first, RawArray and frombuffer. (The post
  finds it troublesome, 面倒. Here it is three lines in `learn`, and map_memory.)
- A process plays in NumPy, and TensorFlow computes the gradients from the states afterwards. The
  post keeps what PyTorch computed during the rollout.
- The policy loss is a formula with log p, which the post mentions as the other way. It calls
  `reinforce`, which PyTorch removed in 2017.
Slips, corrected here:
- In the repository each process makes RMSProp's mean squares for itself, so they are not shared.
  (The author corrected this a month later.)
- In the repository all processes draw the same random numbers, because each is a copy of one.
- An update after the last step has a negative learning rate.
- The list `observations` holds the states after the actions, and nothing reads it.
Kept, though it is doubtful: returns are normalised (see compute_returns). The author took this out
later.
Added: the run ends when the last ten episodes of a process have a mean above 199 steps, when a
process has failed, or after --max-episodes. The post saves θ' of its first process; `learn` says
what is kept here. The test always takes the more probable action; that of the repository draws one.
"""
# ruff: noqa: E402  (quick_start is called before the imports that take seconds)
import collections
import functools
import multiprocessing as mp
import random
import signal
import sys
import time
import traceback
from multiprocessing import connection


def quick_start():
    """Start a server that imports TensorFlow now, while this process imports it, too.

    Each process that learns is a copy of that server, so it need not import TensorFlow again. This
    is Python's start method "forkserver". Return the start method. A second call changes nothing.
    """
    if sys.platform != "linux":
        return "spawn"      # each process is a new Python
    from multiprocessing import forkserver
    forkserver.set_forkserver_preload(["companions.common"])
    try:
        forkserver.ensure_running()
    except OSError:         # it needs a socket in TMPDIR, whose path may have 107 bytes
        return "spawn"
    return "forkserver"


if __name__ == "__main__":
    quick_start()

from companions import common

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

# -- constants: FRAME_NUM and GAMMA as in the post, the others as in its repository
NUM_PROCESS = 8
FRAME_NUM = 4           # frames that the network sees together
LOCAL_T_MAX = 50        # steps of a rollout, at most
GAMMA = .99             # γ: a reward k steps ahead counts γ^k
V_LOSS_COEFF = .5       # coefficient of the value loss
ENTROPY_BETA = .01      # coefficient of the entropy
LR = 1.1e-3             # learning rate at the first step
EPOCH = 10_000_000      # steps of all processes together, at most (these are no epochs of Keras)
ALPHA = .99             # how much of its mean of squared gradients RMSProp keeps at each update
EPS = .1                # keeps the divisors of RMSProp and of the returns, and the argument of the
                        # entropy's logarithm, away from 0


class Policy:
    """The network, and the weights with which a process plays. Post: `Policy`.

    The actor is the output p, the critic is the output v. They share two hidden layers.
    """

    def __init__(self, num_actions, dim_obs, frame_num=FRAME_NUM):
        l_input = keras.Input((dim_obs * frame_num,))
        fc1 = self.linear(l_input, 128, "relu")
        fc2 = self.linear(fc1, 128, "relu")
        p = self.linear(fc2, num_actions, "softmax")
        v = self.linear(fc2, 1, "linear")
        self.model = keras.Model(l_input, [p, v], name=NAME)
        self.sync(self.model.get_weights())

    @staticmethod
    def linear(x, size, activation):
        """Add a layer with the first weights of PyTorch's `Linear`: uniform, ±1/√n for n inputs."""
        bound = x.shape[-1] ** -.5
        uniform = keras.initializers.RandomUniform
        layer = keras.layers.Dense(size, activation,
                                   kernel_initializer=uniform(-bound, bound),
                                   bias_initializer=uniform(-bound, bound))
        return layer(x)

    def sync(self, global_weights):
        """Copy the shared weights: θ' ← θ. Post: `sync`.

        Another process may be writing meanwhile. Then the copy is partly older and partly newer.
        That does little harm, because one update usually changes θ very little.
        """
        self.weights = [w.copy() for w in global_weights]

    def forward(self, x):
        """Compute p (2,) and V, a number, for one state x (16,). Post: `forward`.

        Keras' model computes the same, but for one state NumPy is 100 times as fast. Both must be
        changed together; the program checks at the start that they agree.
        """
        fc1, fc1_bias, fc2, fc2_bias, p_kernel, p_bias, v_kernel, v_bias = self.weights
        x = np.maximum(x @ fc1 + fc1_bias, 0)       # relu
        x = np.maximum(x @ fc2 + fc2_bias, 0)
        z = x @ p_kernel + p_bias
        exp_z = np.exp(z - z.max())                 # - max: it cannot overflow
        policy = exp_z / exp_z.sum()                # softmax
        value = x @ v_kernel + v_bias
        return policy, value[0]


def train(rng, global_weights, local_policy, compute_gradients, optimizer, env, global_t, messages):
    """Learn until all processes together have made EPOCH steps. Post: `train`.

    `global_weights` is θ, and `global_t` (1,) counts the steps. Both are arrays in shared memory.
    Usually the program ends all processes much earlier, because one of them has learned.
    """
    o = env.reset()
    sum_rewards = 0
    while global_t[0] < EPOCH:
        # 1. Copy the shared weights: θ' ← θ.
        local_policy.sync(global_weights)

        # 2. Play a rollout: LOCAL_T_MAX steps, or fewer if the episode ends.
        observations = []
        actions = []
        rewards = []
        R = 0       # it stays 0 if the episode ends: then no rewards come later
        for _ in range(LOCAL_T_MAX):
            # In place, so that all processes see it. No lock: see AsyncRMSprop.step.
            global_t += 1
            p, _ = local_policy.forward(o)
            a = rng.choices(range(NUM_ACTIONS), p.tolist())[0]
            observations.append(o)
            actions.append(a)
            o, r, done = env.step(a)
            rewards.append(r)
            sum_rewards += r
            if done:
                o = env.reset()
                messages.send(("episode", int(sum_rewards)))    # the post prints some
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

        # 5. Change θ, for all processes at once. The learning rate falls from LR to 0 at the last
        #    step. (In a run of 70 000 steps it falls by less than 1 %.)
        new_lr = max(0, EPOCH - int(global_t[0])) / EPOCH * LR
        optimizer.step(new_lr, [gradient.numpy() for gradient in gradients])


def compute_returns(rewards, R):
    """Sum the discounted rewards after each step (T,), and normalise as the post does.

    R stands for the rewards after the last step. Normalised returns have a mean of 0 and a standard
    deviation near 1, so V learns how a return compares with the others of its rollout. But each
    reward of CartPole is 1. So the last step of a rollout always has the smallest return, even if
    the pole stands well, and R matters little: normalised, the returns are almost the same for all
    R below 100. (A single return is left as it is. ddof=1: as in PyTorch.)
    """
    returns = []
    for r in rewards[::-1]:
        R = r + GAMMA * R
        returns.insert(0, R)
    returns = np.array(returns, np.float32)
    if len(returns) > 1:
        returns = (returns - returns.mean()) / (returns.std(ddof=1) + EPS)
    return returns


def compile_gradients(model):
    """Compile a function that computes the gradients of the loss, for any length T of a rollout."""

    def gradients(weights, observations, actions, returns):
        with tf.GradientTape() as tape:     # records what is computed, to find its gradients
            tape.watch(weights)
            # The model with these weights. ([] and _ are for other state, which it has not.)
            (p, v), _ = model.stateless_call(weights, [], observations)
            loss = compute_loss(p, v[:, 0], actions, returns)
        return tape.gradient(loss, weights)

    weights = [tf.TensorSpec(w.shape) for w in model.get_weights()]
    observations = tf.TensorSpec(model.input_shape)     # (None, 16): None stands for any T
    actions = tf.TensorSpec([None], tf.int32)
    returns = tf.TensorSpec([None])
    # autograph=False: there is no `if` and no loop that must be translated.
    function = tf.function(gradients, autograph=False)
    return function.get_concrete_function(weights, observations, actions, returns)


def compute_loss(p, v, actions, returns):
    """Compute the loss, a sum over a rollout: p (T, 2), V (T,), actions (T,), returns (T,)."""
    advantage = returns - v     # how much better it went than the critic expected

    # The actor: make actions with a positive advantage more probable, others less. The advantage
    # is a constant here. Post: `a.reinforce(r - v.data)`.
    p_action = tf.gather(p, actions, axis=1, batch_dims=1)      # p of the action that was chosen
    log_prob = tf.math.log(p_action + 1e-10)
    policy_loss = -tf.reduce_sum(log_prob * tf.stop_gradient(advantage))

    # The critic: move V towards the return.
    v_loss = .5 * V_LOSS_COEFF * tf.reduce_sum(tf.square(advantage))

    # The post's `entropy` is about minus the entropy, Σ p·log p. To make it small keeps p from
    # becoming 0 or 1 too early.
    entropy = ENTROPY_BETA * tf.reduce_sum(p * tf.math.log(p + EPS))

    return policy_loss + v_loss + entropy


class AsyncRMSprop:
    """RMSProp on weights in shared memory. Repository: `AsyncRMSprop`."""

    def __init__(self, global_weights, mean_squares):
        self.global_weights = global_weights    # θ
        self.mean_squares = mean_squares        # means of squared gradients, shared, too; from 0

    def step(self, lr, gradients):
        """Change θ by gradients, in the shared memory itself.

        RMSProp divides each gradient by its own usual size, √m. EPS is added, so where √m is far
        below EPS the divisor is about EPS, and small gradients make small changes.

        No lock: `-=` reads a weight, subtracts, and writes. If two processes do so at the same
        moment, one of the two changes is lost. Measured on two cores, this happens to less than one
        change in 100 000; with more cores it happens more often.
        """
        for w, m, g in zip(self.global_weights, self.mean_squares, gradients):
            m *= ALPHA
            m += (1 - ALPHA) * g ** 2
            w -= lr * g / (np.sqrt(m) + EPS)


class StackEnv:
    """Shows the last few frames as one observation. Repository: `StackEnv`.

    In other games this lets the network see movement. (A frame of CartPole contains velocities.)
    """

    def __init__(self, env, frame_num=FRAME_NUM):
        self.env = env
        self.frames = collections.deque(maxlen=frame_num)   # each (4,), the oldest first

    def reset(self):
        """Start an episode; return the first observation (16,), the same frame four times."""
        frame, _ = self.env.reset()
        self.frames.extend([frame] * self.frames.maxlen)
        return np.concatenate(self.frames)

    def step(self, action):
        """Do an action; return the observation, the reward, and whether the episode has ended.

        The time limit counts as an end, as in the post.
        """
        frame, reward, terminated, truncated, _ = self.env.step(action)
        self.frames.append(frame)
        return np.concatenate(self.frames), reward, terminated or truncated


def learn(policy, args):
    """Let processes learn, and keep the results. Return True if one has learned.

    `policy` gives the first weights. Afterwards it has those to keep. If a process has learned: the
    mean of θ over its last ten episodes. If none has: θ at the last episode reported.
    """
    # The memory that all processes share: θ, RMSProp's mean squares (from 0), the count of steps.
    shared_weights = [mp.RawArray("f", w.ravel()) for w in policy.weights]
    shared_squares = [mp.RawArray("f", w.size) for w in policy.weights]
    shared_t = mp.RawArray("q", 1)
    global_weights = map_memory(shared_weights, policy)

    names = [f"process_{rank}" for rank in range(args.num_process)]
    run = common.Run(f"A3C on {ENV}, {args.num_process} processes", LIMIT, args.out, names)
    context = mp.get_context(quick_start())
    pipes = {}      # {process: the pipe with its messages}
    try:
        with run:
            for name in names:
                messages, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=run_process, name=name, daemon=True,
                    args=(name, args.seed, shared_weights, shared_squares, shared_t, sender))
                process.start()         # from here on run_process goes on by itself
                sender.close()          # the process has its own
                pipes[process] = messages
            follow(pipes, global_weights, shared_t, policy, run, args.max_episodes)
    finally:
        for process in pipes:
            process.kill()              # it has no files to put in order
        for process in pipes:
            process.join()
        policy.model.set_weights(policy.weights)
        run.keep({NAME: policy.model})
    return run.is_learned


def run_process(name, seed, shared_weights, shared_squares, shared_t, messages):
    """Do what one process does: make what belongs to it alone, map the shared memory, and train."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the main process obeys Ctrl-C, and ends this
    gym.logger.min_level = gym.logger.ERROR
    try:
        # --seed fixes these random numbers. A run is not repeated by it, because the order in which
        # the processes change θ is left to the system.
        rng = random.Random(None if seed is None else f"{seed} {name}")
        env = gym.make(ENV, disable_env_checker=True)
        env.reset(seed=rng.getrandbits(31))         # fixes all later resets, too
        local_policy = Policy(NUM_ACTIONS, DIM_OBS)
        compute_gradients = compile_gradients(local_policy.model)

        global_weights = map_memory(shared_weights, local_policy)
        optimizer = AsyncRMSprop(global_weights, map_memory(shared_squares, local_policy))
        global_t = np.frombuffer(shared_t, np.int64)

        messages.send(("ready", None))
        train(rng, global_weights, local_policy, compute_gradients, optimizer, StackEnv(env),
              global_t, messages)
    except Exception:
        messages.send(("end", f"failed:\n{traceback.format_exc()}"))


def map_memory(shared, policy):
    """Show RawArrays as NumPy arrays, without a copy: what one process writes, all others read.

    Post: numpy.frombuffer. Together with `learn` this does the work of PyTorch's share_memory.
    """
    return [np.frombuffer(memory, np.float32).reshape(w.shape)
            for memory, w in zip(shared, policy.weights)]


# == Not needed to understand A3C: options, test, messages to the parent, faults ===================

def main(argv=None):
    """Learn, keep what was learned, play with it; return the exit status."""
    if mp.current_process().name.startswith("process_"):
        sys.exit(1)     # a script without `if __name__ == "__main__"`: see explain_end
    parser = common.make_parser("Learn CartPole with A3C in processes, then film it.", NAME, 20_000)
    parser.add_argument("--num-process", type=common.positive_number, default=NUM_PROCESS,
                        help="processes that learn")
    args = common.read_options(parser, argv)
    if args.seed is not None:
        keras.utils.set_random_seed(args.seed)
    policy = Policy(NUM_ACTIONS, DIM_OBS)
    check_forward(policy)
    if args.play:
        policy.sync(common.load_weights(policy.model, args.play))
    elif not learn(policy, args):
        return 1
    common.test(ENV, functools.partial(play_episode, policy), NAME, args)
    return 0


def check_forward(policy):
    """End the program if Policy.forward and the policy's model are two different networks."""
    def predict(weights, x):
        policy.sync(weights)
        return policy.forward(x)
    common.check_same(policy.model, predict)
    policy.sync(policy.model.get_weights())


def play_episode(policy, env):
    """Play an episode, always by the more probable action, and return its steps."""
    env = StackEnv(env)
    o = env.reset()
    steps = 0
    done = False
    while not done:
        p, _ = policy.forward(o)
        o, _, done = env.step(int(p.argmax()))
        steps += 1
    return steps


def follow(pipes, global_weights, shared_t, policy, run, max_episodes):
    """Record the episodes of all processes until one has learned or has ended."""
    last_tens = {process: common.LastTen() for process in pipes}
    for n, (process, kind, content) in enumerate(receive(pipes)):
        if n == 0:
            run.started = time.perf_counter()   # the first one is ready: starting does not count
        run.steps = shared_t[0]
        if kind == "episode":
            policy.sync(global_weights)
            last_ten = last_tens[process]
            last_ten.add(content, policy.weights)
            run.record(process.name, content, last_ten.mean)
            if last_ten.meets_rule(LIMIT):
                run.is_learned = True
                policy.sync(last_ten.mean_of_weights())
            if run.is_learned or len(run.history) == max_episodes:
                return
        if kind == "end":
            if content:
                print(f"error: {process.name} {content}", file=sys.stderr, flush=True)
            return


def receive(pipes):
    """Yield (process, kind, content) for each message, and for each process that has ended."""
    while True:
        ready = connection.wait([*pipes.values(), *[process.sentinel for process in pipes]])
        for process, messages in pipes.items():
            if messages in ready:
                try:
                    yield process, *messages.recv()
                except (EOFError, OSError):
                    yield process, "end", explain_end(process)
            elif process.sentinel in ready:
                yield process, "end", explain_end(process)


def explain_end(process):
    """Say why a process has ended. Return None if all EPOCH steps were made."""
    process.join()
    if process.exitcode < 0:
        return f"was killed by signal {-process.exitcode}"
    if process.exitcode > 0:
        return (f"ended with exit status {process.exitcode}. (If a script calls main, it must do so"
                ' below `if __name__ == "__main__":`, because each process runs the script, too.)')
    return None


if __name__ == "__main__":
    common.run_program(main)
