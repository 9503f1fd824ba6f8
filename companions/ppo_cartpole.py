"""PPO on CartPole, policy and value in one network: Keras and TensorFlow, on the CPU.

The program of the post 「PPOの実装(ネットワーク共有版)」 (tsubame-mz, blog 「雨宿り」; its code is
RL/ppo.py in https://github.com/tsubame-mz/machine_learning) for today's libraries; README.md lists
the differences. "The paper" is Schulman et al., https://arxiv.org/abs/1707.06347, "GAE" is
https://arxiv.org/abs/1506.02438. `python -m companions.ppo_cartpole` learns, then films; look at
`Memory.finish_path`, what each action was worth, and `Agent.losses`, how far PPO goes for it.
Shapes in comments: T steps in an episode, W weights in the network (4675), all in one vector θ."""
import contextlib
import functools
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # to run it by its path too
import a3c_cartpole as base  # noqa: I001   before Keras and TensorFlow, which it sets up
import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

ENV, LIMIT = "CartPole-v0", 200     # an episode ends after so many steps at the latest
NUM_STATES, NUM_ACTIONS = 4, 2      # cart's position (m), m/s, pole's angle (rad), rad/s; 1: right
EPISODES = 500          # to learn in
GOOD_STEPS = 195        # from here on an episode ends with the reward 1, before with -1
HID_NUM, DROPRATE = 64, .2      # units of a shared layer, share that dropout leaves out of it
GAMMA, LAM = .99, .95   # γ, discount of a reward, a step; λ of GAE, 0 looks only one step ahead
ADV_EPS = 1e-6          # keeps the standardised advantage finite
TRAIN_ITERS = 80        # iterations (steps of Adam) on one episode, at the most
CLIP_RATIO = .2         # ε of the paper: a ratio beyond 1 ± ε earns nothing more
V_LOSS_C = .9           # weight of the value loss
ENT_C = 1e-3            # weight of the entropy, which keeps the policy from settling too early
MAX_GAIN = 1.5 * .01    # rise of an episode's mean log π(a|s) above which its iterations end
LEARNING_RATE = 1e-4    # step size of Adam, and what else it takes, as in PyTorch:
BETA_1, BETA_2, ADAM_EPS = .9, .999, 1e-8
# what an update is given: state, one-hot action, log π, return, advantage, 1 (0 only fills up)
COLUMNS = [NUM_STATES, NUM_ACTIONS, 1, 1, 1, 1]


class Dropout(keras.layers.Dropout):
    """Keras' own, by random numbers that only XLA knows, and draws in 0.04 ms in place of 0.4."""
    def call(self, inputs, training=False):
        if not (training and self.rate):
            return inputs
        drop = tf.nn.experimental.stateless_dropout
        return drop(inputs, self.rate, self.seed_generator.next(), rng_alg="threefry")


class PVNet(keras.Model):
    """State (T, 4) → two shared layers → π of the actions (T, 2), value (T, 1); 「学習モデル」."""

    def __init__(self, seed=None, droprate=DROPRATE):
        xavier_normal = keras.initializers.VarianceScaling(     # GlorotNormal would be truncated
            1., "fan_avg", "untruncated_normal", seed=keras.random.SeedGenerator(seed))
        dense = functools.partial(keras.layers.Dense, kernel_initializer=xavier_normal)
        dropout = Dropout(droprate, seed=seed)      # one for both layers: each call draws anew
        state = h = keras.Input((NUM_STATES,), name="state")
        for name in "layer1", "layer2":
            h = dropout(dense(HID_NUM, "relu", name=name)(h))
        pi, value = dense(NUM_ACTIONS, "softmax", name="policy")(h), dense(1, name="value")(h)
        super().__init__(state, [pi, value], name="PPO")


