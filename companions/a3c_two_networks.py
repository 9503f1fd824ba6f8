"""A3C with two networks, an actor and a critic, that four threads share without copies.

The post 「Keras深度强化学习--A3C实现」 (xiaochus, jianshu.com) for today's libraries; the paper
is Mnih et al., https://arxiv.org/abs/1602.01783; README.md lists the differences. Look at `Agent`:
it has no weights of its own, acts on the shared actor as it is now, and changes both networks.
Shapes in comments: T steps of an episode, W weights in both networks (1082), all in one vector θ.
"""
import functools
import os
import queue
import random
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # to run it by its path too
import a3c_cartpole as base  # isort: skip  (before Keras, which it sets up)
import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

ENV, LIMIT = "CartPole-v0", 200     # an episode ends after so many steps at the latest
NUM_STATES = 4          # position (m), velocity (m/s) of the cart; angle (rad), rad/s of the pole
GAMMA = .95             # γ, discount of a reward, per step
ACTOR_LR, CRITIC_LR = 1e-3, 1e-2    # step sizes of the two Adams: the critic must keep up
BETA_1, BETA_2, EPSILON = .9, .999, 1e-7    # of both Adams, as Keras has them
ENTROPY = .01           # weight of the entropy, which keeps the policy from settling too early
EPISODES = 2000         # of all threads together
N_THREAD, UPDATE_ITER = 4, 10   # threads; steps of each between two of its updates


