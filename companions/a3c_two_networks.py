"""A3C with two networks, an actor and a critic, that four threads share without copies.

Four threads each play a CartPole of their own. All of them act by one actor, a network that says
how likely a push to the right is, and all of them learn with one critic, a network that says what
a state is worth. Every ten steps, and at the end of an episode, a thread trains both networks with
its episode so far; a lock lets only one thread at a time do this.

    python -m companions.a3c_two_networks   # seconds; films and pictures: movie/a3c_two_networks

This is the program of a post by xiaochus, 「Keras深度强化学习--A3C实现」 (jianshu.com), brought up
to today's libraries. Its code is A3C_sparse.py in
https://github.com/xiaochus/Deep-Reinforcement-Learning-Practice. "The paper" is Mnih et al., 2016,
https://arxiv.org/abs/1602.01783. The classes and methods stand in the order of the post.

To understand                           read
how a thread plays and learns           Agent.run_episode, then Agent.train_episode
what the two networks learn             Agent.discount_reward, then A3C.losses, then A3C.update
how threads share them                  A3C.publish

The post's list (算法原理) has four steps: 1. copy the shared network, 2. play, 3. compute
gradients, 4. change the shared network with them. The numbers in comments are those of this list.
Step 1 is missing, as it is in the post's own code, because no thread has a copy to learn with. In
the main file, a3c_cartpole.py, a thread computes a gradient with its copy and hands it to a
parameter server. Here a thread takes the lock, computes the gradient with the shared weights
themselves, and changes them at once. So a gradient always belongs to the weights that it changes.
The post says why this is enough: what different threads have played is not correlated. So they can
train the one network in turn, and need no replay memory.

Symbols: p the probability of a push to the right. R the return, in the code `discounted_rewards`:
the discounted sum of all rewards from a step on. V(s) the value of the state s: the R that the
critic expects there. T the number of steps of the episode so far.

What differs from the post, and is needed to read the code:
- tf.GradientTape and Keras' Adam replace K.function and get_updates, in one compiled function for
  both networks. TensorFlow 1's session and _make_predict_function are gone.
- Threads act by a NumPy copy of the weights, not by `predict` (see A3C.publish).
- The post's globals are in the A3C, which each agent holds: `lock` is A3C.lock, `history` is in
  A3C.progress, and `step`, which counts episodes in the post, is the length of the history.
What the post has wrong:
- It compares `update_iter` with the number of episodes, not of steps (see Agent.run_episode).
- It multiplies each loss by all advantages (see A3C.losses).
- Its entropy has one of two terms, and the wrong sign (see A3C.losses).
- Its actor loss is not one number but one for each step, and the gradients of all add up, so that
  longer episodes weigh more. Here it is the mean.
What is added for convenience:
- The program ends by the main file's stop rule: as soon as the last ten episodes of one thread have
  a mean above 199 steps. It keeps the mean of the weights after each of these ten. The test takes
  the more probable action. Threads start without a pause of one second, and an error in one ends
  the run. Weights, history and pictures are saved. With --seed the threads take turns, so that a
  run can be repeated.
"""
import collections
import contextlib
import random
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # to run it by its path, too
import a3c_cartpole as base  # isort: skip  (first, because it sets up Keras and TensorFlow)
import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

# -- constants of the game
ENV = "CartPole-v0"     # an episode ends after 200 steps at the latest
NUM_STATES = 4          # cart position, cart velocity, pole angle, pole angular velocity

# -- constants of A3C
GAMMA = .95             # γ: a reward k steps ahead counts γ^k, so that R is 20 at most
ACTOR_LR = .001         # learning rate of the actor's Adam
CRITIC_LR = .01         # of the critic's: larger, because the actor needs a critic that keeps up
ENTROPY = .01           # coefficient of the entropy, which keeps the policy from settling too early
HIDDEN = 20             # units of each of the two hidden layers of a network

# -- constants of the threads
EPISODE = 2000          # the most episodes, of all threads together
N_THREAD = 4
UPDATE_ITER = 10        # steps of a thread between two of its updates


