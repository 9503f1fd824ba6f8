"""A3C on CartPole, complete in this one file: Keras, TensorFlow and threads, on the CPU.

    python a3c_cartpole.py      # learns within seconds; films are then in movie/A3C
    uv run a3c_cartpole.py      # the same, and installs what it needs first

A3C is Asynchronous Advantage Actor-Critic:
- Actor-Critic (see _build_model, loss_total): a network has two outputs. The actor (Policy-Based)
  gives p, the probability of each action. The critic (Value-Based) gives V(s), the discounted sum
  of the rewards that it expects from the state s on.
- Advantage (see loss_total): R - V(s), how much better an action turned out than the critic
  expected. R (see Agent.advantage_push_local_brain) is the n-step return: the next n rewards, and
  what the critic expects after them. If the advantage is above 0, the actor makes this action more
  probable, if below 0, less probable. (The article's section 「Advantage」 explains only R, under
  this name. On average R is Q(s, a), so R - V(s) is Q - V, as in the Dueling network.)
- Asynchronous (see ParameterServer): eight threads each play a CartPole of their own and improve
  one shared network. No thread waits until another has played its steps.

The parameter server keeps θ, the weights of the shared network. θ' is a thread's copy. Each thread
repeats the nine steps of the article's list:

    1. copy the shared weights: θ' ← θ                 LocalBrain.pull_parameter_server
    2. choose an action a in the state s, using θ'     Agent.act
    3. do it, which gives a reward and a new state     Environment.run
    4. remember it; it becomes a sample after n = 5    Agent.advantage_push_local_brain
       rewards, or at the end of the episode
    5. repeat 2 to 4, T_MAX = 10 times or until the    Environment.run
       episode ends
    6. compute the gradients of the loss, using θ'     loss_gradients, loss_total
    7. hand them to the server                         LocalBrain.update_parameter_server
    8. the server changes θ by them                    ParameterServer.apply_gradients
    9. back to 1.

Symbols: s, a, r: state, action, reward. s' (in code s_): the next state; in a sample, the state n
steps later. γ: the factor by which a reward counts less for each step that it comes later. p(a|s):
the article's pi_θ(a|s). θ is never the pole's angle here. In shapes, B is the size of a batch.

This is the program of Sugulu's article 「実装しながら学ぶA3C」 of 2017, for today's libraries:
https://qiita.com/sugulu/items/acbc909dd9b74b043e45. The classes come in the order in which the
article explains them, and most names are the article's. README.md lists what differs. "The paper"
is Mnih et al., 2016, https://arxiv.org/abs/1602.01783.
"""
import argparse
import collections
import contextlib
import csv
import functools
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

# These settings must be made before the imports below.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"               # a network this small needs no GPU
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")      # no messages at the start
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")     # without oneDNN and its message
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")    # TensorFlow's own threads would only
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")    # slow ours down

import gymnasium as gym
import keras
import numpy as np
import rich
import tensorflow as tf
from rich.progress import BarColumn, Progress, TextColumn

keras.config.set_floatx("float32")      # whatever keras.json says

# -- constants of Game
ENV = "CartPole-v0"     # an episode has at most 200 steps (CartPole-v1: 500)
NUM_STATES = 4          # cart position, cart velocity, pole angle, pole angular velocity
NUM_ACTIONS = 2         # 0 pushes the cart to the left, 1 to the right (article: right, left)
NONE_STATE = np.zeros(NUM_STATES)       # fills the place of s' after the end, see train_push

# -- constants of LocalBrain
MIN_BATCH = 5           # an update needs at least this number of samples
LOSS_V = .5             # coefficient of the value loss
LOSS_ENTROPY = .01      # coefficient of the entropy

# -- constants of ParameterServer
LEARNING_RATE = 5e-3    # (CartPole-v1 has its own: see read_options)
RMSPROP_DECAY = .99     # RMSProp's mean squares keep 99 % of their old value at each update

# -- constants of Advantage, or rather of R: see Agent.advantage_push_local_brain
GAMMA = .99             # γ
N_STEP_RETURN = 5       # n: the number of rewards that are summed
GAMMA_N = GAMMA ** N_STEP_RETURN

# -- constants of the threads
N_WORKERS = 8           # learning threads
T_MAX = 10              # steps of a thread between two of its updates, at most (article: Tmax)
MAX_EPISODES = 20_000   # of all threads together; not in the article

