"""A3C on CartPole, complete in this one file: Keras, TensorFlow and threads, on the CPU.

A3C is Asynchronous Advantage Actor-Critic. Eight threads each play a CartPole of their own, with a
copy θ' of one shared network θ. Every few steps a thread computes how the weights should change (a
gradient) and hands this gradient to the parameter server, which changes θ. Then the thread copies
θ again and plays on. No thread waits until another has played its steps (except with --seed).

    python a3c_cartpole.py      # learns in some seconds; then look at movie/A3C/three_as.png
    uv run a3c_cartpole.py      # the same, but installs what it needs first

Why several threads? Successive steps of one game are alike, and a network that learns from them
alone may go astray. DQN mixes old steps from a replay memory. A3C mixes the fresh steps of several
games instead, so it needs no such memory, and as the steps of a game stay in order it could use an
LSTM. In Python the threads bring variety, not speed: the interpreter runs one of them at a time.

This is the program of an article by Sugulu (2017),
「実装しながら学ぶA3C【CartPoleで棒立て:1ファイルで完結】」
(https://qiita.com/sugulu/items/acbc909dd9b74b043e45), brought up to today's libraries. "The paper"
is Mnih et al., 2016, https://arxiv.org/abs/1602.01783. The classes stand in the order of the
article's complete listing; its text explains them in the order main, WorkerThread, Environment,
Agent, ParameterServer, LocalBrain. All of A3C stands above the line "Not needed to understand A3C".

Symbols
s, a, r           state, action, reward
θ, θ'             all weights of the shared network (never the angle of the pole); a thread's copy
p, V(s)           what the network says: the probability of each action, and the value of s, the
                  discounted sum of the rewards that it expects from s on
R_n, R            the discounted sum of n rewards; the same with γⁿ·V(s') added
s', in code s_    a later state: one step after s in Environment, n steps after s in a sample
B, W              in shapes: rows of a batch, weights of the network (131)

To understand     read
Advantage         the constants of Advantage, Agent.advantage_push_local_brain, LocalBrain.gradient
Actor-Critic      ParameterServer._build_model, Agent.act, LocalBrain.loss_total
Asynchronous      the function learn(), where the threads start; Environment.run,
                  LocalBrain.update_parameter_server, ParameterServer.apply_gradient. The numbers
                  1. to 9. in comments are those of the article's list in 「Asynchronous」.
At first, skip model(), pack(), unpack(), network() and _build_graph().

To change         touch                               and mind that
the network       HIDDEN, _build_model, predict_p     Dense layers only; the two must agree, the
                                                      program checks it
the reward        Environment.reward                  LEARNING_RATE and LOSS_V suit a V from -1 to 1
n                 N_STEP_RETURN                       any n works; some samples may wait (MIN_BATCH)
the threads       --workers                           it is more variety, not more speed
the optimizer     apply_gradient, mean_square         make new arrays, never change one by -=
the stop rule     Environment.finish_episode          it also decides what is handed over
the game          the constants of Game, the reward   --env and three_as.png know only CartPole
a large network   the settings before the imports     they allow one core and no GPU
the time limit    Environment.run                     it counts as an end, as in the article

What differs from the article, and is needed to read the code:
- All weights of the network are one vector. One Keras model gives the structure of the network; a
  thread's copy is only such a vector, where the article has a Keras model for each thread.
- tf.GradientTape replaces tf.gradients. RMSProp is written out, with TensorFlow 1's numbers, and
  done under a lock, which neither article nor paper has: so no update is lost.
- The n rewards are summed directly, where the article corrects the sum of the step before.
- Threads compute p in NumPy, which is faster for a single state than Keras.
What the article has wrong (README.md says more):
- In an episode of m < n steps its sum is wrong: a reward of -1 at the end counts too little, by the
  factor γ^(n-m). With n = 5 this does not happen in CartPole. `lambda: worker.run()` may start one
  worker twice. `is 'test'` compares identities, not texts. Its text prints γ·r(t) where γ·r(t+1) is
  meant.
What is added for convenience:
- The program ends by itself. The winner hands over the mean of ten θ', not its last θ'. The test
  takes the most probable action, lasts ten episodes, and runs in the main thread. Weights, history
  and pictures are saved. With --seed the threads take turns, so that a run can be repeated.
"""
import argparse
import collections
import contextlib
import csv
import ctypes
import functools
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

# Settings that must be made before the imports below.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"               # a network this small is no faster on a GPU
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")      # no start-up messages
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")     # no notice about oneDNN
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")    # TensorFlow's own threads would only
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")    # slow ours down

import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

# -- constants of Game
ENV = "CartPole-v0"
NUM_STATES = 4          # cart position, cart velocity, pole angle, pole angular velocity
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right (article: right, left)
NONE_STATE = np.zeros(NUM_STATES)       # stands for s' when the episode has ended
ONE_HOT = np.eye(NUM_ACTIONS)           # row a is the one-hot form of action a

# -- constants of LocalBrain
HIDDEN = 16             # units of the hidden layer
MIN_BATCH = 5           # an update needs so many samples, see update_parameter_server
LOSS_V = .5             # coefficient of the value loss
LOSS_ENTROPY = .01      # coefficient of the entropy, which keeps the policy from settling too early
LEARNING_RATE = 5e-3
RMSPROP_DECAY = .99     # how much of its mean of squared gradients RMSProp keeps at each update