class Memory:
    """The steps of one episode, and what they were worth. Post: 「Memory」."""

    def __init__(self):
        self.steps, self.return_lst, self.advantage_lst = [], None, None

    def add(self, state, action, reward, value, log_pi):
        """Remember a step: a state (4,), an action 0 or 1, and three numbers."""
        self.steps.append((state, action, reward, value, log_pi))

    def finish_path(self, gamma=GAMMA, lam=LAM):
        """Work out each step's return and advantage, (T,) both. Post: 「finish_path()」.

        R(t) = r(t) + γ·R(t+1). A(t) = δ(t) + γλ·A(t+1), where δ(t) = r(t) + γ·V(t+1) - V(t) is how
        much better a step went than foretold (GAE, equation 16). Behind the last step all are 0."""
        self.return_lst, self.advantage_lst = np.zeros((2, len(self.steps)))
        last_return = last_advantage = next_value = 0.
        for t, (_, _, reward, value, _) in reversed(list(enumerate(self.steps))):
            self.return_lst[t] = last_return = reward + gamma * last_return
            delta = reward + gamma * next_value - value
            self.advantage_lst[t] = last_advantage = delta + gamma * lam * last_advantage
            next_value = value

    def get_batch(self):
        """Return the episode as rows (LIMIT, 10), advantages standardised, 0 behind; forget it."""
        T, (state, action, _, _, log_pi) = len(self.steps), zip(*self.steps)
        advantage = self.advantage_lst - self.advantage_lst.mean()
        advantage /= advantage.std(ddof=1) + ADV_EPS
        batch = np.zeros((LIMIT, sum(COLUMNS)), np.float32)     # of one size: compiled only once
        batch[:T] = np.column_stack([state, np.eye(NUM_ACTIONS)[list(action)], log_pi,
                                     self.return_lst, advantage, np.ones(T)])
        self.steps.clear()
        return batch


def adam(theta, moments, t, gradient):
    """Step t, from 1, of Adam (arXiv 1412.6980): θ, gradient (W,), moments (2, W) → θ, moments."""
    first = BETA_1 * moments[0] + (1 - BETA_1) * gradient
    second = BETA_2 * moments[1] + (1 - BETA_2) * gradient ** 2
    rate = LEARNING_RATE * tf.sqrt(1 - BETA_2 ** t) / (1 - BETA_1 ** t)
    return theta - rate * first / (tf.sqrt(second) + ADAM_EPS), tf.stack([first, second])


class Agent:
    """Chooses the actions, and learns from the episodes they make. Post: 「Agent」.

    `theta` (W,): the weights, replaced by an update and never written to; `model` only has their
    first values. `iterations`: steps of Adam so far. `seed`: of the actions, None: any."""

    def __init__(self, model, seed=None):
        self.model, self.iterations = model, 0
        self.random = random.Random(None if seed is None else f"{seed} agent")
        weights = model.get_weights()
        ends = np.cumsum([0] + [weight.size for weight in weights])
        self.places = [(slice(a, b), w.shape) for a, b, w in zip(ends, ends[1:], weights)]
        self.theta = np.concatenate([weight.ravel() for weight in weights])
        self.moments = np.zeros((2, len(self.theta)), np.float32)
        self.dropout = [variable.numpy() for variable in model.non_trainable_variables]  # its seed
        self.graph = tf.function(self._iterate, jit_compile=True, autograph=False)

    def unpack(self, theta, reshape=np.ndarray.reshape):
        """Cut a vector (W,) into kernels and biases, in the model's order."""
        return [reshape(theta[place], shape) for place, shape in self.places]

    def get_action(self, state, *, greedy=False):
        """An action for a state (4,), by π or the likeliest, its value and log π; in NumPy."""
        *hidden, p_kernel, p_bias, v_kernel, v_bias = self.unpack(self.theta)
        for kernel, bias in zip(hidden[::2], hidden[1::2]):
            state = np.maximum(state @ kernel + bias, 0)
        z = state @ p_kernel + p_bias
        log_pi = z - np.logaddexp.reduce(z, dtype=float)
        action = int(z.argmax()) if greedy else self.random.choices((0, 1), np.exp(log_pi))[0]
        return action, float((state @ v_kernel + v_bias)[0]), float(log_pi[action])

    @staticmethod
    def losses(pi, value, batch):
        """π (T, 2), value (T, 1), rows (T, 10) → losses of policy, value, entropy; and the gain.

        The ratio π/π_old times the advantage shall be large, but beyond the clip earns nothing
        more: paper, equation 7. The gain, the mean of log π - log π_old, is the post's "KL", which
        it is not: minus the gain would be an estimate of KL(π_old, π)."""
        _, action, old_log_pi, returns, advantage, is_step = tf.split(batch, COLUMNS, axis=1)
        share = is_step / tf.reduce_sum(is_step)        # of each row in a mean
        log_pi = tf.math.log(pi + 1e-10)
        log_ratio = tf.reduce_sum(log_pi * action, axis=1, keepdims=True) - old_log_pi
        clip_adv = tf.where(advantage >= 0, 1 + CLIP_RATIO, 1 - CLIP_RATIO) * advantage
        pi_loss = -tf.reduce_sum(share * tf.minimum(tf.exp(log_ratio) * advantage, clip_adv))
        v_loss = V_LOSS_C * tf.reduce_sum(share * (returns - value) ** 2)
        entropy = -ENT_C * tf.reduce_sum(share * -pi * log_pi)      # to be large: so the minus
        return pi_loss, v_loss, entropy, tf.reduce_sum(share * log_ratio)

    def _iterate(self, batch, theta, moments, iterations, dropout):
        def iteration(i, _gain, theta, moments, dropout):
            with tf.GradientTape() as tape:
                tape.watch(theta)
                (pi, value), dropout = self.model.stateless_call(
                    self.unpack(theta, tf.reshape), dropout, batch[:, :NUM_STATES], training=True)
                *losses, gain = self.losses(pi, value, batch)
            gradient = tape.gradient(losses, theta)   # of their sum
            return i + 1, gain, *adam(theta, moments, iterations + i + 1, gradient), dropout

        return tf.while_loop(lambda i, gain, *_: (i < TRAIN_ITERS) & (gain <= MAX_GAIN),
                             iteration, [0., 0., theta, moments, dropout])

    def update(self, batch):
        """Learn from the rows (LIMIT, 10) of an episode. Post: 「update()」.

        Raises FloatingPointError, and leaves θ as it was, if a weight were not finite."""
        i, _, theta, self.moments, self.dropout = self.graph(
            batch, self.theta, self.moments, tf.constant(self.iterations, tf.float32), self.dropout)
        self.iterations += int(i)
        if not np.isfinite(theta).all():
            raise FloatingPointError(f"a weight is not finite, iteration {self.iterations}")
        self.theta = theta.numpy()


