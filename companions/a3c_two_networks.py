"""A3C (Asynchronous Advantage Actor-Critic) with two networks that four threads share.

Four threads each play a CartPole of their own. The actor computes p, the probability of a push to
the right, the critic V(s), the discounted sum of the rewards to expect from the state s on. The
advantage is how much better it went than the critic expected. No thread has weights of its own.
Every ten steps and at the end of an episode, a thread trains both networks with its episode so far.
Asynchronous: no thread waits until another has played, only until another has trained.

    python -m companions.a3c_two_networks   # learns within seconds; films: movie/a3c_two_networks

This is the program of a post by xiaochus, 「Keras深度强化学习--A3C实现」, for today's libraries.
The post is on jianshu.com (its address could not be confirmed), its code is A3C_sparse.py in
https://github.com/xiaochus/Deep-Reinforcement-Learning-Practice. The post's
classes and methods keep their names and order. Look at these places:

    how a thread plays, and when it trains      Agent.run_episode
    what the critic learns                      Agent.discount_reward, A3C.critic_loss
    what the actor learns                       Agent.train_episode, A3C.actor_loss

The post's list (算法原理) has four steps: 1. copy the shared network, 2. play, 3. compute
gradients, 4. change the shared network by them. Step 1 is missing, here and in the post's code:
each thread trains the shared networks directly, with its own steps. A lock lets only one thread at
a time do 3 and 4. But during 2 there is no lock: other threads change the networks between two
steps of a thread, so many of its actions were drawn with an older p (see Agent.train_episode). In
the main file, a3c_cartpole.py, a thread plays with its own copy. Why no replay memory? Successive
steps of one game resemble each other. Here successive updates mostly come from different threads,
which are in different parts of their games.

Symbols: p, the probability of a push to the right. R (in the code discounted_rewards): the return,
the discounted sum of the rewards from a step on. Unless the episode has ended, V(next_state) stands
for the rewards that have not come yet. T, the number of steps of the episode so far.

What differs from the post, and is needed to read the code:
- tf.function, tf.GradientTape and Keras' Adam replace K.function and get_updates.
- The post's globals: `lock` is in the A3C; `history` is A3C.run.history, and `step`,
  which counts episodes, is its length.
What the post has wrong, marked below with "not as in the post":
- It compares update_iter with the number of finished episodes, not with steps. So all its threads
  train at every step while 9, 19, 29 … episodes are finished, otherwise only at an episode's end.
- It multiplies cross-entropies of shape (T, 1) by advantages of shape (T,). The mean of the table
  (T, T) is the mean cross-entropy times the mean advantage: it is lost which actions were good.
- As entropy it has only p·log p: one of the two terms, with the opposite sign. This pushes p
  towards 0 or 1, instead of keeping it away from them.
- Its actor's loss has one number for each step, and their gradients are added. So the gradient is
  T times as large as that of the mean, which is the loss here.
What is added: learning ends by the main file's rule, when the last ten episodes of a thread have a
mean above 199 steps. The mean of the weights after these ten is kept. An error in a thread ends
learning for all. --seed fixes only the first weights and the random numbers of each thread.
"""
import random
import threading

from a3c_cartpole import one_core
from companions import common

import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

ENV = "CartPole-v0"     # an episode ends after 200 steps at most
NUM_STATES = 4          # cart position, cart velocity, pole angle, pole angular velocity

GAMMA = .95             # a reward k steps later counts GAMMA^k; so their sum is below 20
ACTOR_LR = .001         # learning rate of the actor's Adam
CRITIC_LR = .01         # learning rate of the critic's Adam
ENTROPY = .01           # coefficient of the entropy

# These three are the repository's: model.train(2000, 4, 10).
EPISODE = 2000          # at most this number of episodes, of all threads together
N_THREAD = 4
UPDATE_ITER = 10        # steps of a thread between two of its updates