# -- constants of ε-greedy (ε-greedy法): with probability ε an action is random, and p is ignored.
# (The article adds this. The paper's A3C has no ε, as drawing with p already tries both actions.)
EPS_START = .5
EPS_END = 0.
EPS_STEPS = 200 * N_WORKERS     # after this number of steps, of all threads together, ε is EPS_END


def main(argv=None):
    """Learn, then test what was learned. Return the exit status. Article: 「メイン関数」."""
    args = read_options(argv)

    # M0. The parameter server holds what all threads share, also what the article has as globals,
    #     frames and isLearned. It is only an object in memory, not a thread or another computer.
    parameter_server = ParameterServer(args.seed, args.max_episodes, args.learning_rate)
    check_predict(parameter_server)                 # see LocalBrain.predict

    if args.play:                                   # not in the article
        parameter_server.weights = load_weights(parameter_server.model, args.play)
    else:
        # M1. Make the workers. Each makes an Environment, an Agent and a LocalBrain of its own.
        workers = [WorkerThread(f"local_thread{i + 1}", parameter_server, args.env)
                   for i in range(args.workers)]
        learn(parameter_server, workers, args.out)  # M2 and M3
        if not parameter_server.is_learned:
            return 1
    test(parameter_server, args)                    # (article: a thread that sleeps until then)
    return 0


def learn(parameter_server, workers, out):
    """Let each worker run in a thread of its own until learning is over, and keep the results."""
    started = time.perf_counter()
    try:
        # M2. Start the threads. start() returns at once, and worker.run runs in the new thread.
        #     From now on Python may switch at any moment between these threads and this one.
        with one_core():                            # only for speed
            for worker in workers:
                worker.start()
        show_progress(parameter_server, workers)    # until learning is over
    finally:
        # M3. `stop` is a flag that all threads see. Each thread ends after its present episode;
        #     join() waits for that.
        with uninterrupted():                       # a second Ctrl-C must not lose the results
            parameter_server.stop.set()
            for worker in workers:
                if worker.is_alive():               # (after Ctrl-C some may not have started)
                    worker.join()
            keep_results(parameter_server, workers, time.perf_counter() - started, out)


class WorkerThread(threading.Thread):
    """A thread that learns in an environment of its own. Article: 「Worker_Thread」."""

    def __init__(self, thread_name, parameter_server, env_name=ENV):
        super().__init__(name=thread_name)
        self.parameter_server = parameter_server
        self.environment = Environment(thread_name, "learning", parameter_server, env_name)

    def run(self):
        """Play and learn, episode after episode, until learning is over for all threads."""
        try:
            while not self.parameter_server.stop.is_set():
                self.environment.run()
        finally:
            self.parameter_server.stop.set()        # (an error in one thread ends all)