class A3C:
    """The networks, and all that threads share. Post: 「A3C」."""

    def __init__(self, seed=None, log=False):
        self.seed, self.log = seed, log
        self.lock = threading.Lock()    # to change what follows; θ is replaced, so read without it
        self.updates, self.steps, self.history, self.failed = 0, 0, [], []
        self.stop, self.learned, self.started = threading.Event(), False, time.perf_counter()
        self._build_model()
        self._build_optimizer()

    def _build_actor(self, dense):
        """State (T, 4) → probability of a push to the right (T, 1)."""
        x = dense(20, "relu")(dense(20, "relu")(self.inputs))
        return keras.Model(self.inputs, dense(1, "sigmoid")(x), name="actor")

    def _build_critic(self, dense):
        """State (T, 4) → its value V, the discounted reward to come (T, 1)."""
        x = dense(20, "relu")(dense(20, "relu")(self.inputs))
        return keras.Model(self.inputs, dense(1, "linear")(x), name="critic")

    def _build_model(self):
        """Define both networks, and join their weights in θ."""
        glorot = keras.initializers.GlorotUniform(keras.random.SeedGenerator(self.seed))
        dense = functools.partial(keras.layers.Dense, kernel_initializer=glorot)
        self.inputs = keras.Input((NUM_STATES,))
        self.models = self._build_actor(dense), self._build_critic(dense)
        self.both = keras.Model(self.inputs, [model(self.inputs) for model in self.models])
        weights = [weight for model in self.models for weight in model.get_weights()]
        ends = np.cumsum([0] + [weight.size for weight in weights])
        self.places = [(slice(a, b), w.shape) for a, b, w in zip(ends, ends[1:], weights)]
        self.put(np.concatenate([weight.ravel() for weight in weights]))
        self.m = self.v = tf.zeros(len(self.theta))     # Adam's means of gradients and squares

    def put(self, theta):
        """Make θ (W,) the weights by which all threads go from now on."""
        self.theta, self.weights = theta, self.unpack(theta)

    def unpack(self, theta, reshape=np.ndarray.reshape):
        """Cut θ (W,) into kernels and biases, six of the actor and six of the critic."""
        return [reshape(theta[place], shape) for place, shape in self.places]

    def actor(self, s):
        """Probability of a push to the right: s (4,) → (1,); NumPy takes 9 µs, Keras 1600."""
        return .5 + .5 * np.tanh(.5 * self.forward(self.weights[:6], s))    # the sigmoid

    def forward(self, weights, s):
        """Output of a network before its last activation, in NumPy: s (4,) → (1,)."""
        k1, b1, k2, b2, k3, b3 = weights
        return np.maximum(np.maximum(s @ k1 + b1, 0) @ k2 + b2, 0) @ k3 + b3

    def losses(self, p, value, a, r):
        """Loss of the actor and of the critic, from p, V, a and R, all (T, 1). Paper, section 4."""
        advantage, cross_entropy = r - value, keras.ops.binary_crossentropy     # no log of 0 in it
        surprise, entropy = cross_entropy(a, p), cross_entropy(p, p)    # −log π(a|s), and its mean
        return surprise * tf.stop_gradient(advantage) - ENTROPY * entropy, advantage ** 2

    def _build_optimizer(self):
        """Compile a step of both Adams, before any thread starts: tracing there races."""
        rates = np.repeat([ACTOR_LR, CRITIC_LR], [model.count_params() for model in self.models])
        def update(batch, theta, m, v, t):      # (LIMIT, 7), three of (W,), () → the three
            s, a, r, share = tf.split(batch, [NUM_STATES, 1, 1, 1], 1)  # 1/T, 0 for a row left over
            with tf.GradientTape() as tape:
                tape.watch(theta)
                (p, value), _ = self.both.stateless_call(self.unpack(theta, tf.reshape), [], s)
                losses = sum(self.losses(p, value, a, r)) * share       # no weight is in both
            g = tape.gradient(losses, theta)        # of their sum
            m, v = BETA_1 * m + (1 - BETA_1) * g, BETA_2 * v + (1 - BETA_2) * g ** 2
            step_sizes = rates * tf.sqrt(1 - BETA_2 ** t) / (1 - BETA_1 ** t)
            return theta - step_sizes * m / (tf.sqrt(v) + EPSILON), m, v

        example = [tf.ones([LIMIT, NUM_STATES + 3]), *[tf.zeros(len(self.theta))] * 3, tf.ones([])]
        graph = tf.function(update, jit_compile=True, autograph=False)
        self.optimizer = graph.get_concrete_function(*example)  # 100 µs a call faster than `graph`
        self.optimizer(*example)                                # XLA compiles at the first call

    def train(self, episode, n_thread, update_iter):
        """Learn by threads until one meets the rule, or for `episode` episodes of all together."""
        self.episode, self.started = episode, time.perf_counter()
        agents = [Agent(i, self, update_iter) for i in range(n_thread)]
        if self.seed is not None:       # taking turns, they repeat to the last bit
            for agent, following in zip(agents, agents[1:] + agents[:1]):
                agent.following = following.turn
            for agent in agents[1:]:
                agent.turn.get()
        base.run_threads({agent.name: agent.run for agent in agents}, self.stop, self.failed)

    def load(self, path):
        """Take the actor from a file, or exit with status 2; who only plays needs no critic."""
        self.weights[:6] = base.load_weights(self.models[0], path).get_weights()

    def save(self, run):
        """Let a Run write both networks, the history and the learning curve."""
        self.both.set_weights(self.weights)
        models = {model.name: model for model in self.models}
        run.keep(models, self.learned, self.history, LIMIT, f"A3C with two networks on {ENV}")

    def play(self, env):
        """Play an episode, to the right where that is likelier than not, and return its steps."""
        (state, _), step, done = env.reset(), 0, False
        while not done:
            state, _, terminated, truncated, _ = env.step(int(self.actor(state)[0] > .5))
            step, done = step + 1, terminated or truncated
        return step