# -- constants of Advantage, the Bellman equation
# V(s) is the discounted sum of the rewards after the state s (割引総報酬), on average over what may
# happen if actions are drawn from the present p. The network learns V by moving V(s) towards R, a
# better estimate, the n-step return:
#   n = 1:  R = r(t) + γ·V(s(t+1))                  as in Q-learning, which has max Q in place of V
#   n = 2:  R = r(t) + γ·r(t+1) + γ²·V(s(t+2))
# At the end of an episode no V follows, so there R is exact. V becomes right near the end first,
# and each update carries this up to n steps back. With n = 1 this is slow, and R relies on a V that
# is still wrong. With n = 50, R depends on chance (ばらつき), on 50 actions drawn at random.
# The article calls looking n steps ahead "Advantage". Elsewhere the word means only the variable
# `advantage`, the article's A(t) = R - V(s): how much better it went than expected.
GAMMA = .99             # γ: a reward k steps ahead counts γ^k
N_STEP_RETURN = 5       # n
GAMMA_N = GAMMA ** N_STEP_RETURN

# -- constants of the threads
# Threads bring variety, not speed. With --seed 1 to 5 and --workers 1, 2 and 8, two cores made
# 12 800, 12 400 and 12 600 steps per second, and one thread had learned after 427, 494 and 733
# episodes of all (medians). CartPole is so small that one thread is enough; and while one of eight
# plays its last ten episodes, the others play some seventy, through which θ must stay good.
N_WORKERS = 8           # learning threads
T_MAX = 10              # steps between two updates of a thread; article: Tmax, paper: t_max

# -- constants of ε-greedy (ε-greedy法), which the article adds to A3C: with probability ε an action
# is random, whatever p says. It enters the loss as if drawn from p, which is not quite right; this
# passes, as ε falls to 0.
EPS_START = .5
EPS_END = 0.
EPS_STEPS = 200 * N_WORKERS     # steps of all threads together until ε is EPS_END, 200 of each


class ParameterServer:
    """The network that all threads share, and the optimizer that changes it.

    Article: 「ParameterServer」, and Fig. 2 in 「Asynchronous」. Paper: the shared θ and T. The
    server is no thread and no other computer. It is an object in memory, and each worker runs its
    methods in its own thread.

    Each update makes a new array θ and never changes the old one (上書きしない). So a thread that
    reads θ at the same moment gets either the old weights or the new ones, never a mixture.
    """

    def __init__(self, env=ENV, seed=None, max_episodes=20_000, n_workers=N_WORKERS):
        self.keras_model = self._build_model(seed)      # only its structure is used while learning
        weights = self.keras_model.get_weights()        # a list: kernel, bias, kernel, bias, ...
        self.shapes = [weight.shape for weight in weights]
        self.theta = self.pack(weights)                 # θ (W,)
        # RMSProp's running mean of squared gradients (W,). It starts at 1, as in TensorFlow 1, so
        # that the first updates are small.
        self.mean_square = np.ones_like(self.theta)
        self.update_lock = threading.Lock()
        self.updates = 0                                # how often θ has changed
        self.frames = 0                                 # steps of all learning threads; paper: T
        self.eps_steps = EPS_STEPS * n_workers / N_WORKERS      # 200 of each thread, too
        self.is_learned = False
        # The history of episodes, their limit of steps, and `stop`, a flag that all threads see:
        # learning is over.
        self.progress = Progress(env, max_episodes)
        self.seed = seed                                # not in the article, as is the next line
        self.staleness = []                             # of each update: see apply_gradient

    @staticmethod
    def _build_model(seed):
        """Define the network of the article's Fig. 1: s (B, 4) → p of each action (B, 2), V (B, 1).

        The actor is the output p, the critic is the output V. They share the hidden layer. Softmax
        makes p(left) + p(right) = 1. LocalBrain.predict_p computes the same p in NumPy: change both
        together.
        """
        if seed is not None:
            keras.utils.set_random_seed(seed)
        l_input = keras.Input((NUM_STATES,), name="state")
        l_dense = keras.layers.Dense(HIDDEN, activation="relu", name="hidden")(l_input)
        out_actions = keras.layers.Dense(NUM_ACTIONS, activation="softmax", name="policy")(l_dense)
        out_value = keras.layers.Dense(1, activation="linear", name="value")(l_dense)
        return keras.Model(l_input, [out_actions, out_value], name="A3C")

    @property
    def model(self):
        """The Keras model with the weights θ as they are now. Changing it does not change θ."""
        self.keras_model.set_weights(self.unpack(self.theta))
        return self.keras_model

    def pack(self, weights):
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

    def network(self, theta, s):
        """Compute p (B, 2) and V (B, 1) in the states s (B, 4) with the weights θ (W,).

        All are tensors. Keras calls a model "stateless" if the weights come from outside.
        """
        parts = tf.split(theta, [math.prod(shape) for shape in self.shapes])
        weights = [tf.reshape(part, shape) for part, shape in zip(parts, self.shapes)]
        outputs, _ = self.keras_model.stateless_call(weights, [], s)
        return outputs

    def apply_gradient(self, gradient, updates_at_pull):
        """Change θ by a gradient (W,): one step of the paper's shared RMSProp (section 4).

        `updates_at_pull` says after how many updates the thread had copied the weights for which it
        computed the gradient. Raises FloatingPointError if the gradient is not finite.
        """
        # Python may switch threads at any moment. Without a lock, two threads could both read the
        # old θ, and the one that stores its result last would erase the change of the other. So
        # only one thread at a time may enter here (排他制御).
        with self.update_lock:
            # Not in the article: once learning is over, θ is final.
            if self.progress.stop.is_set():
                return
            if not np.isfinite(gradient).all():
                raise FloatingPointError(f"the gradient is not finite after {self.frames} steps")

            # 8. The server changes θ. RMSProp divides the gradient of each weight by its usual
            #    size, so that all weights take steps of about the same size. This makes new arrays.
            self.mean_square = (RMSPROP_DECAY * self.mean_square
                                + (1 - RMSPROP_DECAY) * gradient ** 2)
            self.theta = self.theta - LEARNING_RATE * gradient / np.sqrt(self.mean_square + 1e-10)

            # Not in the article, for a picture: how often have other threads changed θ since this
            # thread copied it? On average seven times, as each of the other seven makes about one
            # update meanwhile, but very unevenly: see three_as.png. The gradient belongs to the old
            # θ and is used all the same. This is what asynchronous means.
            self.staleness.append(self.updates - updates_at_pull)
            self.updates += 1

    def take_over(self, theta):
        """Replace θ by the weights (W,) of the thread that has won."""
        with self.update_lock:
            self.theta = theta
            self.is_learned = True

    def count_step(self):
        """Count a step of any learning thread.

        This has a lock, too, because += reads and stores, and Python may switch threads in between.
        It is another lock, so that counting does not wait for an update.
        """
        with self.progress.lock:
            self.frames += 1