def reward_modify(step, done):
    """Reward of an episode's step, counted from 1: 0, but at the end 1 or -1."""
    return 0. if not done else 1. if step >= GOOD_STEPS else -1.


def run_episode(env, agent, memory=None):
    """Play an episode, sampled into a memory or greedily without; return its steps."""
    state, step, done = env.reset()[0], 0, False
    while not done:
        action, value, log_pi = agent.get_action(state, greedy=memory is None)
        next_state, _, terminated, truncated, _ = env.step(action)
        step, done = step + 1, terminated or truncated
        if memory is not None:
            memory.add(state, action, reward_modify(step, done), value, log_pi)
        state = next_state
    return step


def learn(agent, args, run):
    """Play and learn in turns; True if the last ten episodes met the rule. Post: 「学習ループ」."""
    env, memory, history = gym.make(ENV, disable_env_checker=True), Memory(), []
    env.reset(seed=agent.random.getrandbits(31))
    last, thetas, total, learned, started = [0] * 10, [], 0, False, time.perf_counter()
    try:
        with run.attempt("PPO"), base.live_table(
                history, LIMIT, lambda: f"{agent.iterations} iterations", args.log):
            while not learned and len(history) < args.episodes:
                thetas = [*thetas[-9:], agent.theta]
                last = [*last[1:], run_episode(env, agent, memory)]     # steps of the last ten
                total, seconds = total + last[-1], round(time.perf_counter() - started, 3)
                history.append(base.Episode(
                    "PPO", len(history) + 1, last[-1], np.mean(last), total, seconds))
                if args.log:
                    base.say_episode(history[-1])
                learned = bool(np.mean(last) > LIMIT - 1)
                memory.finish_path()
                agent.update(memory.get_batch())
        if learned:     # the rule looks at ten episodes: hand over the mean of the θ they had
            agent.theta = np.mean(thetas, axis=0)
    finally:
        seconds = time.perf_counter() - started
        base.say(base.summary(learned, seconds, total, len(history), 1, args.episodes, run.lost))
        agent.model.set_weights(agent.unpack(agent.theta))
        run.keep({"PPO": agent.model}, learned, history, LIMIT, f"PPO on {ENV}")
    return learned


def main(argv=None):
    """Learn, then test and film what was learned; return the exit status."""
    args = base.parse_arguments(
        argv, "Learn CartPole with PPO, then film what was learned.", "movie/ppo_cartpole",
        ("--episodes", dict(default=EPISODES, type=base.from_1, help="to learn in, at the most")))
    with contextlib.suppress(RuntimeError):     # a host that has started TensorFlow keeps its own
        tf.config.threading.set_intra_op_parallelism_threads(1)     # 0.22 ms an iteration, not 0.32
    run = base.Run(args.out)
    model = PVNet(args.seed)
    agent = Agent(base.load_weights(model, args.play) if args.play else model, args.seed)
    learned = bool(args.play) or learn(agent, args, run)
    if learned:
        with run.attempt("test"):
            env = gym.make(ENV, disable_env_checker=True, render_mode="rgb_array")
            env.reset(seed=agent.random.getrandbits(31))
            with base.film(env, args.out, "PPO", args.render) as env:
                base.play(lambda: run_episode(env, agent), args.test_episodes, "PPO")
    return 0 if learned and not run.lost else 1


if __name__ == "__main__":
    sys.exit(main())