class A3C:
    """The two networks, and how they change. Post: 「A3C」."""

    def __init__(self, seed=None):
        self.seed = seed
        if seed is not None:
            keras.utils.set_random_seed(seed)
        self._build_model()
        self._build_optimizer()
        self.publish(self.actor.get_weights(), self.critic.get_weights())

        # Only the thread that holds this lock may change a network (see Agent.run_episode).
        self.lock = threading.Lock()
        self.steps = 0              # of all episodes that were played to their end
        self.is_learned = False
        # The history of episodes, their limit of steps, and `stop`, a flag that all threads see:
        # learning is over.
        self.progress = base.Progress(ENV, EPISODE)

    def _build_actor(self):
        """Define the actor: states (T, 4) → p, the probability of a push to the right (T, 1)."""
        inputs = keras.Input((NUM_STATES,))
        x = keras.layers.Dense(HIDDEN, activation="relu")(inputs)
        x = keras.layers.Dense(HIDDEN, activation="relu")(x)
        p = keras.layers.Dense(1, activation="sigmoid")(x)
        return keras.Model(inputs, p, name="actor")

    def _build_critic(self):
        """Define the critic: states (T, 4) → their values V(s) (T, 1)."""
        inputs = keras.Input((NUM_STATES,))
        x = keras.layers.Dense(HIDDEN, activation="relu")(inputs)
        x = keras.layers.Dense(HIDDEN, activation="relu")(x)
        value = keras.layers.Dense(1, activation="linear")(x)
        return keras.Model(inputs, value, name="critic")

    def _build_model(self):
        """Make both networks.

        predict_actor and predict_critic compute the same networks in NumPy: change all together.
        check_predictions ends the program if they do not agree.
        """
        self.actor = self._build_actor()
        self.critic = self._build_critic()

    def _build_optimizer(self):
        """Make an optimizer for each network, and compile the function that changes both."""
        self.actor_optimizer = keras.optimizers.Adam(ACTOR_LR)
        self.critic_optimizer = keras.optimizers.Adam(CRITIC_LR)
        self.actor_optimizer.build(self.actor.trainable_variables)
        self.critic_optimizer.build(self.critic.trainable_variables)

        # Compile before the threads start, or several of them would do it at once. The post takes
        # the same care (its 问题1). None stands for T, which differs from update to update.
        states = tf.TensorSpec((None, NUM_STATES))
        actions = tf.TensorSpec((None, 1))
        discounted_rewards = tf.TensorSpec((None, 1))
        self.compiled_update = tf.function(self.update).get_concrete_function(
            states, actions, discounted_rewards)

    def losses(self, p, values, actions, discounted_rewards):
        """Compute the losses of actor and critic, two numbers, from four tensors (T, 1).

        Post: _build_optimizer. Paper: section 4, "Asynchronous advantage actor-critic".
        """
        advantages = discounted_rewards - values    # how much better than the critic expected

        # The actor: actions with a positive advantage become more likely, others less likely. The
        # loss of an action is minus the logarithm of its probability, times its advantage. Binary
        # cross-entropy is this -log: it is -log p where the action is 1, and -log(1 - p) where it
        # is 0. (The post multiplies shapes (T, 1) and (T,), and so gets a table (T, T) of each loss
        # times each advantage. Its mean is the mean loss times the mean advantage, which does not
        # say which of the actions were the good ones.)
        cross_entropy = keras.ops.binary_crossentropy(actions, p)
        policy_loss = tf.reduce_mean(cross_entropy * advantages)

        # The entropy is largest at p = ½, where the policy is most uncertain, and 0 where it is
        # certain. It is subtracted, because an optimizer makes a loss small, and the entropy shall
        # stay large. (The post has only p·log p, and with the opposite sign.) The clip avoids
        # log 0. keras.ops.binary_crossentropy has such a clip of its own.
        p = tf.clip_by_value(p, 1e-7, 1 - 1e-7)
        entropy = tf.reduce_mean(-p * tf.math.log(p) - (1 - p) * tf.math.log(1 - p))
        actor_loss = policy_loss - ENTROPY * entropy

        # The critic: move V(s) towards R, which is a constant here, as DQN's target is.
        critic_loss = tf.reduce_mean(tf.square(advantages))
        return actor_loss, critic_loss

    def update(self, states, actions, discounted_rewards):
        """Take one step of Adam for each network, and return the new weights of both.

        `compiled_update` is this function, compiled by TensorFlow: one call instead of a hundred.
        """
        # 3. Compute the gradients. A persistent tape can be asked for more than one.
        with tf.GradientTape(persistent=True) as tape:
            p = self.actor(states)
            values = self.critic(states)
            actor_loss, critic_loss = self.losses(p, values, actions, discounted_rewards)

        # Each loss changes its own network only. So for the actor the advantage is a constant,
        # without the stop_gradient that the main file needs: there both outputs share a layer.
        actor_variables = self.actor.trainable_variables
        critic_variables = self.critic.trainable_variables
        actor_gradient = tape.gradient(actor_loss, actor_variables)
        critic_gradient = tape.gradient(critic_loss, critic_variables)

        # 4. Change the shared networks.
        self.actor_optimizer.apply(actor_gradient, actor_variables)
        self.critic_optimizer.apply(critic_gradient, critic_variables)

        # Read the new weights here, too. Outside, get_weights of Keras would take almost as long as
        # the rest.
        actor_weights = [tf.convert_to_tensor(variable) for variable in actor_variables]
        critic_weights = [tf.convert_to_tensor(variable) for variable in critic_variables]
        return actor_weights, critic_weights

    def publish(self, actor_weights, critic_weights):
        """Let all threads act by these weights, two lists of kernels and biases in NumPy.

        Not in the post. Threads act without the lock, while Adam in another thread may be changing
        the variables of the Keras models, one after the other. A thread that read these variables
        could find a new kernel beside an old bias. So threads act by lists instead. A list is
        never changed, but replaced by another one in a single assignment, so a thread finds the old
        list or the new one, each complete. To take one more action by the old one does no harm.

        Raises FloatingPointError, and keeps the old lists, if a weight is not finite.
        """
        for weight in actor_weights + critic_weights:
            if not np.isfinite(weight).all():
                update = int(self.actor_optimizer.iterations)
                raise FloatingPointError(f"a weight is not finite after update {update}")
        self.actor_weights = actor_weights
        self.critic_weights = critic_weights

    def predict_actor(self, state):
        """Compute p, the probability of a push to the right, in a state (4,). Post: actor.predict.

        In NumPy, because for a single state even a compiled function takes 50 times as long.
        """
        z = self.output(self.actor_weights, state)
        return .5 + .5 * np.tanh(.5 * z)    # the sigmoid 1 / (1 + e^-z), in a form without overflow

    def predict_critic(self, state):
        """Compute V(s) of a state (4,). Post: critic.predict."""
        return self.output(self.critic_weights, state)

    @staticmethod
    def output(weights, state):
        """Compute the output of either network in a state (4,), before its last activation."""
        kernel_1, bias_1, kernel_2, bias_2, kernel_3, bias_3 = weights
        x = np.maximum(state @ kernel_1 + bias_1, 0)        # relu
        x = np.maximum(x @ kernel_2 + bias_2, 0)
        return (x @ kernel_3 + bias_3)[0]

    def train(self, episode, n_thread, update_iter, log=False):
        """Let threads learn until one meets the stop rule, or `episode` episodes have been played.

        Each of the `n_thread` threads trains every `update_iter` steps. `log` shows the progress as
        a line for each episode instead of a table.
        """
        self.progress.max_episodes = episode
        agents = [Agent(i, self, update_iter) for i in range(n_thread)]

        # Not in the post: a seed fixes the networks at the start and the random numbers of each
        # agent. This alone would not repeat a run, because free threads train in another order each
        # time. So with a seed the agents take turns, from one update to the next.
        names = [agent.name for agent in agents]
        self.progress.start(names, in_turns=self.seed is not None)
        try:
            for agent in agents:
                agent.start()       # returns at once; from now on agent.run runs in its own thread
            base.share_one_core(agents)     # threads in Python gain nothing from a second core
            self.progress.watch(log)        # shows the episodes until learning is over
        finally:
            base.end_threads(agents, self.progress)     # after Ctrl-C, too

    def load(self, path):
        """Load the actor from a file. To play without learning, the critic is not needed."""
        self.actor_weights = base.load_weights(self.actor, path)

    def save(self, out):
        """Save both networks, the history and the learning curve in the folder `out`."""
        self.actor.set_weights(self.actor_weights)
        self.critic.set_weights(self.critic_weights)
        with base.no_interruption():
            base.keep({"actor": self.actor, "critic": self.critic}, self.progress, self.is_learned,
                      self.steps, f"A3C with two networks, {ENV}", out)

    def play(self, env):
        """Play an episode without learning, and return its steps.

        Not in the post: always take the more probable action, as the test of the main file does.
        """
        state, _ = env.reset()
        steps = 0
        done = False
        while not done:
            action = int(self.predict_actor(state) > .5)
            state, _, terminated, truncated, _ = env.step(action)
            steps += 1
            done = terminated or truncated
        return steps