class LocalBrain:
    """A thread's copy of the network: it gives probabilities, and turns samples into gradients.

    Article: 「LocalBrain」. Paper: the thread's own θ' and its gradient dθ.
    """

    # A sample is one row of a batch (B, 12): s, a as one-hot, R_n, s', s_mask. The mask is 0 if the
    # episode ended at s', otherwise 1.
    COLUMNS = [NUM_STATES, NUM_ACTIONS, 1, NUM_STATES, 1]

    def __init__(self, name, parameter_server):
        self.name = name
        self.parameter_server = parameter_server
        self.train_queue = []       # samples: s, a, R_n, s', s_mask
        self.compute_gradient = self._build_graph(parameter_server)
        self.pull_parameter_server()

    @staticmethod
    @functools.cache        # the first brain compiles, and all others get the same function
    def _build_graph(parameter_server):
        """Compile `gradient` before the threads start: θ' (W,), batch (B, 12) → (W,)."""
        function = functools.partial(LocalBrain.gradient, parameter_server)
        theta = tf.TensorSpec(parameter_server.theta.shape)
        batch = tf.TensorSpec([None, sum(LocalBrain.COLUMNS)])      # of any number of samples
        return tf.function(function).get_concrete_function(theta, batch)

    @staticmethod
    def gradient(parameter_server, theta, batch):
        """Compute the gradient (W,) of the mean loss at the weights θ' (W,), over a batch (B, 12).

        Article: _build_graph and update_parameter_server. Paper: Algorithm S3, where each step
        looks ahead to the last step of its batch, and the loss is a sum.
        """
        s, a, R_n, s_, s_mask = tf.split(batch, LocalBrain.COLUMNS, axis=1)

        # R = r(t) + γ·r(t+1) + … + γⁿ·V(s'). The agent has summed the n rewards, R_n. V(s') stands
        # for all later ones, of which there are none if s' is the end: there s_mask is 0. Only
        # there can the sum have fewer than n rewards, so γⁿ is right wherever it counts.
        _, v_ = parameter_server.network(theta, s_)
        R = R_n + GAMMA_N * v_ * s_mask

        # The tape records what is computed inside `with`, to find the gradient of it. R is computed
        # outside, so it is a constant, as DQN's target is.
        with tf.GradientTape() as tape:
            tape.watch(theta)
            p, v = parameter_server.network(theta, s)
            loss = tf.reduce_mean(LocalBrain.loss_total(p, v, a, R))
        return tape.gradient(loss, theta)

    @staticmethod
    def loss_total(p, v, a, R):
        """The loss of each sample (B, 1): p (B, 2), V(s) (B, 1), a as one-hot (B, 2), R (B, 1).

        Article: 「Actor-Critic」. Paper: section 4, "Asynchronous advantage actor-critic".
        """
        log_prob = tf.math.log(tf.reduce_sum(p * a, axis=1, keepdims=True) + 1e-10)
        advantage = R - v       # how much better it went than the critic expected

        # The actor. The policy gradient theorem (方策勾配定理) says: increase log p(a|s)·advantage.
        # Say the cart was pushed to the right, and the critic expected V = 0.1. If R = -0.9, the
        # advantage is -1, so this push becomes less likely here. If R = 0.4, the advantage is 0.3,
        # and it becomes a little more likely. An optimizer makes a loss small, hence the minus.
        # Why not R itself? In a bad state even the best action has R < 0. What counts is whether it
        # went better than expected.
        # Why the logarithm? A rare action is drawn rarely. The slope of log p is 1/p times that of
        # p, so each of its few draws counts for more, and none gains by being drawn often.
        # Why stop_gradient? The advantage is a constant here (定数として扱う). Otherwise this loss
        # could become small by making V wrong.
        loss_policy = -log_prob * tf.stop_gradient(advantage)

        # The critic: move V(s) towards R.
        loss_value = LOSS_V * tf.square(advantage)

        # The entropy -Σ p·log p is large while the policy hesitates. Minus the entropy as a loss
        # keeps the policy from settling too early (エントロピー項).
        minus_entropy = tf.reduce_sum(p * tf.math.log(p + 1e-10), axis=1, keepdims=True)
        loss_entropy = LOSS_ENTROPY * minus_entropy
        return loss_policy + loss_value + loss_entropy

    def pull_parameter_server(self):
        """Take the weights that the server has now: θ' ← θ."""
        self.updates_at_pull = self.parameter_server.updates
        # Both names now mean one array. As no array is ever changed, this θ' stays as it is when
        # the server makes a new θ. So it serves as a copy.
        self.theta = self.parameter_server.theta

    def push_parameter_server(self):
        """Give the server these weights: θ ← θ'. Only the winner does so, at the very end."""
        self.parameter_server.take_over(self.theta)

    def update_parameter_server(self):
        """Turn the queued samples into a gradient, and hand it to the server.

        With fewer than MIN_BATCH samples nothing happens, and they wait in the queue for the next
        update. With n = 5 or 6 there are always enough. With a smaller n there may be too few at
        the end of an episode, with a larger n at its beginning.
        """
        if len(self.train_queue) < MIN_BATCH:
            return
        s, a, R_n, s_, s_mask = zip(*self.train_queue)
        batch = np.column_stack([s, a, R_n, s_, s_mask]).astype(np.float32)
        self.train_queue = []

        # 6. The thread computes the gradient, from its own samples and with its own θ'.
        gradient = self.compute_gradient(tf.constant(self.theta), tf.constant(batch)).numpy()
        # 7. It hands over the gradient, not its weights.
        self.parameter_server.apply_gradient(gradient, self.updates_at_pull)

    def predict_p(self, s):
        """The probability of each action (B, 2) in the states s (B, 4).

        In NumPy, because for one state this is more than 100 times as fast as calling the model.
        """
        hidden_kernel, hidden_bias, policy_kernel, policy_bias, _, _ = \
            self.parameter_server.unpack(self.theta)            # the last two are the critic's
        hidden = np.maximum(s @ hidden_kernel + hidden_bias, 0)         # relu
        z = hidden @ policy_kernel + policy_bias
        exp_z = np.exp(z - z.max(axis=1, keepdims=True))        # - max, so that it cannot overflow
        return exp_z / exp_z.sum(axis=1, keepdims=True)         # softmax

    def train_push(self, s, a, R_n, s_):
        """Queue a sample: s (4,), a as one-hot (2,), the sum of n rewards, s' (4,) after n steps.

        Pass None for s' if the episode has ended there.
        """
        if s_ is None:
            self.train_queue.append((s, a, R_n, NONE_STATE, 0.))
        else:
            self.train_queue.append((s, a, R_n, s_, 1.))


