"""A3C (Asynchronous Advantage Actor-Critic) with two networks that four threads share.

Four threads each play a CartPole of their own, so that one update is less like the next. This is in
place of a replay memory, from which other methods learn old steps in random order. The actor
computes p, the probability of a push to the right. The critic computes V(s), the discounted sum of
the rewards to expect from the state s on. The advantage of an action is R - V(s): how much more it
brought than the critic expected. Every ten steps and at the end of an episode, a thread trains both
networks with its new steps. Asynchronous: a thread does not wait until others have played, only
until another has trained.

    python companions/a3c_two_networks.py   # learns in 250 to 400 episodes, mostly; its
                                            # films are then in movie/a3c_two_networks

This is the program of a post by xiaochus, 「Keras深度强化学习--A3C实现」, for today's libraries.
The code is A3C_sparse.py in https://github.com/xiaochus/Deep-Reinforcement-Learning-Practice. The
post's classes and methods keep their names and order; load and save are gone. Look at these places:

    how a thread plays, and when it trains      Agent.run_episode
    what the critic learns                      Agent.discount_reward, A3C.critic_loss
    what the actor learns                       Agent.train_episode, A3C.actor_loss

The post's list (算法原理) has four steps: 1. copy the shared network, 2. play, 3. compute
gradients, 4. change the shared network by them. Its program leaves out step 1, and so each thread
trains the shared networks directly. The post's reason: the data of the threads are unrelated (互相
不相关). (This is rather the reason why there is no replay memory. The copy would keep p unchanged
while a thread plays: see Agent.train_episode.) A lock, which the paper does not have, lets only one
thread at a time do 3 and 4.

Symbols: p, the probability of a push to the right. R (in the code discounted_rewards): the return,
the discounted sum of the rewards from a step on. T: the number of steps of an update, at most 10.
"The paper" is Mnih et al., 2016, https://arxiv.org/abs/1602.01783.

What changes the algorithm is marked "not as in the post". companions/README.md lists all.
"""
import random
import threading

import common

import gymnasium as gym
import keras
import numpy as np
import tensorflow as tf

ENV = "CartPole-v0"     # an episode ends after 200 steps at most
NUM_STATES = 4          # cart position, cart velocity, pole angle, pole angular velocity

GAMMA = .95             # γ: a reward k steps later counts γ^k. All are 1: the sum is below 1/(1-γ)
ACTOR_LR = .001         # learning rate of the actor's Adam
CRITIC_LR = .01         # learning rate of the critic's Adam
ENTROPY = .01           # coefficient of the entropy

# These three are the repository's: model.train(2000, 4, 10).
EPISODE = 2000          # at most this number of episodes, of all threads together
N_THREAD = 4
UPDATE_ITER = 10        # steps of a thread between two of its updates