class Environment:
    """A CartPole and the agent that plays it. Article: 「Environment」."""

    def __init__(self, name, thread_type, parameter_server, env_name=ENV, env=None):
        self.name = name
        self.thread_type = thread_type                          # "learning" or "test"
        self.parameter_server = parameter_server
        self.agent = Agent(name, thread_type, parameter_server)
        self.env = env or make_env(env_name, self.agent.rng.getrandbits(31))
        self.max_steps = self.env.spec.max_episode_steps        # 200 (CartPole-v1: 500)
        self.total_reward_vec = np.zeros(10)                    # steps of the last ten episodes
        self.last_weights = collections.deque(maxlen=10)        # θ' pulled after each of them
        self.count_trial_each_thread = 0                        # episodes

    def run(self):
        """Play one episode and return how many steps it had. A learning thread learns from it."""
        agent = self.agent
        is_learning = self.thread_type == "learning"
        agent.brain.pull_parameter_server()                     # 1. θ' ← θ
        s, _ = self.env.reset()
        step = 0
        done = False
        while not done:
            a = agent.act(s)                                    # 2. choose a, using θ'
            s_, _, terminated, truncated, _ = self.env.step(a)  # 3. do a, which leads to s'
            step += 1
            done = terminated or truncated
            r = self.reward(step, done)                         #    and to r (not gym's)
            if done:
                s_ = None                                       #    (no state follows the end)
            if is_learning:
                self.parameter_server.count_step()
                agent.advantage_push_local_brain(s, a, r, s_)   # 4. remember it
                if done or step % T_MAX == 0:                   # 5. (2 to 4 repeat until here)
                    agent.brain.update_parameter_server()       # 6 to 8: gradients → θ
                    agent.brain.pull_parameter_server()         # 9. back to 1: θ' ← θ
            s = s_
        if is_learning:
            self.finish_episode(step)
        return step

    def reward(self, step, done):
        """Return the article's reward for a step. (gym's is 1 for every step.)

        It is 0 until the episode ends. So V(s) should lie between -1 and 1, and near -1 shortly
        before a fall. (The time limit counts as an end, too. Strictly, R should have V(s') there.)
        """
        if not done:
            return 0
        if step < self.max_steps - 1:
            return -1       # the pole has fallen, or the cart is out of range
        return 1            # the episode has reached step 199 (CartPole-v1: 499)

    def finish_episode(self, step):
        """Count an episode. If this thread's last ten average above 199 (v1: 499), all can stop."""
        self.count_trial_each_thread += 1
        self.total_reward_vec = np.hstack((self.total_reward_vec[1:], step))
        self.last_weights.append(self.agent.brain.weights)
        mean = self.total_reward_vec.mean()
        episode = Episode(self.name, self.count_trial_each_thread, step, mean,
                          self.parameter_server.frames)
        is_winner = self.parameter_server.record(episode, bool(mean > self.max_steps - 1))
        if is_winner:
            # Not in the article: the mean of the last ten θ'. The last one alone fails more often.
            brain = self.agent.brain
            brain.weights = [np.mean(arrays, axis=0) for arrays in zip(*self.last_weights)]
            brain.push_parameter_server()


class Agent:
    """Chooses actions, and turns steps into samples. Article: 「Agent」."""

    def __init__(self, name, thread_type, parameter_server):
        self.thread_type = thread_type
        self.parameter_server = parameter_server
        self.brain = LocalBrain(parameter_server)
        self.memory = collections.deque()   # s, a, r of the last steps, which wait for more rewards
        seed = parameter_server.seed
        self.rng = random.Random(None if seed is None else f"{seed} {name}")

    def act(self, s):
        """Choose an action in the state s (4,).

        With probability ε it is random. Otherwise it is drawn with the probabilities p, so the
        action that seems worse is tried, too, only less often. (The article calls the drawn action
        最適行動, the best one. Q-learning takes the best one, and therefore needs ε.)
        """
        p = self.brain.predict_p(s)
        if self.thread_type == "test":
            return int(p.argmax())      # not in the article: a test need not try the other one
        frames = self.parameter_server.frames
        eps = EPS_START + (EPS_END - EPS_START) * min(frames / EPS_STEPS, 1)
        if self.rng.random() < eps:
            return self.rng.randrange(NUM_ACTIONS)
        return self.rng.choices(range(NUM_ACTIONS), p.tolist())[0]

    def advantage_push_local_brain(self, s, a, r, s_):
        """4. Remember a step, and hand the brain the samples that are complete now.

        Article: 「Advantage」. In spite of the name, a sample has only R_n; loss_total makes the
        advantage.

            R_n = r(t) + γ·r(t+1) + … + γ^(n-1)·r(t+n-1)       summed here
            R   = R_n + γ^n·V(s')                              made by LocalBrain, which knows V

        During an episode all rewards are 0, so R is γ^n·V(s'). At its end (終端, s_ is None) no
        state follows. After a fall R is -1 for the last step, and -γ, -γ^2, … for the n - 1 steps
        before it; if the episode reaches step 199, the same with +1. In both cases R contains no
        guess. So V(s) becomes right near the end first, and each update carries this up to n steps
        back.

        Do not mix up n and T_MAX. The update after step T_MAX = 10 has the samples of steps 1 to 6.
        Steps 7 to 10 wait for more rewards, and come into the next update.

        Why n = 5? With n = 1, each update carries the effect of a fall only one step back, through
        guesses V(s') that are wrong at first. With n = 50, R depends on which fifty actions
        happened to be drawn, and says little about the first of them. 5 is the article's choice.
        (Its reason is about the max Q of Q-learning. Here V(s) is meant for the actor as it is.)
        """
        a_cats = np.zeros(NUM_ACTIONS)      # a as one-hot
        a_cats[a] = 1
        self.memory.append((s, a_cats, r))
        # During the episode at most one sample is ready, of the oldest step; at the end, all are.
        while len(self.memory) == N_STEP_RETURN or (s_ is None and self.memory):
            # Each sum is made anew. (The article corrects one running sum, self.R.)
            R_n = sum(GAMMA ** k * r_k for k, (_, _, r_k) in enumerate(self.memory))
            first_s, first_a, _ = self.memory.popleft()
            self.brain.train_push(first_s, first_a, R_n, s_)    # s_: n steps after first_s, or None