class Agent(threading.Thread):
    """A thread that plays a CartPole of its own and trains the shared networks. Post: 「Agent」.

    It has no weights of its own.
    """

    def __init__(self, index, a3c, update_iter):
        # A daemon is a thread that cannot keep the program from ending.
        super().__init__(name=f"thread{index}", daemon=True)
        self.a3c = a3c
        self.update_iter = update_iter
        seed = None if a3c.seed is None else f"{a3c.seed} {self.name}"
        self.rng = random.Random(seed)
        self.env = gym.make(ENV, disable_env_checker=True)
        self.env.reset(seed=self.rng.getrandbits(31))       # seeds all later resets

        # Not in the post: for the stop rule.
        self.episodes = 0
        self.last_steps = collections.deque([0] * 10, maxlen=10)    # of its last ten episodes
        self.last_actors = collections.deque(maxlen=10)             # weights at the end of each
        self.last_critics = collections.deque(maxlen=10)

    def run(self):
        """Play episodes until learning is over. start() calls this in the new thread.

        Not in the post: `guard` lets an error in one agent end learning for all of them.
        """
        base.guard(self.run_episodes, self.a3c.progress)()

    def run_episodes(self):
        """Play one episode after the other."""
        while not self.a3c.progress.stop.is_set():
            self.run_episode()

    def run_episode(self):
        """Play an episode; every `update_iter` steps and at its end, train with it. Post: run."""
        states = []
        actions = []
        rewards = []
        state, _ = self.env.reset()
        done = False
        while not done:
            # 2. Play: draw an action, 1 (to the right) with the probability p, or else 0 (to the
            #    left), and do it. As in the post, the reward is gym's own, 1 for each step, and the
            #    time limit counts as an end like any other.
            p = self.a3c.predict_actor(state)
            action = int(self.rng.random() < p)
            next_state, reward, terminated, truncated, _ = self.env.step(action)
            done = terminated or truncated
            states.append(state)
            actions.append(action)
            rewards.append(reward)
            state = next_state

            # The post compares update_iter with its count of episodes, by mistake. So its threads
            # train at every step while the 10th, 20th, 30th … episode is due, and at other times
            # only at the end of an episode.
            if len(rewards) % self.update_iter == 0 or done:
                # 3. and 4. Python may switch threads at any moment, and does so while TensorFlow
                #    computes. Without the lock two updates could mix, and one could erase a part of
                #    what the other has changed.
                with self.a3c.lock:
                    self.train_episode(states, actions, rewards, next_state, done)
                    if done:
                        self.finish_episode(len(rewards))
                # Not in the post: do not finish an episode after learning is over. (With --seed,
                # other threads have their turn first.)
                if not self.a3c.progress.may_go_on(self.name):
                    return

    def finish_episode(self, steps):
        """Record an episode and its number of steps, and end learning if the stop rule is met.

        Not in the post, which plays on to its 2000 episodes.
        """
        a3c = self.a3c
        self.episodes += 1
        self.last_steps.append(steps)
        self.last_actors.append(a3c.actor_weights)
        self.last_critics.append(a3c.critic_weights)
        mean = np.mean(self.last_steps)
        meets_rule = mean > a3c.progress.limit - 1      # the main file's rule: above 199 steps
        is_counted = a3c.progress.finish_episode(       # False if learning is already over
            self.name, self.episodes, steps, mean, a3c.steps + steps, meets_rule)
        if is_counted:
            a3c.steps += steps
        if is_counted and meets_rule:
            # As in the main file, keep the mean of the weights after each of the ten episodes. (In
            # this program the last weights alone did as well, in ten runs of ten.)
            a3c.publish(mean_weights(self.last_actors), mean_weights(self.last_critics))
            a3c.is_learned = True

    def discount_reward(self, rewards, next_state, done):
        """Compute the return R of each step, (T,): R = r(t) + γ·r(t+1) + γ²·r(t+2) + …

        `next_state` is the state that the last of these steps led to.
        """
        # If the episode has ended, no rewards follow. If it goes on, V(next_state) stands for all
        # rewards to come, because it is the R that the critic expects there.
        if done:
            cumulative = 0.
        else:
            cumulative = self.a3c.predict_critic(next_state)

        # From the last step back to the first: R = r + γ·(R of the next step).
        discounted_rewards = np.zeros(len(rewards), np.float32)
        for i in reversed(range(len(rewards))):
            cumulative = rewards[i] + GAMMA * cumulative
            discounted_rewards[i] = cumulative
        return discounted_rewards

    def train_episode(self, states, actions, rewards, next_state, done):
        """Train both networks with all steps of the episode so far. The caller holds the lock.

        As in the post, each later update takes the first steps again. Their returns then contain
        more rewards and less of V, but the weights that chose their actions are older by then. The
        post computes the advantages here; in this program `losses` does.
        """
        # Not in the post: once learning is over, the weights are final.
        if self.a3c.progress.stop.is_set():
            return
        states = np.array(states, np.float32)                                           # (T, 4)
        actions = np.array(actions, np.float32).reshape(-1, 1)                          # (T, 1)
        discounted_rewards = self.discount_reward(rewards, next_state, done).reshape(-1, 1)
        actor_weights, critic_weights = self.a3c.compiled_update(
            tf.constant(states), tf.constant(actions), tf.constant(discounted_rewards))
        self.a3c.publish([weight.numpy() for weight in actor_weights],
                         [weight.numpy() for weight in critic_weights])


