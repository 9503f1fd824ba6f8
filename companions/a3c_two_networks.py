"""A3C with two networks, an actor and a critic, that four threads share without copies.

Four threads each play a CartPole of their own. All of them act by one actor, a network that says
how likely a push to the right is, and all of them learn with one critic, a network that says what
a state is worth. Every ten steps a thread takes the episode that it is playing and changes both
networks with it; one lock lets only one thread at a time do so.

    python -m companions.a3c_two_networks   # learns; films, pictures: movie/a3c_two_networks

This is the program of a post by xiaochus, 「Keras深度强化学习--A3C实现」 (jianshu.com), brought up
to today's libraries. Its code is A3C_sparse.py in
https://github.com/xiaochus/Deep-Reinforcement-Learning-Practice. "The paper" is Mnih et al., 2016,
https://arxiv.org/abs/1602.01783. The classes and methods stand in the order of the post.

To understand                           read
how a thread plays and learns           Agent.run_episode, then Agent.train_episode
what the two networks learn             Agent.discount_reward, then A3C.losses, then A3C.update
how threads share them                  A3C.publish

In the main file, a3c_cartpole.py, a thread computes a gradient with its own copy of the weights,
and a parameter server applies it. Here there is no copy and no server: under the lock, a thread
computes the gradient with the shared weights themselves, and changes them at once. The post says
why this is enough: successive steps of one game resemble each other, but the steps of four games
that go on at the same time do not. So of the four steps in the post's list (算法原理), step 1, to
copy the shared network, drops out. The numbers 2. to 4. in comments are those of this list.

What differs from the post, and is needed to read the code:
- tf.GradientTape and Keras' Adam replace K.function and get_updates, in one compiled function for
  both networks. TensorFlow 1's session and _make_predict_function are gone.
- Threads act by a NumPy copy of the weights, not by `predict` (see A3C.publish).
- The globals `history`, `step` and `lock` are attributes of A3C. An agent holds its A3C instead of
  six of its parts.
What the post has wrong:
- It compares `update_iter` with the number of episodes, not of steps (see Agent.run_episode).
- It multiplies each loss by all advantages (see A3C.losses).
- Its entropy has one of two terms, and the wrong sign (see A3C.losses).
- Its actor loss is not one number but one for each step, and the gradients of all add up, so that
  longer episodes weigh more. Here it is the mean.
What is added for convenience:
- The program ends by itself, and then keeps the mean of the weights of ten episodes. Threads start
  without a pause of one second. An error in one thread ends the run. The test takes the more
  probable action. Weights, history and pictures are saved. With --seed a run can be repeated,
  because then the threads take turns.

Symbols: p the probability of a push to the right. V(s) the value of the state s, R the return, in
the code `discounted_rewards`; Agent.discount_reward explains both. Shapes: T steps of an episode so
far.
"""
import collections
import contextlib
import random
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # to run it by its path, too
import a3c_cartpole as base  # noqa: I001   first, because it sets up Keras and TensorFlow
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
        The program checks at its start that they agree.
        """
        self.actor = self._build_actor()
        self.critic = self._build_critic()

    def _build_optimizer(self):
        """Make an optimizer for each network, and compile the function that changes both."""
        self.actor_optimizer = keras.optimizers.Adam(ACTOR_LR)
        self.critic_optimizer = keras.optimizers.Adam(CRITIC_LR)
        self.actor_optimizer.build(self.actor.trainable_variables)
        self.critic_optimizer.build(self.critic.trainable_variables)

        # None stands for T, which differs from update to update.
        states = tf.TensorSpec((None, NUM_STATES))
        actions = tf.TensorSpec((None, 1))
        discounted_rewards = tf.TensorSpec((None, 1))
        self.compiled_update = tf.function(
            self.update, input_signature=[states, actions, discounted_rewards])
        # The next line compiles it. This must be over before the threads start, or several of them
        # would do it at once. The post takes the same care (its 问题1).
        self.compiled_update.get_concrete_function()

    def losses(self, p, values, actions, discounted_rewards):
        """The losses of actor and critic, two numbers, from four tensors (T, 1).

        Post: _build_optimizer. Paper: section 4, "Asynchronous advantage actor-critic".
        """
        # The advantage says how much better it went than the critic expected. The post multiplies
        # shapes (T, 1) and (T,), and so gets a table (T, T) of each loss times each advantage. Its
        # mean is the mean loss times the mean advantage, which tells no step from another.
        advantages = discounted_rewards - values

        # The actor: actions with a positive advantage become more likely, others less likely. The
        # loss of an action is minus the logarithm of its probability, times its advantage. Binary
        # cross-entropy is this: -log p where the action is 1, and -log(1 - p) where it is 0.
        cross_entropy = keras.ops.binary_crossentropy(actions, p)
        policy_loss = tf.reduce_mean(cross_entropy * advantages)

        # The entropy of the two probabilities p and 1 - p is large while the policy hesitates. It
        # is subtracted, because an optimizer makes a loss small and the entropy shall stay large.
        # (The post has only its first term, p·log p, and with the opposite sign.) The clip avoids
        # log 0; keras.ops.binary_crossentropy clips in the same way. Adding 1e-10, as the post
        # does, would not help for 1 - p: TensorFlow may compute 1 - p + 1e-10 as (1 + 1e-10) - p,
        # and in float32 1 + 1e-10 is 1.
        p = tf.clip_by_value(p, 1e-7, 1 - 1e-7)
        entropy = tf.reduce_mean(-p * tf.math.log(p) - (1 - p) * tf.math.log(1 - p))
        actor_loss = policy_loss - ENTROPY * entropy

        # The critic: move V(s) towards R.
        critic_loss = tf.reduce_mean(tf.square(advantages))
        return actor_loss, critic_loss

    def update(self, states, actions, discounted_rewards):
        """Take one step of Adam for each network. Return the weights of both, as they are then.

        TensorFlow compiles this function, so that one call replaces a hundred small ones.
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

        actor_weights = [tf.convert_to_tensor(variable) for variable in actor_variables]
        critic_weights = [tf.convert_to_tensor(variable) for variable in critic_variables]
        return actor_weights, critic_weights

    def publish(self, actor_weights, critic_weights):
        """Make these the weights by which all threads act: lists of kernels and biases in NumPy.

        Not in the post. Adam changes the variables of a Keras model in place, one after the other,
        while other threads go on acting without the lock. If they read these variables, they could
        find a new kernel beside an old bias. So they act by the lists instead. A list is never
        changed, but replaced by another one in a single assignment. A thread that acts in the same
        moment finds the old list or the new one, each complete. With the old one it acts as it
        would have done just before the update, and that does no harm.

        Raises FloatingPointError, and keeps the old lists, if a weight is not finite.
        """
        for weight in actor_weights + critic_weights:
            if not np.isfinite(weight).all():
                update = int(self.actor_optimizer.iterations)
                raise FloatingPointError(f"a weight is not finite after update {update}")
        self.actor_weights = actor_weights
        self.critic_weights = critic_weights

    def predict_actor(self, state):
        """p, the probability of a push to the right in a state (4,). Post: actor.predict.

        In NumPy, because for a single state even a compiled function takes 50 times as long.
        """
        z = self.output(self.actor_weights, state)
        return .5 + .5 * np.tanh(.5 * z)    # the sigmoid 1 / (1 + e^-z), in a form without overflow

    def predict_critic(self, state):
        """V(s) of a state (4,). Post: critic.predict."""
        return self.output(self.critic_weights, state)

    @staticmethod
    def output(weights, state):
        """The output of either network in a state (4,), before its last activation."""
        kernel_1, bias_1, kernel_2, bias_2, kernel_3, bias_3 = weights
        x = np.maximum(state @ kernel_1 + bias_1, 0)        # relu
        x = np.maximum(x @ kernel_2 + bias_2, 0)
        return (x @ kernel_3 + bias_3)[0]

    def train(self, episode, n_thread, update_iter, log=False):
        """Let threads learn for at most `episode` episodes of them all, and show the progress.

        Each of the `n_thread` threads makes an update every `update_iter` steps. With `log`, the
        progress is a line for each episode instead of a table.
        """
        self.progress.max_episodes = episode
        self.progress.workers = n_thread
        agents = [Agent(i, self, update_iter) for i in range(n_thread)]
        if self.seed is not None:
            self.progress.turns.start([agent.name for agent in agents])
        self.progress.started = time.perf_counter()
        try:
            for agent in agents:
                agent.start()       # returns at once; from now on agent.run runs in its own thread
            base.share_one_core(agents)
            self.progress.watch(log)        # until learning is over
        finally:
            # After Ctrl-C, too: tell the agents to stop, and wait until they have.
            self.progress.stop.set()
            for agent in agents:
                if agent.is_alive():
                    agent.join(2)

    def load(self, path):
        """Load the actor from a file. A program that only plays needs no critic."""
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
        step = 0
        done = False
        while not done:
            action = int(self.predict_actor(state) > .5)
            state, _, terminated, truncated, _ = env.step(action)
            step += 1
            done = terminated or truncated
        return step