class Agent:
    """Chooses actions, and turns steps into samples. Article: 「Agent」 and 「Advantage」."""

    def __init__(self, name, parameter_server):
        self.parameter_server = parameter_server
        self.brain = LocalBrain(name, parameter_server)
        self.memory = collections.deque()   # s, a, r of the last steps, which wait for more rewards
        seed = parameter_server.seed
        self.rng = random.Random(None if seed is None else f"{seed} {name}")

    def epsilon(self):
        """The current probability of a random action: it falls from EPS_START to EPS_END."""
        fraction = min(1, self.parameter_server.frames / self.parameter_server.eps_steps)
        return EPS_START + fraction * (EPS_END - EPS_START)

    def act(self, s, greedy=False):
        """Choose an action in the state s (4,): any with probability ε, or else drawn from p.

        Q-learning takes the action of the largest Q. Here an action is drawn, so that all are
        tried. `greedy` is for the test and not in the article: always the most probable action.
        """
        if not greedy and self.rng.random() < self.epsilon():
            return self.rng.randrange(NUM_ACTIONS)
        p = self.brain.predict_p(s[np.newaxis])[0]
        if greedy:
            return int(p.argmax())
        return self.rng.choices(range(NUM_ACTIONS), p.tolist())[0]

    def advantage_push_local_brain(self, s, a, r, s_):
        """4. Remember a step, and hand the brain the samples whose n rewards are now known.

        R_n = r[0] + γ·r[1] + … + γ^(n-1)·r[n-1], to which the brain will add γ^n·V(s').
        At the end of the episode (終端, s_ is None) no more rewards come: the last step has 1, the
        one before has 2, and so on. With n = 5 and T_MAX = 10, in an episode of 23 steps:

            after step    samples of steps    still in the memory    then
            10            1 to 6              7 to 10                update, with 6 samples
            20            7 to 16             17 to 20               update, with 10 samples
            23            17 to 23            nothing                update, with 7 samples
        """
        self.memory.append((s, ONE_HOT[a], r))
        while len(self.memory) == N_STEP_RETURN or (s_ is None and self.memory):
            R_n = sum(GAMMA ** k * r_k for k, (_, _, r_k) in enumerate(self.memory))
            s_0, a_0, _ = self.memory.popleft()
            self.brain.train_push(s_0, a_0, R_n, s_)        # s_ is n steps after s_0, or None