class A3C:
    """The two networks, and how they change. Post: 「A3C」."""

    def __init__(self, seed=None):
        self.seed = seed
        self.lock = threading.Lock()    # only the thread that holds it may train
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
        self.actor = self._build_actor()
        self.critic = self._build_critic()
        states = keras.Input((NUM_STATES,))
        outputs = [self.actor(states), self.critic(states)]
        self.model = keras.Model(states, outputs, name="a3c_two_networks")

        # All threads play in NumPy, with these two lists of weights. So no `predict` has to be
        # compiled before they start (post: 问题1). A list is not changed, but replaced: no thread
        # plays with half of an update. A forward function takes weights and states.
        self.actor_weights = self.actor.get_weights()
        self.critic_weights = self.critic.get_weights()
        self.actor_forward = common.numpy_forward(self.actor)
        self.critic_forward = common.numpy_forward(self.critic)

    def _build_optimizer(self):
        """Make the functions that train the actor and the critic.

        Each lets Adam change the weights once, and returns them (faster than get_weights). The post
        needs K.function, a session and a graph (问题2, 问题3) for this. TensorFlow compiles
        the functions at their first call, which is made under the lock.
        """
        actor_optimizer = keras.optimizers.Adam(ACTOR_LR)
        critic_optimizer = keras.optimizers.Adam(CRITIC_LR)
        states = tf.TensorSpec((None, NUM_STATES))      # None stands for T
        column = tf.TensorSpec((None, 1))

        @tf.function(input_signature=[states, column, column], autograph=False)
        def actor_train(states, actions, advantages):
            variables = self.actor.trainable_variables
            with tf.GradientTape() as tape:
                loss = self.actor_loss(self.actor(states), actions, advantages)
            gradients = tape.gradient(loss, variables)          # step 3
            actor_optimizer.apply(gradients, variables)         # step 4
            return [tf.convert_to_tensor(variable) for variable in variables]

        @tf.function(input_signature=[states, column], autograph=False)
        def critic_train(states, discounted_rewards):
            variables = self.critic.trainable_variables
            with tf.GradientTape() as tape:
                loss = self.critic_loss(self.critic(states), discounted_rewards)
            gradients = tape.gradient(loss, variables)          # step 3
            critic_optimizer.apply(gradients, variables)        # step 4
            return [tf.convert_to_tensor(variable) for variable in variables]

        return actor_train, critic_train

    @staticmethod
    def actor_loss(p, actions, advantages):
        """Compute the actor's loss, one number, from three columns (T, 1).

        Actions with a positive advantage become more probable, those with a negative one less.
        """
        # Binary cross-entropy is -log of the probability of the action: -log p if it is 1, and
        # -log(1 - p) if it is 0. Why the logarithm? A rare action is drawn rarely, so each draw
        # must count more. The logarithm does this: its slope at a probability q is 1/q.
        cross_entropy = keras.ops.binary_crossentropy(actions, p)

        # Each action is multiplied by its own advantage: (T, 1) times (T, 1) is (T, 1). Not as in
        # the post, where K.flatten makes the advantages (T,). Then broadcasting makes a table
        # (T, T), each action times each advantage. Its mean is the mean cross-entropy times the
        # mean advantage: good and bad actions get the same factor.
        policy_loss = tf.reduce_mean(cross_entropy * advantages)

        # The entropy is large if both actions are about equally probable. It is subtracted, because
        # an optimizer makes a loss small. This works against a p near 0 or 1. (Not as in the post:
        # the second term is missing there, and the wrong sign makes p more extreme.)
        entropy = -p * tf.math.log(p + 1e-10) - (1 - p) * tf.math.log(1 - p + 1e-10)
        return policy_loss - ENTROPY * tf.reduce_mean(entropy)

    @staticmethod
    def critic_loss(values, discounted_rewards):
        """Compute the critic's loss: V(s) should move towards R. Both are columns (T, 1)."""
        return tf.reduce_mean(tf.square(discounted_rewards - values))

    def train(self, run, n_thread, update_iter):
        """Let threads learn until a thread's last ten episodes average above 199 steps.

        (Not as in the post, which stops after 2000 episodes. Here this is the limit.)
        """
        self.run = run      # a common.Run: episodes, and the best weights (the post's: the last)
        agents = [Agent(i, self, update_iter) for i in range(n_thread)]
        try:
            with common.one_core():             # faster: only one thread at a time runs anyway
                for agent in agents:
                    agent.start()               # returns at once; agent.run runs in a new thread
            while not self.stop.wait(.1):       # without a timeout, Windows ignores Ctrl-C
                pass
        finally:
            with common.uninterrupted():        # a second Ctrl-C would not wait for them
                self.stop.set()
                for agent in agents:
                    if agent.is_alive():        # (after Ctrl-C some may not have started)
                        agent.join()

    def actor_predict(self, states):
        """Compute p, (T, 1), of states (T, 4), or (1,) of one state (4,)."""
        return self.actor_forward(self.actor_weights, states)

    def critic_predict(self, states):
        """Compute V(s), (T, 1), of states (T, 4), or (1,) of one state (4,)."""
        return self.critic_forward(self.critic_weights, states)