class Agent(threading.Thread):
    """A thread with a CartPole of its own; the networks are those of all. Post: 「Agent」."""

    def __init__(self, index, a3c, update_iter):
        super().__init__(name=f"thread{index}")
        self.a3c, self.update_iter = a3c, update_iter
        self.random = random.Random(None if a3c.seed is None else f"{a3c.seed} {index}")
        self.env = gym.make(ENV, disable_env_checker=True)
        self.env.reset(seed=self.random.getrandbits(31))
        self.lengths, self.thetas = [], []      # steps of its episodes, and θ at the end of each
        self.turn = self.following = queue.SimpleQueue()    # see train; alone, it is always its
        self.turn.put("your turn")

    def run(self):
        """Play and update until learning is over, or end it by failing."""
        try:
            self.turn.get()
            while not self.a3c.stop.is_set():
                self.run_episode()
        finally:
            self.a3c.stop.set()
            self.following.put("your turn")
            self.env.close()

    def run_episode(self):
        """Play an episode; every `update_iter` steps and at its end, update and pass the turn."""
        a3c, states, actions, rewards, done = self.a3c, [], [], [], False
        state, _ = self.env.reset()
        while not done:
            states.append(state)
            actions.append(int(self.random.random() < a3c.actor(state)[0]))
            state, reward, terminated, truncated, _ = self.env.step(actions[-1])
            rewards.append(reward)
            done = terminated or truncated
            if done or len(rewards) % self.update_iter == 0:
                with a3c.lock:
                    if a3c.stop.is_set():
                        return
                    self.train_episode(states, actions, rewards, state, done)
                    if done:
                        self.finish_episode(len(rewards))
                self.following.put("your turn")
                self.turn.get()

    def finish_episode(self, step):
        """Record an episode; who meets the rule hands over the mean of the θ of its last ten."""
        a3c, seconds = self.a3c, round(time.perf_counter() - self.a3c.started, 3)
        a3c.steps += step
        self.lengths.append(step)
        self.thetas.append(a3c.theta)
        mean, count = sum(self.lengths[-10:]) / 10, len(self.lengths)
        a3c.learned = mean > LIMIT - 1
        a3c.history.append(base.Episode(self.name, count, step, mean, a3c.steps, seconds))
        if a3c.log:
            base.say_episode(a3c.history[-1])
        if a3c.learned:
            a3c.put(np.mean(self.thetas[-10:], axis=0))
        if a3c.learned or len(a3c.history) >= a3c.episode:
            a3c.stop.set()

    def discount_reward(self, rewards, next_state, done):
        """Returns (T,) of rewards (T,): R = r + γ·R', the last R' is V(next_state), 0 if done."""
        cumulative = 0. if done else self.a3c.forward(self.a3c.weights[6:], next_state)[0]
        discount_rewards = np.zeros(len(rewards))
        for i in reversed(range(len(rewards))):
            discount_rewards[i] = cumulative = rewards[i] + GAMMA * cumulative
        return discount_rewards

    def train_episode(self, states, actions, rewards, next_state, done):
        """Take a step of both Adams by an episode so far; FloatingPointError if θ became NaN."""
        a3c, T, t = self.a3c, len(states), self.a3c.updates + 1
        R = self.discount_reward(rewards, next_state, done)
        batch = np.zeros((LIMIT, NUM_STATES + 3), np.float32)
        batch[:T] = np.column_stack([states, actions, R, np.full(T, 1 / T)])
        theta, m, v = a3c.optimizer(
            tf.constant(batch), tf.constant(a3c.theta), a3c.m, a3c.v, tf.constant(float(t)))
        if not np.isfinite(theta.numpy()).all():
            raise FloatingPointError(f"a weight is not finite at update {t}")
        a3c.put(theta.numpy())
        a3c.m, a3c.v, a3c.updates = m, v, t


def main(argv=None):
    """Learn, keep what was learned, play with it; return the exit status."""
    args = base.parse_arguments(
        argv, "Learn CartPole with A3C of two networks, then film it.", "movie/a3c_two_networks",
        ("--episodes", dict(type=base.from_1, default=EPISODES, help="of all, at the most")))
    os.environ.update(TF_NUM_INTEROP_THREADS="1", TF_NUM_INTRAOP_THREADS="1")   # update −30 %
    run = base.Run(args.out)
    a3c = A3C(args.seed, args.log)
    if args.play:
        a3c.load(args.play)
    else:
        try:
            with base.live_table(a3c.history, LIMIT, lambda: f"{a3c.updates} updates", a3c.log):
                a3c.train(args.episodes, N_THREAD, UPDATE_ITER)
        finally:
            base.say(base.summary(a3c.learned, time.perf_counter() - a3c.started, a3c.steps,
                                  len(a3c.history), N_THREAD, args.episodes, a3c.failed))
            a3c.save(run)
    if args.play or a3c.learned:
        with run.attempt("test"):
            env = gym.make(ENV, render_mode="rgb_array", disable_env_checker=True)
            env.reset(seed=args.seed)
            with base.film(env, args.out, "A3C", args.render) as env:
                base.play(lambda: a3c.play(env), args.test_episodes, "test")
    return 0 if (args.play or a3c.learned) and not (a3c.failed or run.lost) else 1


if __name__ == "__main__":
    sys.exit(main())