class Environment:
    """A CartPole and the agent that plays it. Article: 「Environment」."""

    def __init__(self, name, thread_type, parameter_server):
        self.name = name
        self.thread_type = thread_type
        self.parameter_server = parameter_server
        self.agent = Agent(name, parameter_server)
        self.env = gym.make(parameter_server.progress.env, disable_env_checker=True,
                            render_mode="rgb_array" if thread_type == "test" else None)
        self.env.reset(seed=self.agent.rng.getrandbits(31))     # seeds all later resets
        self.total_reward_vec = np.zeros(10)            # steps of the last 10 episodes
        self.thetas = collections.deque(maxlen=10)      # θ' at the end of each of them
        self.count_trial_each_thread = 0

    def run(self):
        """Play one episode and return its steps. A learning thread learns from it on the way."""
        server = self.parameter_server
        agent = self.agent
        is_learning = self.thread_type == "learning"
        agent.brain.pull_parameter_server()                             # 1. θ' ← θ
        s, _ = self.env.reset()
        step = 0
        done = False
        while not done:
            a = agent.act(s, greedy=not is_learning)                    # 2. choose a, using θ'
            s_, _, terminated, truncated, _ = self.env.step(a)          # 3. do it, get s' and r
            step += 1
            done = terminated or truncated
            r = self.reward(s_, step, done)                             #    (not the r of gym)
            if done:
                s_ = None       # no state follows the end
            if is_learning:
                server.count_step()
                agent.advantage_push_local_brain(s, a, r, s_)           # 4. remember it
                if done or step % T_MAX == 0:                           # 5. (2. to 4.) until here
                    agent.brain.update_parameter_server()               # 6. 7. 8. gradient → θ
                    agent.brain.pull_parameter_server()                 # 9. θ' ← θ, as in 1.
                    if not server.progress.may_go_on(self.name):
                        return step     # not in the article: another thread has ended learning
            s = s_
        if is_learning:
            self.finish_episode(step)
        return step

    def reward(self, s_, step, done):
        """The article's reward for the step that led to the state s_, instead of gym's 1 each time.

        It is 0 until the episode ends, so a sum of n rewards is 0 except near the end, and a good V
        lies between -1 and 1. As in the article, the time limit counts as an end like any other.
        `s_` is not used; it is there for rewards of your own.
        """
        if not done:
            return 0
        if step < self.parameter_server.progress.limit - 1:
            return -1       # the pole has fallen, or the cart has left the track
        return 1            # as in the article, an episode of 199 steps is a success, too

    def finish_episode(self, step):
        """Count the episode, and hand the weights over if the last 10 meet the stop rule."""
        server = self.parameter_server
        brain = self.agent.brain
        self.count_trial_each_thread += 1
        self.total_reward_vec = np.hstack((self.total_reward_vec[1:], step))
        self.thetas.append(brain.theta)
        mean = self.total_reward_vec.mean()
        meets_rule = mean > server.progress.limit - 1       # the article's rule: above 199 steps
        is_counted = server.progress.finish_episode(        # False if learning is already over
            self.name, self.count_trial_each_thread, step, mean, server.frames, meets_rule)
        if meets_rule and is_counted:
            # Not in the article: hand over the mean of ten θ', kept at the end of each episode.
            # It usually keeps the pole up better than the last weights alone.
            brain.theta = np.mean(self.thetas, axis=0)
            brain.push_parameter_server()


class WorkerThread:
    """What a thread does. Article: 「Worker_Thread」."""

    def __init__(self, thread_name, thread_type, parameter_server):
        self.name = thread_name
        self.thread_type = thread_type
        self.parameter_server = parameter_server
        self.environment = Environment(thread_name, thread_type, parameter_server)

    def run(self, test_episodes=0):
        """Play episodes until learning is over, or, in the test thread, as many as asked for."""
        if self.thread_type == "test":
            play(self.environment.run, test_episodes)
        else:
            while not self.parameter_server.progress.stop.is_set():
                self.environment.run()


def main(argv=None):
    """Run the program and return its exit status. Article: 「メイン関数」, steps M0 to M3."""
    args = read_options(argv)

    # M0. What the threads share. The article's globals frames and isLearned are in it.
    server = ParameterServer(args.env, args.seed, args.max_episodes, args.workers)
    check_predict_p(server)

    # M1. The workers. Each makes its own Environment, Agent and LocalBrain.
    test = WorkerThread("test_thread", "test", server)
    workers = [WorkerThread(f"local_thread{i + 1}", "learning", server)
               for i in range(args.workers)]

    if args.play:
        # Not in the article: play with weights that an earlier run has saved.
        server.theta = server.pack(load_weights(server.keras_model, args.play))
    else:
        # M2 and M3. Each worker runs in a thread of its own, until all of them have ended.
        learn(server, workers, args)
        if not server.is_learned:
            return 1

    # The test. It runs in this thread, because macOS opens windows in no other one.
    test.environment.env = film(test.environment.env, args.out, "A3C", args.render)
    with contextlib.closing(test.environment.env):
        test.run(args.test_episodes)
    return 0


def learn(server, workers, args):
    """Let each worker run in a thread until learning is over, and keep the results."""
    progress = server.progress
    progress.start([worker.name for worker in workers], in_turns=args.seed is not None)
    # `guard` lets an error in one thread end learning for all of them. A daemon thread does not
    # keep the program from ending.
    threads = [threading.Thread(target=guard(worker.run, progress), name=worker.name, daemon=True)
               for worker in workers]
    try:
        for thread in threads:
            thread.start()          # M2. from here on worker.run goes on by itself
        share_one_core(threads)
        progress.watch(args.log)    # shows the episodes until learning is over
    finally:
        with no_interruption():
            end_threads(threads, progress)      # M3. waits for them
            keep_results(server, args)


# == Not needed to understand A3C: options, progress, files, pictures ==============================

Episode = collections.namedtuple(
    "Episode", "thread episode steps mean_of_last_10 total_steps seconds")


def read_options(argv):
    """Read the command line of this program."""
    parser = make_parser("Learn CartPole with A3C, then film what was learned.", "movie/A3C")
    parser.add_argument("--env", default=ENV, choices=["CartPole-v0", "CartPole-v1"],
                        help="episodes of at most 200 or 500 steps")
    parser.add_argument("--workers", default=N_WORKERS, type=positive, help="learning threads")
    parser.add_argument("--max-episodes", default=20_000, type=positive,
                        help="give up after so many episodes of all threads")
    return check_options(parser, parser.parse_args(argv))