class ParameterServer:
    """The network that all threads share, and the optimizer that changes it.

    Article: 「ParameterServer」, and Fig. 2 in 「Asynchronous」. The workers call its methods, each
    in its own thread. Asynchronous (非同期) means this:

        thread 1                  thread 2                  the shared weights after that
        copies θ0                 copies θ0                 θ0
        plays 4 of its 10 steps   plays its 10 steps        θ0
        plays the other 6         hands over, copies θ1     θ1 = θ0, changed by thread 2
        hands over, copies θ2     plays                     θ2 = θ1, changed by thread 1, whose
                                                            gradients were computed at θ0

    Why a copy? The loss computes p again, and this must be the p with which the action was drawn
    (see loss_total). If thread 1 played with θ itself, thread 2 would change p in between. With a
    copy, p stays. But the gradients, computed at θ0, come late: they change θ1.

    Why is that nearly harmless? With eight threads, seven updates by others come in between on
    average. Together they change p by only 0.02 on average, in the states of the batch (as measured
    by companions/pictures.py). So the gradients should still point nearly the right way.

    Why several threads? Successive steps of one game resemble each other, and a network that learns
    from them alone may forget the other parts of the game. DQN therefore learns from old steps,
    too, which it keeps in a replay memory. A3C cannot: their actions were drawn with quite another
    p. So games that are at different points take turns to change θ. (As nothing is shuffled, one
    may use an LSTM, as the article says.)

    Why does none wait for the others' steps? In the paper each has a core, and so all cores are
    busy. CartPole needs neither copy nor threads, and Python runs the code of one thread at a time,
    so here they bring no speed: they only show the method.
    """

    def __init__(self, seed=None, max_episodes=MAX_EPISODES, learning_rate=LEARNING_RATE):
        self.seed = seed
        self.max_episodes = max_episodes
        self.learning_rate = learning_rate
        if seed is not None:
            keras.utils.set_random_seed(seed)       # for the first weights
        self.model = self._build_model()
        # θ: kernel and bias of the hidden layer, of p and of V. (The model's own never learn.)
        self.weights = self.model.get_weights()
        # RMSProp's running means of squared gradients. They start at 1, as in TensorFlow 1, so that
        # the first updates are small.
        self.mean_squares = [np.ones_like(w) for w in self.weights]
        self.compiled_gradients = compile_gradients(self.model)     # loss_gradients, compiled

        self.lock = threading.Lock()
        self.frames = 0                 # steps of all learning threads (paper: T)
        self.history = []               # an Episode for each one that was played to its end
        self.is_learned = False
        self.stop = threading.Event()   # learning is over, whatever the reason

    def _build_model(self):
        """Define the network of the article's Fig. 1: s (B, 4) → p (B, 2) and V(s) (B, 1).

        The actor is the output p, the critic is the output V. They share the hidden layer. Softmax
        makes p(left) + p(right) = 1. If you change the network, change LocalBrain.predict, too.
        """
        l_input = keras.Input((NUM_STATES,))
        l_dense = keras.layers.Dense(16, activation="relu")(l_input)
        out_actions = keras.layers.Dense(NUM_ACTIONS, activation="softmax")(l_dense)
        out_value = keras.layers.Dense(1, activation="linear")(l_dense)
        return keras.Model(l_input, [out_actions, out_value], name="A3C")

    def apply_gradients(self, gradients):
        """8. Change θ by gradients, a list of arrays: one step of RMSProp.

        RMSProp divides the gradient of each weight by its usual size, so that after a while all
        weights take steps of about the same size.
        """
        # Why a lock? Python may switch threads at any moment. If two of them read θ1 and
        # each stored a new θ made from it, the second would erase the first one's update. (Article
        # and paper have no lock. The paper accepts such a loss, for speed.)
        with self.lock:
            if self.stop.is_set():
                return      # learning is over: only the thread that has learned may set θ now
            # New lists, as the old weights may be a thread's θ'. The minus makes the loss smaller.
            self.mean_squares = [RMSPROP_DECAY * m + (1 - RMSPROP_DECAY) * g ** 2
                                 for m, g in zip(self.mean_squares, gradients)]
            self.weights = [w - self.learning_rate * g / np.sqrt(m + 1e-10)
                            for w, g, m in zip(self.weights, gradients, self.mean_squares)]

    def count_step(self):
        """Count a step of any learning thread."""
        with self.lock:     # (+= reads and then stores)
            self.frames += 1

    def record(self, episode, has_learned):
        """Record an episode. Return True if this thread is the first that has learned."""
        with self.lock:
            if self.stop.is_set():
                return False
            self.history.append(episode)
            self.is_learned = has_learned
            if has_learned or len(self.history) == self.max_episodes:
                self.stop.set()
            return has_learned