def mean_weights(lists):
    """Compute the mean of several lists of weights, array by array."""
    return [np.mean(arrays, axis=0) for arrays in zip(*lists)]


def main(argv=None):
    """Learn, then test and film what was learned. Return the exit status."""
    args = read_options(argv)
    a3c = A3C(args.seed)
    check_predictions(a3c)
    if args.play:
        a3c.load(args.play)
    else:
        try:
            a3c.train(args.max_episodes, N_THREAD, UPDATE_ITER, args.log)
        finally:
            a3c.save(args.out)
        if not a3c.is_learned:
            return 1

    env = gym.make(ENV, disable_env_checker=True, render_mode="rgb_array")
    env.reset(seed=args.seed)
    with contextlib.closing(base.film(env, args.out, "A3C", args.render)) as env:
        base.play(lambda: a3c.play(env), args.test_episodes)
    return 0


def read_options(argv):
    """Read the command line of this program."""
    parser = base.make_parser("Learn CartPole with A3C and two networks, then film it.",
                              "movie/a3c_two_networks")
    parser.add_argument("--max-episodes", default=EPISODE, type=base.positive,
                        help="give up after so many episodes of all threads")
    return base.check_options(parser, parser.parse_args(argv))


def check_predictions(a3c):
    """End the program with exit status 1 if the NumPy and the Keras networks disagree."""
    state = np.ones(NUM_STATES, np.float32)
    p = a3c.actor(state[np.newaxis])[0, 0]
    value = a3c.critic(state[np.newaxis])[0, 0]
    try:
        agrees = (np.isclose(a3c.predict_actor(state), p, atol=1e-4)
                  and np.isclose(a3c.predict_critic(state), value, atol=1e-4))
    except ValueError:      # other numbers of layers or units
        agrees = False
    if not agrees:
        sys.exit("error: A3C._build_actor and _build_critic do not define the networks that"
                 " A3C.output computes. Give both the same layers and activations, then start"
                 " again.")


if __name__ == "__main__":
    base.run_program(main)