def make_parser(description, out):
    """Make an argument parser with the options that all programs here share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    has_screen = (sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ
                  or "WAYLAND_DISPLAY" in os.environ)
    in_terminal = sys.stdout is not None and sys.stdout.isatty()
    parser.add_argument("--seed", type=whole_number,
                        help="fix all random numbers, so that the run can be repeated")
    parser.add_argument("--test-episodes", type=whole_number, default=10,
                        help="episodes of the test")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR",
                        help="where the files go")
    parser.add_argument("--play", type=Path, metavar="WEIGHTS",
                        help="do not learn, but test the weights in this file")
    parser.add_argument("--render", action=argparse.BooleanOptionalAction, default=has_screen,
                        help="show the test in a window")
    parser.add_argument("--log", action="store_true", default=not in_terminal,
                        help="print a line for each episode instead of a table")
    return parser


def whole_number(text, lowest=0):
    """Read an option that is a whole number."""
    if not text.isdecimal() or not lowest <= int(text) < 2 ** 32:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from {lowest} to 2^32 - 1")
    return int(text)


positive = functools.partial(whole_number, lowest=1)


def check_options(parser, args):
    """Check the files that the options name, before any work starts, and get ready for a run."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"argument --out: cannot write there: {error}")
    if args.play and not args.play.is_file():
        parser.error(f"argument --play: there is no file {str(args.play)!r}")
    gym.logger.min_level = gym.logger.ERROR     # do not say that CartPole-v0 is old
    return args


def check_predict_p(server):
    """End the program with exit status 1 if predict_p and the Keras model disagree."""
    rng = np.random.default_rng(0)
    brain = LocalBrain("check", server)
    brain.theta = rng.normal(size=server.theta.shape).astype(np.float32)    # biases are not 0
    s = rng.normal(size=(8, NUM_STATES)).astype(np.float32)
    try:
        p, _ = server.network(tf.constant(brain.theta), tf.constant(s))
        agrees = np.allclose(p, brain.predict_p(s), atol=1e-4)
    except ValueError:      # other numbers of layers or units
        agrees = False
    if not agrees:
        sys.exit("error: ParameterServer._build_model and LocalBrain.predict_p are two different"
                 " networks. Give both the same layers and activations, then start again.")


class Progress:
    """What the threads have done so far, and whether learning is over."""

    def __init__(self, env, max_episodes):
        self.env = env
        self.limit = gym.spec(env).max_episode_steps    # 200 steps in CartPole-v0, 500 in v1
        self.max_episodes = max_episodes
        self.history = []                   # an Episode for each one that was played to its end
        self.lock = threading.Lock()        # for the history and for counting steps
        self.stop = threading.Event()       # learning is over, for whatever reason
        self.failed = None                  # the name of the thread that ended with an error
        self.turns = Turns()
        self.workers = 0                    # learning threads
        self.started = time.perf_counter()

    def start(self, names, in_turns=False):
        """Start the clock, and let the threads with these names take turns if they shall."""
        self.workers = len(names)
        self.started = time.perf_counter()
        if in_turns:
            self.turns.start(names)

    def finish_episode(self, name, trial, step, mean, frames, is_last):
        """Record an episode, which may be the last one. Return False if learning was over."""
        with self.lock:
            if self.stop.is_set():
                return False
            seconds = round(time.perf_counter() - self.started, 3)
            self.history.append(Episode(name, trial, step, float(mean), frames, seconds))
            if is_last or len(self.history) >= self.max_episodes:
                self.stop.set()
            return True

    def may_go_on(self, name):
        """Let the other threads have their turn, if there is a seed. Return False at the end."""
        self.turns.pass_on(name)
        self.turns.wait(name)
        return not self.stop.is_set()

    def watch(self, log):
        """Show the episodes until learning is over: as a table, or as a line each."""
        if not log:
            with Live(get_renderable=self.table, refresh_per_second=4):
                while not self.stop.wait(.1):       # without a timeout, Windows ignores Ctrl-C
                    pass
            return
        shown = 0
        while not self.stop.wait(.1) or shown < len(self.history):
            for e in self.history[shown:]:
                say(f"{e.thread}  episode {e.episode}  steps {e.steps}"
                    f"  mean of last 10 {e.mean_of_last_10:.1f}")
                shown += 1

    def table(self):
        """Make a table with a row for each thread: of many threads, for the best 16."""
        seconds = time.perf_counter() - self.started
        steps = self.history[-1].total_steps if self.history else 0
        table = Table("thread", "episodes", "last steps", "mean of last 10", f"0 to {self.limit}",
                      caption=f"{steps} steps  {len(self.history)} episodes"
                              f"  {steps / seconds:.0f} steps/s  {seconds:.1f} s",
                      caption_justify="left", box=None)
        latest = {e.thread: e for e in self.history}
        best = sorted(latest.values(), key=lambda e: e.mean_of_last_10)[-16:]
        for e in sorted(best, key=lambda e: (len(e.thread), e.thread)):
            bar = ProgressBar(self.limit, e.mean_of_last_10, width=20, finished_style="green")
            table.add_row(e.thread, str(e.episode), str(e.steps), f"{e.mean_of_last_10:.1f}", bar)
        return table


class Turns:
    """Makes a run with a seed repeatable: threads take turns, from one pull to the next.

    Without a seed its methods do nothing, and the threads run as the system lets them.
    """

    def __init__(self):
        self.gates = {}     # of each thread: its own gate, and the gate of the next thread

    def start(self, names):
        """Let these threads take turns, and give the first one the first turn."""
        gates = [threading.Semaphore(0) for _ in names]
        for i, name in enumerate(names):
            self.gates[name] = gates[i], gates[(i + 1) % len(names)]
        gates[0].release()

    def wait(self, name):
        """Wait for this thread's turn."""
        if name in self.gates:
            own, _ = self.gates[name]
            own.acquire()

    def pass_on(self, name):
        """End this thread's turn."""
        if name in self.gates:
            _, following = self.gates[name]
            following.release()


def run_threads(jobs, progress, log):
    """Run {name: function} in threads until learning is over, and show the progress meanwhile.

    This is what learn() does, for the programs in companions/.
    """
    progress.start(list(jobs))
    threads = [threading.Thread(target=guard(job, progress), name=name, daemon=True)
               for name, job in jobs.items()]
    try:
        for thread in threads:
            thread.start()
        share_one_core(threads)
        progress.watch(log)
    finally:
        end_threads(threads, progress)