class LocalBrain:
    """A thread's copy θ' of the network, and its samples. Article: 「LocalBrain」.

    In the article it has a Keras model, scopes and a session; here, a list of weights. The
    article's `_build_graph` is loss_gradients and loss_total.
    """

    def __init__(self, parameter_server):
        self.parameter_server = parameter_server
        self.train_queue = []           # samples: s, a, R_n, s', s_mask
        self.pull_parameter_server()

    def pull_parameter_server(self):
        """1. and 9. Take the weights that the server has now: θ' ← θ."""
        # Both have the same list now. That is as good as a copy, because an update does not change
        # this list, but replaces it. No lock: this is one assignment, so a thread sees the old list
        # or the new one, never a mixture.
        self.weights = self.parameter_server.weights

    def push_parameter_server(self):
        """Give the server these weights: θ ← θ'. Only the winner does so, when learning is over."""
        # No lock: `stop` was set under the lock, so no update follows.
        self.parameter_server.weights = self.weights

    def predict(self, s):
        """Compute p (2,) and V(s) of one state (4,), or p (B, 2) and V(s) (B,) of a batch (B, 4).

        The Keras model computes the same, but NumPy is more than 100 times as fast for one state.
        check_predict compares the two when the program starts.
        """
        kernel, bias, p_kernel, p_bias, v_kernel, v_bias = self.weights
        hidden = np.maximum(s @ kernel + bias, 0)                   # relu
        z = hidden @ p_kernel + p_bias
        exp_z = np.exp(z - z.max(axis=-1, keepdims=True))           # - max: it cannot overflow
        p = exp_z / exp_z.sum(axis=-1, keepdims=True)               # softmax
        v = hidden @ v_kernel + v_bias
        return p, v[..., 0]

    def predict_p(self, s):
        """Compute the probability of each action (2,) in the state s (4,)."""
        p, _ = self.predict(s)
        return p

    def train_push(self, s, a, R_n, s_):
        """Queue a sample. After the end there is no s_ (None): its place is filled, s_mask is 0."""
        if s_ is None:
            self.train_queue.append((s, a, R_n, NONE_STATE, 0.))
        else:
            self.train_queue.append((s, a, R_n, s_, 1.))

    def update_parameter_server(self):
        """6. and 7. Turn the queued samples into gradients, and hand these to the server."""
        if len(self.train_queue) < MIN_BATCH:
            return      # the samples wait (with n = 5 and T_MAX = 10 this does not happen)
        s, a, R_n, s_, s_mask = [np.array(column, np.float32) for column in zip(*self.train_queue)]
        self.train_queue = []

        # R = R_n + γ^n·V(s') with θ'. After the end s_mask is 0. (Each sample with s_mask 1 has n
        # rewards, so γ^n is right.)
        _, v_ = self.predict(s_)
        R = R_n + GAMMA_N * v_ * s_mask

        # 6. The gradients, from its own samples and with its own θ': loss_gradients, compiled.
        weights = [tf.constant(w) for w in self.weights]
        gradients = self.parameter_server.compiled_gradients(
            weights, tf.constant(s), tf.constant(a), tf.constant(R))
        # 7. It hands over the gradients, not its weights.
        self.parameter_server.apply_gradients([gradient.numpy() for gradient in gradients])