class A3C:
    """The two networks, and how they change. Post: 「A3C」."""

    def __init__(self, run, seed=None):
        self.run = run                  # counts steps, records episodes, saves
        self.seed = seed
        self.lock = threading.Lock()    # only the thread that holds it may change what is shared
        self.stop = threading.Event()   # learning is over, whatever the reason
        self._build_model()
        self.actor_train, self.critic_train = self._build_optimizer()

    def _build_actor(self):
        """Define the actor: states (T, 4) → p, the probability of a push to the right (T, 1)."""
        inputs = keras.Input((NUM_STATES,))
        x = keras.layers.Dense(20, activation="relu")(inputs)
        x = keras.layers.Dense(20, activation="relu")(x)
        p = keras.layers.Dense(1, activation="sigmoid")(x)
        return keras.Model(inputs, p, name="actor")

    def _build_critic(self):
        """Define the critic: states (T, 4) → their values V(s) (T, 1)."""
        inputs = keras.Input((NUM_STATES,))
        x = keras.layers.Dense(20, activation="relu")(inputs)
        x = keras.layers.Dense(20, activation="relu")(x)
        value = keras.layers.Dense(1, activation="linear")(x)
        return keras.Model(inputs, value, name="critic")

    def _build_model(self):
        """Make both networks, and a model of both, so that one file can hold all weights."""
        if self.seed is not None:
            keras.utils.set_random_seed(self.seed)
        self.actor = self._build_actor()
        self.critic = self._build_critic()
        states = keras.Input((NUM_STATES,))
        outputs = [self.actor(states), self.critic(states)]
        self.model = keras.Model(states, outputs, name="a3c_two_networks")

        # What all threads play with: kernel and bias of the actor's three layers, then of the
        # critic's. A list is never changed. A new one replaces it in a single assignment, so a
        # thread that plays without the lock has either the old weights or the new ones. From the
        # Keras models it could get a mixture, while another thread trains them.
        self.weights = self.model.get_weights()

    def _build_optimizer(self):
        """Make the functions that train the actor and the critic.

        Each takes one step of Adam, and returns the new weights, which is faster than get_weights.
        TensorFlow compiles it at its first call, which is made under the lock, so nothing has to be
        compiled before the threads start (post: 问题1).
        """
        actor_optimizer = keras.optimizers.Adam(ACTOR_LR)
        critic_optimizer = keras.optimizers.Adam(CRITIC_LR)
        states = tf.TensorSpec((None, NUM_STATES))      # None stands for T
        column = tf.TensorSpec((None, 1))

        @tf.function(input_signature=[states, column, column])
        def actor_train(states, actions, advantages):
            variables = self.actor.trainable_variables
            with tf.GradientTape() as tape:
                loss = self.actor_loss(self.actor(states), actions, advantages)
            gradients = tape.gradient(loss, variables)          # 3. compute
            actor_optimizer.apply(gradients, variables)         # 4. change
            return [tf.convert_to_tensor(variable) for variable in variables]

        @tf.function(input_signature=[states, column])
        def critic_train(states, discounted_rewards):
            variables = self.critic.trainable_variables
            with tf.GradientTape() as tape:
                loss = self.critic_loss(self.critic(states), discounted_rewards)
            gradients = tape.gradient(loss, variables)          # 3. compute
            critic_optimizer.apply(gradients, variables)        # 4. change
            return [tf.convert_to_tensor(variable) for variable in variables]

        return actor_train, critic_train

    @staticmethod
    def actor_loss(p, actions, advantages):
        """Compute the actor's loss, one number, from three columns (T, 1).

        Actions with a positive advantage become more probable, those with a negative one less.
        """
        # Binary cross-entropy is -log of the probability of the action: -log p if it is 1, and
        # -log(1 - p) if it is 0. Why the logarithm? A rare action is drawn rarely, so each draw
        # must count more. The logarithm does this: the slope of log p is 1/p times that of p. But
        # it must be the p of the draw. (Shapes and mean: not as in the post.)
        cross_entropy = keras.ops.binary_crossentropy(actions, p)
        policy_loss = tf.reduce_mean(cross_entropy * advantages)

        # The entropy is large if both actions are about equally probable. It is subtracted, because
        # an optimizer makes a loss small: this keeps p from becoming 0 or 1 too early. The 1e-10
        # avoids log 0. (second term and sign: not as in the post)
        entropy = -p * tf.math.log(p + 1e-10) - (1 - p) * tf.math.log(1 - p + 1e-10)
        return policy_loss - ENTROPY * tf.reduce_mean(entropy)

    @staticmethod
    def critic_loss(values, discounted_rewards):
        """Compute the critic's loss: V(s) shall move towards R. Both are columns (T, 1)."""
        return tf.reduce_mean(tf.square(discounted_rewards - values))

    def train(self, episode, n_thread, update_iter):
        """Let threads learn until one meets the rule, or for `episode` episodes of all together."""
        self.episode = episode
        agents = [Agent(i, self, update_iter) for i in range(n_thread)]
        try:
            with one_core():                    # (only for speed)
                for agent in agents:
                    agent.start()               # returns at once; agent.run runs in a new thread
            while not self.stop.wait(.1):       # (without a timeout, Windows ignores Ctrl-C)
                pass
        finally:
            self.stop.set()
            for agent in agents:
                if agent.is_alive():
                    agent.join()

    def load(self, path):
        """Load both networks from a file that `save` has written."""
        self.weights = common.load_weights(self.model, path)

    def save(self):
        """Save both networks, the history and the learning curve."""
        self.model.set_weights(self.weights)
        self.run.keep({self.model.name: self.model})

    def play(self, env):
        """Play an episode with the more probable actions, return its steps. Repository: `play`."""
        state, _ = env.reset()
        steps = 0
        done = False
        while not done:
            p, _ = predict(self.weights, state)
            action = 1 if p[0] > .5 else 0
            state, _, terminated, truncated, _ = env.step(action)
            steps += 1
            done = terminated or truncated
        return steps