def guard(job, progress):
    """Make a thread's function of `job`: an error in it ends learning for all threads.

    Python prints the error and the thread's name, but only for the first thread that fails.
    """
    def guarded():
        name = threading.current_thread().name
        progress.turns.wait(name)
        try:
            job()
        except Exception:
            with progress.lock:
                is_first = progress.failed is None
                if is_first:
                    progress.failed = name
            if is_first:
                raise
        finally:
            progress.stop.set()
            progress.turns.pass_on(name)
    return guarded


def end_threads(threads, progress):
    """End learning, and wait for the threads: two seconds at most, then they are left alone.

    They are daemon threads, which cannot keep the program from ending.
    """
    progress.stop.set()
    deadline = time.perf_counter() + 2
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0, deadline - time.perf_counter()))


def share_one_core(threads):
    """Put threads on one core, where the system can.

    Python runs one thread at a time, so a second core does not help, and waking a thread on another
    core takes longer.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):   # not on macOS and Windows
        core = ctypes.CDLL(None).sched_getcpu()
        for thread in threads:
            os.sched_setaffinity(thread.native_id, {core})


@contextlib.contextmanager
def no_interruption():
    """Ignore Ctrl-C and SIGTERM in the `with`, so that what is written there is written whole."""
    handlers = {number: signal.signal(number, signal.SIG_IGN)
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def keep_results(server, args):
    """Save what the threads have learned, draw the pictures, and say how it went."""
    title = f"A3C, {args.env}, {server.progress.workers} threads"
    keep({"A3C": server.model}, server.progress, server.is_learned, server.frames, title, args.out)
    if server.updates:
        draw_three_as(server, args.out / "three_as.png")


def keep(models, progress, is_learned, steps, title, out):
    """Save what came of a run, the most valuable first, and say how it went.

    `models`: {name: Keras model}, `steps`: of all threads, `title`: of the learning curve.
    """
    seconds = time.perf_counter() - progress.started
    for name, model in models.items():
        name += ".weights.h5" if is_learned else ".unfinished.weights.h5"
        save_weights(model, out / name)
    with open(out / "history.csv", "w", newline="") as file:
        csv.writer(file).writerows([Episode._fields, *progress.history])

    outcome = "learned" if is_learned else "not learned"
    if progress.failed:
        outcome += f", {progress.failed} failed,"
    say(f"{outcome} in {seconds:.1f} s: {steps} steps, {len(progress.history)} episodes,"
        f" {progress.workers} workers, {steps / seconds:.0f} steps/s")

    draw_learning_curve(progress.history, out / "learning_curve.png", progress.limit, title)
    for name, model in models.items():
        with contextlib.suppress(Exception):        # pydot or Graphviz is missing or fails
            keras.utils.plot_model(model, out / f"{name}.png", show_shapes=True)
    say(f"weights and pictures are in {out}")


def say(line):
    """Print a line at once. If nobody can read it, as behind `| head`, the run goes on."""
    try:
        print(line + "\n", end="", flush=True)     # in one piece: Ctrl-C cannot cut off the end
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def save_weights(model, path):
    """Write weights to a temporary name, then rename: the file is complete or absent."""
    part = path.with_name("part.weights.h5")
    model.save_weights(part)
    part.replace(path)


def load_weights(model, path):
    """Fill a Keras model from the file of an earlier run, or end with exit status 2."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # the error says it all
            model.load_weights(path)
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"error: argument --play: {str(path)!r} does not hold the weights of this network:"
              f" {reason}", file=sys.stderr)
        sys.exit(2)
    return model.get_weights()


# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"


def draw_learning_curve(history, path, limit, title):
    """Draw each episode, and each thread's mean of its last 10, over the steps of all threads."""
    from matplotlib.figure import Figure  # here, because it takes half a second
    axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    axes.plot([e.total_steps for e in history], [e.steps for e in history], ".", color="0.7",
              markersize=3 if len(history) > 200 else 7, label="an episode")
    axes.axhline(limit - 1, color="black", linestyle="--", linewidth=1,
                 label=f"learned above {limit - 1}")
    # Before a thread's tenth episode its mean still contains zeros.
    curves = {}
    for e in history:
        if e.episode >= 10:
            curves.setdefault(e.thread, []).append(e)
    several = len(curves) > 1
    label = "a worker's last 10, mean" if several else "the last 10, mean"
    winner = None
    for thread, episodes in curves.items():
        if episodes[-1].mean_of_last_10 > limit - 1:
            winner = thread
        else:
            draw_curve(axes, episodes, label, color=BLUE, linewidth=1,
                       alpha=max(.3, 1 / len(curves) ** .25))
            label = None        # one entry of the legend is enough
    if winner:
        draw_curve(axes, curves[winner], f"{winner}, which has learned" if several else label,
                   color=ORANGE, linewidth=2.5)
    if not curves:
        axes.text(.5, .5, "no mean yet: no worker has played ten episodes", ha="center",
                  transform=axes.transAxes)
    axes.set(title=title, xlim=(0, None), xlabel="steps of all workers together",
             ylim=(0, 1.05 * limit), ylabel="steps of an episode")
    axes.legend(fontsize="small")
    axes.figure.savefig(path)


def draw_curve(axes, episodes, label, **style):
    """Draw the means of some episodes over the steps of all threads."""
    axes.plot([e.total_steps for e in episodes], [e.mean_of_last_10 for e in episodes],
              label=label, **style)