def loss_gradients(model, weights, s, a, R):
    """6. The gradients of the mean loss at the weights θ': s (B, 4), a one-hot (B, 2), R (B,)."""
    with tf.GradientTape() as tape:     # records what is computed, to find its gradients
        tape.watch(weights)             # with respect to these
        # Run the model with θ' instead of its own weights. ([] and _ are variables that are not
        # trained. There are none.)
        (p, v), _ = model.stateless_call(weights, [], s)
        loss = tf.reduce_mean(loss_total(p, v[:, 0], a, R))     # v: (B, 1) → (B,)
    return tape.gradient(loss, weights)


def loss_total(p, v, a, R):
    """The loss of each sample (B,): p (B, 2), V(s) (B,), a as one-hot (B, 2), R (B,).

    Article: 「Actor-Critic」, and the method `_build_graph` of its LocalBrain. Paper: section 4. A
    loss is made small, so what should grow gets a minus.
    """
    # How much better did the action turn out than the critic expected? Suppose the pole falls three
    # steps later: R = -γ^3 = -0.97. If V(s) is -0.6, the advantage is -0.37.
    #
    # Why not R itself? Suppose both actions have p = 0.5, and R is -0.5 after the better one and
    # -0.9 after the worse one. With R in place of the advantage, each draw would make its action
    # less probable; only over many draws would the worse one lose more. That is right on average,
    # but noisy. With V(s) = -0.7 the advantages are 0.2 and -0.2, so each draw helps.
    advantage = R - v

    # The actor. By the policy gradient theorem (方策勾配定理), log p(a|s)·advantage should grow.
    # With the advantage -0.37, the loss is 0.37·log p. It is smaller if p is smaller, so the action
    # becomes less probable. (If the critic had expected the fall, V(s) = -0.97, p would stay.)
    #
    # Why the logarithm? The average advantage, Σ p·advantage, should grow. Its gradient is
    # Σ advantage·(gradient of p): each action has the weight 1. But an action with p = 0.1 is drawn
    # only once in ten times, so each draw must have the weight 1/p = 10. The logarithm does this:
    # the gradient of log p is 1/p times that of p. This must be the p of the draw. If p was 0.1
    # then, but is 0.9 now, the weight is only 1/0.9 = 1.1. (Here it is nearly so: the samples that
    # waited, such as steps 7 to 10, were drawn with the θ' before, and ε's random actions are
    # treated as if drawn with p.)
    log_prob = tf.math.log(tf.reduce_sum(p * a, axis=1) + 1e-10)    # p(a|s); 1e-10: never log 0
    # Why stop_gradient? The advantage must be a constant here (定数として扱う). Otherwise this loss
    # would train V(s), too. As -log p is positive, a larger V(s) would make the loss smaller, and
    # V(s) would rise above R.
    loss_policy = -log_prob * tf.stop_gradient(advantage)

    # The critic: move V(s) towards R. (R was computed outside the tape, so V(s') is not moved. In
    # the article, R(t) is this aim and not V(t), and γ·r(t) is γ·r(t+1).)
    loss_value = LOSS_V * tf.square(advantage)

    # The entropy -Σ p·log p is large if both actions are about equally probable. Its negative, as a
    # loss, keeps p from becoming 0 or 1 too early (エントロピー項).
    minus_entropy = tf.reduce_sum(p * tf.math.log(p + 1e-10), axis=1)
    loss_entropy = LOSS_ENTROPY * minus_entropy

    return loss_policy + loss_value + loss_entropy


# == Not needed to understand A3C: options, speed, progress, files =================================

LEARNING_RATE_V1 = 2e-3     # with 5e-3, CartPole-v1 was learned in only 5 of 10 runs

# A line of history.csv. `total_steps` are those of all workers so far.
Episode = collections.namedtuple("Episode", "worker episode steps mean_of_last_10 total_steps")


def read_options(argv):
    """Read the command line. See parse_options."""
    parser = make_parser("Learn CartPole with A3C, then film it.", "A3C", MAX_EPISODES)
    parser.add_argument("--env", default=ENV, choices=["CartPole-v0", "CartPole-v1"],
                        help="episodes of at most 200 or 500 steps")
    parser.add_argument("--workers", default=N_WORKERS, type=positive_number,
                        help="learning threads")
    args = parse_options(parser, argv)
    args.learning_rate = LEARNING_RATE_V1 if args.env == "CartPole-v1" else LEARNING_RATE
    return args