class Agent(threading.Thread):
    """A thread that plays its own CartPole and trains the shared networks. Post: 「Agent」."""

    def __init__(self, index, a3c, update_iter):
        super().__init__(name=f"thread{index}")
        self.a3c = a3c
        self.update_iter = update_iter
        self.rng = random.Random(None if a3c.seed is None else f"{a3c.seed} {self.name}")
        self.env = gym.make(ENV, disable_env_checker=True)
        self.env.reset(seed=self.rng.getrandbits(31))       # fixes all later resets, too

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
        steps = 0
        state, _ = self.env.reset()
        done = False
        while not done:
            # 2. Play: draw an action, 1 (to the right) with probability p, otherwise 0 (to the
            #    left), and do it. The reward is gym's own, 1 for each step. As in the post, the
            #    time limit (truncated) counts as an end, like a fall (terminated).
            p = a3c.actor_predict(state)
            action = int(self.rng.random() < p[0])
            next_state, reward, terminated, truncated, _ = self.env.step(action)
            done = terminated or truncated
            states.append(state)
            actions.append(action)
            rewards.append(reward)
            steps += 1

            # Not as in the post: its `step` counts finished episodes. So it trains mostly at an
            # episode's end only, but at every step while this number is 9, 19, 29, …
            if steps % self.update_iter == 0 or done:
                # Python may switch threads at any moment. Without the lock two threads could train
                # at once, and one could erase a part of what the other has changed.
                with a3c.lock:
                    if a3c.stop.is_set():
                        return          # learning is over, and the weights are final
                    a3c.run.steps += len(rewards)
                    self.train_episode(states, actions, rewards, next_state, done)
                    if done:
                        weights = a3c.actor_weights + a3c.critic_weights    # one list, 12 arrays
                        is_over = a3c.run.finish_episode(self.name, steps, weights)
                        if is_over:
                            a3c.stop.set()
                # Each step is used once, as in the paper. (Not as in the post, which keeps all
                # steps until the episode ends.)
                states = []
                actions = []
                rewards = []
            state = next_state

    def discount_reward(self, rewards, next_state, done):
        """Compute R of each step, (T,): R = r(t) + γ·r(t+1) + … + γ^k·V(next_state).

        next_state follows the last of these steps; k is the number of steps until then.
        """
        # After an episode's end no rewards are counted. Otherwise V(next_state) stands for them,
        # because it is the R that the critic expects there.
        if done:
            cumulative = 0.
        else:
            value = self.a3c.critic_predict(next_state)
            cumulative = value[0]

        # From the last step back to the first: R = r + γ·(R of the next step).
        discounted_rewards = np.zeros(len(rewards), np.float32)
        for i in reversed(range(len(rewards))):
            cumulative = rewards[i] + GAMMA * cumulative
            discounted_rewards[i] = cumulative
        return discounted_rewards

    def train_episode(self, states, actions, rewards, next_state, done):
        """Train both networks with these steps. The caller holds the lock.

        The actor's loss is right only while p is still the p with which the actions were drawn.
        Here others may have trained since then, which changes p a little. A copy would keep p, but
        its gradients would then change weights that have moved on: see a3c_cartpole.py.
        """
        states = np.array(states, np.float32)                           # (T, 4)
        actions = np.array(actions, np.float32).reshape(-1, 1)          # (T, 1)
        discounted_rewards = self.discount_reward(rewards, next_state, done).reshape(-1, 1)

        # How much more each action brought than the critic expected, before it is trained.
        values = self.a3c.critic_predict(states)
        advantages = discounted_rewards - values

        a3c = self.a3c
        a3c.critic_weights = [w.numpy() for w in a3c.critic_train(states, discounted_rewards)]
        a3c.actor_weights = [w.numpy() for w in a3c.actor_train(states, actions, advantages)]


# == Not needed to understand A3C: options, files, test ============================================

def main(argv=None):
    """Learn, then test and film what was learned. Return the exit status."""
    parser = common.make_parser("Learn CartPole with A3C and two networks, then film it.",
                                "a3c_two_networks", EPISODE)
    args = common.parse_options(parser, argv)
    if args.seed is not None:
        keras.utils.set_random_seed(args.seed)
    a3c = A3C(args.seed)
    run = common.Run(a3c.model, gym.make(ENV, render_mode="rgb_array"),
                     f"A3C with two networks, {ENV}", args, [f"thread{i}" for i in range(N_THREAD)])
    if not args.play:
        with run:
            a3c.train(run, N_THREAD, UPDATE_ITER)

    def act(weights, state):
        p = a3c.actor_forward(weights[:6], state)       # the actor's: three layers of two arrays
        return int(p[0] > .5)           # the more probable action

    return run.test(act)


if __name__ == "__main__":
    common.run_program(main)