def predict(weights, states):
    """Compute p and V(s), each (T, 1), of states (T, 4), or each (1,) of one state (4,).

    Post: actor.predict and critic.predict. The Keras models compute the same, but take more than
    100 times as long for one state. Change both together: main checks that they agree.
    """
    z = np.maximum(three_layers(weights[:6], states), -80)      # exp(-z) cannot overflow
    p = 1 / (1 + np.exp(-z))                                    # sigmoid
    value = three_layers(weights[6:], states)
    return p, value


def three_layers(weights, x):
    """Compute the layers of one network, the last one without an activation."""
    kernel_1, bias_1, kernel_2, bias_2, kernel_3, bias_3 = weights
    x = np.maximum(x @ kernel_1 + bias_1, 0)            # relu
    x = np.maximum(x @ kernel_2 + bias_2, 0)
    return x @ kernel_3 + bias_3


class Agent(threading.Thread):
    """A thread that plays its own CartPole and trains the shared networks. Post: 「Agent」."""

    def __init__(self, index, a3c, update_iter):
        super().__init__(name=a3c.run.workers[index])
        self.a3c = a3c
        self.update_iter = update_iter
        self.rng = random.Random(None if a3c.seed is None else f"{a3c.seed} {self.name}")
        self.env = gym.make(ENV, disable_env_checker=True)
        self.env.reset(seed=self.rng.getrandbits(31))       # fixes all later resets, too
        self.last_ten = common.LastTen()                    # for the rule that ends learning

    def run(self):
        """Play episodes until learning is over for all threads."""
        try:
            while not self.a3c.stop.is_set():
                self.run_episode()
        finally:
            self.a3c.stop.set()         # after an error, too

    def run_episode(self):
        """Play an episode, and train during it and at its end. In the post a part of `run`."""
        a3c = self.a3c
        states = []
        actions = []
        rewards = []
        new_steps = 0       # since the last update
        state, _ = self.env.reset()
        done = False
        while not done:
            # 2. Play: draw an action, 1 (to the right) with probability p, otherwise 0 (to the
            #    left), and do it. The reward is gym's own, 1 for each step. The time limit counts
            #    as an end like any other.
            p, _ = predict(a3c.weights, state)
            action = int(self.rng.random() < p[0])
            next_state, reward, terminated, truncated, _ = self.env.step(action)
            done = terminated or truncated
            states.append(state)
            actions.append(action)
            rewards.append(reward)
            new_steps += 1

            if new_steps == self.update_iter or done:       # not as in the post
                # Python may switch threads at any moment. Without the lock two threads could train
                # at once, and one could erase a part of what the other has changed.
                with a3c.lock:
                    a3c.run.steps += new_steps
                    if a3c.stop.is_set():
                        return          # learning is over, and the weights are final
                    self.train_episode(states, actions, rewards, next_state, done)
                    if done:
                        self.finish_episode(len(rewards))
                new_steps = 0
            state = next_state

    def discount_reward(self, rewards, next_state, done):
        """Compute R of each step, (T,): R = r(t) + γ·r(t+1) + … + γ^k·V(next_state).

        next_state is k steps later, after the last of these steps. If the episode has ended there,
        the last term is missing. γ is GAMMA.
        """
        # If the episode has ended, no more rewards come. Otherwise V(next_state) stands for them,
        # because it is the R that the critic expects there.
        if done:
            cumulative = 0.
        else:
            _, value = predict(self.a3c.weights, next_state)
            cumulative = value[0]

        # From the last step back to the first: R = r + γ·(R of the next step).
        discounted_rewards = np.zeros(len(rewards), np.float32)
        for i in reversed(range(len(rewards))):
            cumulative = rewards[i] + GAMMA * cumulative
            discounted_rewards[i] = cumulative
        return discounted_rewards

    def train_episode(self, states, actions, rewards, next_state, done):
        """Train both networks with all steps of the episode so far. The caller holds the lock.

        So steps are used again: in an episode of 200 steps the first ten are used 20 times. This
        has a good side: each time their R contain more rewards and less of V. And a bad side: their
        actions were drawn with an older p, but the actor's loss is right only for the present p. In
        the paper (Mnih et al., 2016) an update takes only the new steps. The post takes all, too,
        but mostly once, at the end.
        """
        states = np.array(states, np.float32)                           # (T, 4)
        actions = np.array(actions, np.float32).reshape(-1, 1)          # (T, 1)
        discounted_rewards = self.discount_reward(rewards, next_state, done).reshape(-1, 1)

        # How much better it went than the critic expected. This is data, computed in NumPy, so the
        # actor's loss does not change the critic.
        _, values = predict(self.a3c.weights, states)
        advantages = discounted_rewards - values

        critic_weights = self.a3c.critic_train(states, discounted_rewards)
        actor_weights = self.a3c.actor_train(states, actions, advantages)
        # In the order of model.get_weights().
        self.a3c.weights = [weight.numpy() for weight in actor_weights + critic_weights]

    def finish_episode(self, steps):
        """Record an episode. End learning if the rule is met. The caller holds the lock."""
        a3c = self.a3c
        self.last_ten.add(steps, a3c.weights)
        a3c.run.record(self.name, steps, self.last_ten.mean)
        if self.last_ten.meets_rule(a3c.run.limit):
            a3c.weights = self.last_ten.mean_of_weights()
            a3c.run.is_learned = True
        if a3c.run.is_learned or len(a3c.run.history) == a3c.episode:
            a3c.stop.set()


# == Not needed to understand A3C: options, files, test ============================================

def main(argv=None):
    """Learn, then test and film what was learned. Return the exit status."""
    parser = common.make_parser("Learn CartPole with A3C and two networks, then film it.",
                                "a3c_two_networks", EPISODE)
    args = common.read_options(parser, argv)
    limit = gym.spec(ENV).max_episode_steps
    workers = [f"thread{i}" for i in range(N_THREAD)]
    run = common.Run(f"A3C with two networks, {ENV}", limit, args.out, workers)
    a3c = A3C(run, args.seed)
    common.check_same(a3c.model, predict)
    if args.play:
        a3c.load(args.play)
    else:
        try:
            with run:
                a3c.train(args.max_episodes, N_THREAD, UPDATE_ITER)
        finally:
            a3c.save()
        if not run.is_learned:
            return 1
    common.test(ENV, a3c.play, "A3C", args)
    return 0


if __name__ == "__main__":
    common.run_program(main)