def draw_three_as(server, path):
    """Draw Advantage, Actor, Critic and Asynchronous, each from the run that has just ended."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    draw_advantage(server, panels[0, 0])
    draw_actor_and_critic(server, panels[0, 1], panels[1, 0])
    draw_staleness(server, panels[1, 1])
    figure.savefig(path)


def draw_advantage(server, axes, learned_steps=30):
    """Draw an episode that goes wrong: first the policy of this run plays, then chance."""
    environment = Environment("picture", "test", server)
    agent = environment.agent
    chance = random.Random(0)
    s, _ = environment.env.reset(seed=0)
    step = 0
    done = False
    while not done:
        if step < learned_steps:
            a = agent.act(s, greedy=True)
        else:
            a = chance.randrange(NUM_ACTIONS)
        s_, _, terminated, truncated, _ = environment.env.step(a)
        step += 1
        done = terminated or truncated
        r = environment.reward(s_, step, done)
        agent.advantage_push_local_brain(s, a, r, None if done else s_)
        s = s_
    environment.env.close()

    states, _, R_n, later_states, mask = map(np.array, zip(*agent.brain.train_queue))
    v = server.model(states)[1].numpy().ravel()
    R = R_n + GAMMA_N * server.model(later_states)[1].numpy().ravel() * mask
    if step > learned_steps:
        axes.axvspan(learned_steps, step, color="0.93")
    axes.plot(v, label="V(s), what the critic expects", color=BLUE)
    axes.plot(R, label=f"R, {N_STEP_RETURN} rewards and γⁿ·V(s')", color=ORANGE, linewidth=1)
    axes.bar(range(step), R - v, label="advantage R − V(s)", color=GREEN, alpha=.6)
    axes.set(title="Advantage: better or worse than expected?",
             xlabel=f"step of an episode (from {learned_steps} on: random pushes)",
             ylim=(min(-1.1, *v, *R, *(R - v)), max(1.2, *v, *R, *(R - v))))
    axes.legend(fontsize="small", loc="upper left")


def draw_actor_and_critic(server, actor, critic):
    """Draw what the network says for a cart that stands still in the middle."""
    angle, velocity = np.meshgrid(np.radians(np.linspace(-12, 12, 81)), np.linspace(-2, 2, 81))
    nothing = np.zeros(angle.size)
    p, v = server.model(np.column_stack([nothing, nothing, angle.ravel(), velocity.ravel()]))
    p_right = np.reshape(p[:, 1], angle.shape)
    v = np.reshape(v, angle.shape)
    degrees = np.degrees(angle)

    # The map from blue to orange-red shows a colour-blind reader, too, on which side of ½ p lies.
    image = actor.pcolormesh(degrees, velocity, p_right, cmap="RdBu_r", vmin=0, vmax=1)
    actor.figure.colorbar(image, ax=actor)
    if p_right.min() < .5 < p_right.max():
        actor.contour(degrees, velocity, p_right, [.5], colors="black")
    image = critic.pcolormesh(degrees, velocity, v, cmap="viridis")
    critic.figure.colorbar(image, ax=critic)
    actor.set_title("Actor: p(right); black line: ½")
    critic.set_title("Critic: V(s), discounted reward to come")
    for axes in actor, critic:
        axes.set(xlabel="angle of the pole (degrees, positive: to the right)",
                 ylabel="angular velocity (rad/s)")


def draw_staleness(server, axes):
    """Draw which fraction of the gradients was how many updates old."""
    oldest = max(server.staleness)
    mean = np.mean(server.staleness)
    bins = np.linspace(-.5, max(oldest, 7) + .5, min(60, max(oldest, 7) + 2))
    weights = np.full(len(server.staleness), 1 / len(server.staleness))
    axes.hist(server.staleness, bins, weights=weights, color=PURPLE)
    axes.set(title="Asynchronous: how old were the weights?", yscale="log", ylim=(None, 2),
             xlabel="updates by other threads between pull and update",
             ylabel="fraction of all updates")
    axes.text(.97, .95, f"mean: {mean:.1f}\noldest: {oldest}", ha="right", va="top",
              transform=axes.transAxes)


def film(env, folder, name, in_window):
    """Film the 1st, 2nd and 9th episode, and so on (gym's own choice); in a window, show all."""
    # Otherwise Mesa may crash, because its LLVM and TensorFlow's are two versions of one library.
    os.environ["SDL_FRAMEBUFFER_ACCELERATION"] = "0"
    if not in_window:
        os.environ["SDL_VIDEODRIVER"] = "dummy"         # draw without a screen
    env = gym.wrappers.RecordVideo(env, str(folder), name_prefix=name)
    return gym.wrappers.HumanRendering(env) if in_window else env


def play(play_episode, count):
    """Play episodes, and print the steps of each and their mean."""
    steps = []
    for number in range(1, count + 1):
        steps.append(play_episode())
        say(f"test  episode {number}  steps {steps[-1]}")
    if steps:
        say(f"test: mean of {count} episodes {np.mean(steps):.1f} steps")


def run_program(main):
    """Call `main` and end with the exit status it returns: after Ctrl-C 130, after SIGTERM 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run_program(main)

# `uv run a3c_cartpole.py` installs what these lines name, in an environment of its own.
# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#   'tensorflow-cpu>=2.21,<2.22; sys_platform != "darwin" and platform_machine in "x86_64 AMD64"',
#   'tensorflow>=2.21,<2.22; sys_platform == "darwin" or platform_machine not in "x86_64 AMD64"',
#   'keras>=3.12,<4', 'gymnasium[classic-control]>=1.4,<2', 'numpy>=2.1,<3', 'rich>=13.7,<16',
#   'moviepy>=2.1,<3', 'matplotlib>=3.9,<4']
# ///