def make_parser(description, folder, max_episodes):
    """Make a parser with the options that the programs in companions/ have, too."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    has_screen = (sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ
                  or "WAYLAND_DISPLAY" in os.environ)
    parser.add_argument("--seed", type=whole_number, help="repeats a run if there is one worker")
    parser.add_argument("--max-episodes", default=max_episodes, type=positive_number,
                        help="give up after this number of episodes, of all workers together")
    parser.add_argument("--test-episodes", default=10, type=whole_number, help="0: no test")
    parser.add_argument("--render", action=argparse.BooleanOptionalAction, default=has_screen,
                        help="show the test in a window")
    parser.add_argument("--out", default=Path("movie", folder), type=Path,
                        help="where the files go")
    parser.add_argument("--play", type=Path, metavar="WEIGHTS", help="test these, do not learn")
    return parser


def parse_options(parser, argv):
    """Read the command line, make the folder --out, and silence gym's notice on CartPole-v0.

    A bad option ends the program with exit status 2.
    """
    args = parser.parse_args(argv)
    if args.play and not (args.play.is_file() and args.play.name.endswith(".weights.h5")):
        parser.error(f"argument --play: {args.play} is not a file whose name ends in .weights.h5")
    make_folder(parser, args.out)
    gym.logger.min_level = gym.logger.ERROR
    return args


def make_folder(parser, folder):
    """Make a folder for files. End the program with exit status 2 if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(f"cannot write to the folder {folder}: {error}")


def whole_number(text, least=0):
    """Read a whole number from `least` to 2^32 - 1."""
    if not text.isdecimal() or not least <= int(text) < 2 ** 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 2^32 - 1")
    return int(text)


positive_number = functools.partial(whole_number, least=1)


def make_env(env_name, seed):
    """Make a gym environment whose resets are all fixed by this seed."""
    env = gym.make(env_name, disable_env_checker=True)      # (the checker takes time)
    env.reset(seed=seed)
    return env


def compile_gradients(model):
    """Compile loss_gradients for this model: it is then ten times as fast.

    (So `print` in it shows no numbers; tf.print does.)
    """
    weights = [tf.TensorSpec(w.shape) for w in model.get_weights()]
    s = tf.TensorSpec([None, NUM_STATES])       # None stands for a batch of any size
    a = tf.TensorSpec([None, NUM_ACTIONS])
    R = tf.TensorSpec([None])
    # autograph=False: it would read this file again, which may have been edited meanwhile.
    function = tf.function(functools.partial(loss_gradients, model), autograph=False)
    return function.get_concrete_function(weights, s, a, R)


def check_predict(parameter_server):
    """End the program if LocalBrain.predict and ParameterServer._build_model disagree."""
    rng = np.random.default_rng(0)
    brain = LocalBrain(parameter_server)
    brain.weights = [rng.normal(size=w.shape).astype(np.float32) for w in brain.weights]
    s = rng.normal(size=(8, NUM_STATES)).astype(np.float32)
    (p, v), _ = parameter_server.model.stateless_call(brain.weights, [], s)
    try:
        p_too, v_too = brain.predict(s)
        agree = np.allclose(p, p_too, atol=1e-4) and np.allclose(v[:, 0], v_too, atol=1e-4)
    except ValueError:          # another number of layers or units
        agree = False
    if not agree:
        sys.exit("error: ParameterServer._build_model and LocalBrain.predict are two different"
                 " networks. Give both the same layers and activations.")


@contextlib.contextmanager
def one_core():
    """Let the threads that start in this `with` share one core, where the system can (Linux).

    The interpreter runs one thread at a time, and to wake a thread on another core takes longer.
    """
    try:
        cores = os.sched_getaffinity(0)
        core = random.SystemRandom().choice(list(cores))    # so that two runs seldom share one
        os.sched_setaffinity(0, {core})
    except (AttributeError, OSError):       # another system, or not allowed
        cores = None
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def handle_signals(handler, *numbers):
    """Let `handler` handle these signals in this `with`. (Only the main thread can do so.)"""
    before = {}
    with contextlib.suppress(ValueError):
        for number in numbers:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old_handler in before.items():
            signal.signal(number, old_handler)


def uninterrupted():
    """Ignore Ctrl-C and SIGTERM in this `with`."""
    return handle_signals(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM)