class Agent(threading.Thread):
    """A thread that plays a CartPole of its own and trains the shared networks. Post: 「Agent」.

    It has no weights of its own.
    """

    def __init__(self, index, a3c, update_iter):
        # A daemon is a thread that cannot keep the program from ending.
        super().__init__(name=f"thread{index}", daemon=True)
        self.a3c = a3c
        self.update_iter = update_iter
        # --seed fixes the networks at the start and the random numbers of each agent. This alone
        # would not repeat a run, because free threads change the networks in another order each
        # time. So with --seed the agents also take turns, from one update to the next.
        self.rng = random.Random(None if a3c.seed is None else f"{a3c.seed} {self.name}")
        self.env = gym.make(ENV, disable_env_checker=True)
        self.env.reset(seed=self.rng.getrandbits(31))               # seeds all later resets

        # Not in the post: for the rule that ends learning.
        self.episodes = 0
        self.last_steps = collections.deque([0] * 10, maxlen=10)    # of its last ten episodes
        self.last_actors = collections.deque(maxlen=10)             # weights at the end of each
        self.last_critics = collections.deque(maxlen=10)

    def run(self):
        """Play episodes until learning is over. start() calls this in the new thread."""
        progress = self.a3c.progress
        progress.turns.wait(self.name)      # only with --seed
        try:
            while not progress.stop.is_set():
                self.run_episode()
        except Exception:
            # Not in the post: an error in one agent ends learning for all. Python prints the first
            # one; another agent that fails in the same moment stays silent.
            with progress.lock:
                is_first = progress.failed is None
                if is_first:
                    progress.failed = self.name
            if is_first:
                raise
        finally:
            progress.stop.set()
            progress.turns.pass_on(self.name)

    def run_episode(self):
        """Play an episode; every `update_iter` steps and at its end, train with it. Post: run."""
        states = []
        actions = []
        rewards = []
        state, _ = self.env.reset()
        done = False
        while not done:
            # 2. Play: draw an action, 1 (to the right) with the probability p or else 0, and do it.
            # As in the post, the reward is gym's own, 1 for each step, and the time limit counts as
            # an end like any other.
            p = self.a3c.predict_actor(state)
            action = int(self.rng.random() < p)
            next_state, reward, terminated, truncated, _ = self.env.step(action)
            done = terminated or truncated
            states.append(state)
            actions.append(action)
            rewards.append(reward)
            state = next_state

            # The post compares update_iter with the number of episodes, by mistake: so it trains at
            # every step while the tenth, the twentieth … episode is due, and else at the end only.
            if len(rewards) % self.update_iter == 0 or done:
                # Python may switch threads at any moment, and does so while TensorFlow computes.
                # Without the lock two updates could mix, and one could erase a part of what the
                # other has changed.
                with self.a3c.lock:
                    self.train_episode(states, actions, rewards, next_state, done)
                    if done:
                        self.finish_episode(len(rewards))
                # Not in the post: with --seed, let the others have their turn. Leave the episode
                # if learning is over.
                if not self.a3c.progress.may_go_on(self.name):
                    return

    def finish_episode(self, step):
        """Count an episode of so many steps, and end learning if the last ten meet the rule.

        Not in the post, which plays on to its 2000 episodes.
        """
        a3c = self.a3c
        self.episodes += 1
        self.last_steps.append(step)
        self.last_actors.append(a3c.actor_weights)
        self.last_critics.append(a3c.critic_weights)
        mean = np.mean(self.last_steps)
        meets_rule = mean > a3c.progress.limit - 1      # the main file's rule: above 199 steps
        is_counted = a3c.progress.finish_episode(       # False if learning is already over
            self.name, self.episodes, step, mean, a3c.steps + step, meets_rule)
        if not is_counted:
            return
        a3c.steps += step
        if meets_rule:
            # As in the main file, keep the mean of the weights at the end of each of the ten
            # episodes. (In this program the last weights alone did as well, in ten runs of ten.)
            a3c.publish(mean_weights(self.last_actors), mean_weights(self.last_critics))
            a3c.is_learned = True

    def discount_reward(self, rewards, next_state, done):
        """The return R of each step, (T,).

        R = r(t) + γ·r(t+1) + γ²·r(t+2) + … is the discounted sum of all rewards from a step on.
        V(s) is the critic's prediction of R in the state s, before anyone knows how it goes on.
        """
        # After the last step here, nothing follows if the episode has ended. If it goes on, V of
        # the state that the step led to stands for all rewards to come.
        if done:
            cumulative = 0.
        else:
            cumulative = self.a3c.predict_critic(next_state)

        # From the last step back to the first: R = r + γ·(R of the next step).
        discount_rewards = np.zeros(len(rewards), np.float32)
        for i in reversed(range(len(rewards))):
            cumulative = rewards[i] + GAMMA * cumulative
            discount_rewards[i] = cumulative
        return discount_rewards

    def train_episode(self, states, actions, rewards, next_state, done):
        """Train both networks with all steps of the episode so far.

        The caller holds the lock. As in the post, a later update takes the first steps again: their
        returns then reach further, but they were played with weights that are older by then.
        """
        # Not in the post: once learning is over, the weights are final.
        if self.a3c.progress.stop.is_set():
            return
        discounted_rewards = self.discount_reward(rewards, next_state, done)
        actor_weights, critic_weights = self.a3c.compiled_update(
            tf.constant(np.array(states, np.float32)),                      # (T, 4)
            tf.constant(np.array(actions, np.float32)[:, np.newaxis]),      # (T, 1)
            tf.constant(discounted_rewards[:, np.newaxis]))                 # (T, 1)
        self.a3c.publish([weight.numpy() for weight in actor_weights],
                         [weight.numpy() for weight in critic_weights])


def mean_weights(lists):
    """The mean of several lists of weights, array by array."""
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