def say(line):
    """Print a line at once, in one piece. If nobody reads any more (`| head`), go on without."""
    try:
        print(line + "\n", end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_progress(parameter_server, workers):
    """Show the mean of each worker's last ten episodes until learning is over.

    In a terminal as bars, elsewhere as lines. Before a worker's tenth episode this mean still
    contains zeros, as in the article.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f}")
    with Progress(*columns, disable=not rich.get_console().is_interactive) as bars:
        tasks = [bars.add_task(w.name, total=w.environment.max_steps) for w in workers]
        shown = 0
        is_over = False
        while not is_over:
            is_over = parameter_server.stop.wait(.1)    # without a timeout, Windows ignores Ctrl-C
            for task, worker in zip(tasks, workers):
                bars.update(task, completed=worker.environment.total_reward_vec.mean())
            if bars.disable:
                for e in parameter_server.history[shown:]:
                    say(f"{e.worker}  episode {e.episode}  steps {e.steps}"
                        f"  mean of last 10 {e.mean_of_last_10:.1f}")
                    shown += 1


def keep_results(parameter_server, workers, seconds, out):
    """Save weights and history, and say how it went."""
    history = parameter_server.history
    name = "A3C.weights.h5" if parameter_server.is_learned else "A3C.unfinished.weights.h5"
    parameter_server.model.set_weights(parameter_server.weights)
    parameter_server.model.save_weights(out / name)
    with open(out / "history.csv", "w", newline="") as file:
        csv.writer(file).writerows([Episode._fields, *history])
    outcome = "learned" if parameter_server.is_learned else "not learned"
    say(f"{outcome} in {seconds:.1f} s: {parameter_server.frames} steps, {len(history)} episodes,"
        f" {len(workers)} workers, {parameter_server.frames / seconds:.0f} steps/s")
    say(f"weights and history are in {out}")


def load_weights(model, path):
    """Return the weights that an earlier run has saved, or end with exit status 2."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # the error says enough
            model.load_weights(path)
    except Exception as error:
        reason, _, _ = str(error).partition(". ")   # Keras goes on with all the numbers
        print(f"error: {path} does not hold the weights of this network: {reason}", file=sys.stderr)
        sys.exit(2)
    return model.get_weights()


def test(parameter_server, args):
    """Play test episodes. This runs in the main thread, as macOS opens windows in no other."""
    env = gym.make(args.env, render_mode="rgb_array")
    with contextlib.closing(film(env, "A3C", args)) as env:
        environment = Environment("test_thread", "test", parameter_server, env=env)
        play_test(environment.run, args.test_episodes)


def film(env, name, args):
    """Film the first, second and ninth episode (gym's own choice); --render shows all of them."""
    env.reset(seed=args.seed)                           # fixes all later resets, too
    os.environ["SDL_FRAMEBUFFER_ACCELERATION"] = "0"    # Mesa's LLVM and TensorFlow's may clash
    if not args.render:
        os.environ["SDL_VIDEODRIVER"] = "dummy"         # draw without a screen
    env = gym.wrappers.RecordVideo(env, str(args.out), name_prefix=name)
    if args.render:
        env = gym.wrappers.HumanRendering(env)
    return env


def play_test(run_episode, episodes):
    """Play episodes by run_episode, which returns their number of steps, and say how it went."""
    steps = []
    for episode in range(episodes):
        steps.append(run_episode())
        say(f"test  episode {episode + 1}  steps {steps[-1]}")
    if steps:
        say(f"test: mean of {len(steps)} episodes {np.mean(steps):.1f} steps")


def run_program(main):
    """Call `main` and end with the exit status it returns; with 130 after Ctrl-C and SIGTERM."""
    with contextlib.suppress(AttributeError):   # (not every console has this method)
        sys.stdout.reconfigure(errors="backslashreplace")   # for a path that stdout cannot show
    with handle_signals(signal.default_int_handler, signal.SIGTERM):    # SIGTERM is like Ctrl-C
        try:
            status = main()
        except KeyboardInterrupt:
            status = 130
    sys.exit(status)


if __name__ == "__main__":
    run_program(main)

# For `uv run`:
# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#   'tensorflow-cpu>=2.21,<2.22; sys_platform == "linux" and platform_machine == "x86_64"',
#   'tensorflow>=2.21,<2.22; sys_platform != "linux" or platform_machine != "x86_64"',
#   'keras>=3.12,<4', 'gymnasium[classic-control]>=1.4,<2', 'numpy>=2.1,<3', 'rich>=13.7,<16',
#   'moviepy>=2.1,<3']
# ///
