"""How an agent acts, how an episode is played and rewarded, and who may call it learned."""

import threading
import time

import a3c_cartpole as a3c

import numpy as np
import pytest
from conftest import FakeEnv

STATE = np.zeros(4, np.float32)


def make_agent(server, p, thread_type="learning"):
    """An agent whose network gives action 1 the probability p, in every state."""
    agent = a3c.Agent("agent", thread_type, server)
    agent.brain.weights = [np.zeros_like(w) for w in server.weights]
    agent.brain.weights[3] = np.log(np.array([1 - p, p]) + 1e-30)
    return agent


@pytest.mark.parametrize("frames, epsilon", [(0, 0.5), (400, 0.375), (800, 0.25), (1600, 0)])
def test_fraction_of_random_actions_falls_from_a_half_to_0_over_eps_steps(server, frames, epsilon):
    server.frames = frames
    agent = make_agent(server, p=0.0)
    ones = np.mean([agent.act(STATE) for _ in range(5000)])
    assert ones == pytest.approx(epsilon / 2, abs=0.025 if epsilon else 0)  # 4 deviations


@pytest.mark.parametrize("p", [0.1, 0.83])
def test_action_is_drawn_from_p(server, p):
    server.frames = a3c.EPS_STEPS
    agent = make_agent(server, p)
    actions = [agent.act(STATE) for _ in range(5000)]
    assert set(actions) == {0, 1}
    assert np.mean(actions) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 5000))


def test_agents_draw_from_their_own_streams_fixed_by_seed_and_name():
    def draw(seed, name):
        return a3c.Agent(name, "learning", a3c.ParameterServer(seed)).rng.random()

    same = draw(3, "local_thread1")
    assert draw(3, "local_thread1") == same
    others = draw(3, "local_thread2"), draw(4, "local_thread1"), draw(None, "local_thread1")
    assert same not in others


def make_environment(server, length, name="local_thread1", env="CartPole-v0"):
    environment = a3c.Environment(name, "learning", server, env)
    environment.env = FakeEnv(length)
    return environment


@pytest.mark.parametrize("env, limit", [("CartPole-v0", 200), ("CartPole-v1", 500)])
def test_reward_is_0_then_minus_1_for_a_fall_and_plus_1_from_limit_minus_1(server, env, limit):
    for length in 1, 2, limit - 2, limit - 1, limit:
        rewards = []
        environment = make_environment(server, length, env=env)
        environment.agent.advantage_push_local_brain = lambda s, a, r, s_: rewards.append(r)
        environment.run()
        assert rewards == [0] * (length - 1) + [-1 if length < limit - 1 else 1]


def test_each_step_passes_on_s_a_and_s_and_none_at_the_end(server):
    environment = make_environment(server, 23)
    passed, played = [], []
    step = environment.env.step
    environment.env.step = lambda a: played.append(a) or step(a)
    environment.agent.advantage_push_local_brain = lambda *sample: passed.append(sample)
    assert environment.run() == 23
    assert [a for _, a, _, _ in passed] == played
    for i, (s, _, _, s_) in enumerate(passed):  # FakeEnv's state after step i is full of i / 100
        np.testing.assert_allclose(s, np.full(4, i / 100))
        if i < 22:
            np.testing.assert_allclose(s_, np.full(4, (i + 1) / 100))
    assert passed[-1][3] is None


def test_worker_updates_and_pulls_every_t_max_steps_and_at_the_end(server):
    environment = make_environment(server, 27)
    calls = []
    brain, env = environment.agent.brain, environment.env
    brain.update_parameter_server = lambda: calls.append(("update", env.step_count))
    brain.pull_parameter_server = lambda: calls.append(("pull", env.step_count))
    environment.run()
    expected = [(what, step) for step in (10, 20, 27) for what in ("update", "pull")]
    assert calls == [("pull", 0), *expected]


def test_test_worker_takes_the_more_probable_action_and_learns_nothing(server):
    assert {make_agent(server, 0.6, "test").act(STATE) for _ in range(50)} == {1}
    before = server.weights
    environment = a3c.Environment("test_thread", "test", server)
    environment.env = FakeEnv(30)
    assert environment.run() == 30
    assert server.frames == 0 and server.history == [] and server.weights is before


def play(environment, episodes):
    for _ in range(episodes):
        environment.run()


def test_episodes_and_steps_are_counted_and_recorded(server):
    play(make_environment(server, 30), 12)
    assert server.frames == 360
    assert [(e.worker, e.episode, e.steps, e.total_steps) for e in server.history] == [
        ("local_thread1", i, 30, 30 * i) for i in range(1, 13)]
    means = [e.mean_of_last_10 for e in server.history]
    assert means == pytest.approx([3.0 * min(i, 10) for i in range(1, 13)])


@pytest.mark.parametrize("env, limit", [("CartPole-v0", 200), ("CartPole-v1", 500)])
def test_mean_of_limit_minus_1_is_not_enough_and_above_it_is(server, env, limit):
    environment = make_environment(server, limit - 1, env=env)
    play(environment, 10)
    assert server.history[-1].mean_of_last_10 == limit - 1
    assert not server.is_learned and not server.stop.is_set()
    environment.env.length = limit
    environment.run()
    assert server.is_learned and server.stop.is_set()


def test_winner_hands_over_the_mean_of_its_ten_theta(server):
    environment = make_environment(server, 150)
    brain = environment.agent.brain
    brain.update_parameter_server = lambda: None

    def pull():  # in the first episode θ' is full of 1, in the second of 2, ...
        episode = environment.count_trial_each_thread + 1
        brain.weights = [np.full(w.shape, episode, np.float32) for w in server.weights]

    brain.pull_parameter_server = pull
    environment.run()  # 150 steps, so its θ' is not among the ten
    environment.env.length = 200
    play(environment, 10)
    assert server.is_learned
    for weight in server.weights:
        assert weight.dtype == np.float32
        np.testing.assert_allclose(weight, np.mean(range(2, 12)))


class SlowList(list):
    def append(self, item):
        time.sleep(.2)  # let other threads run
        super().append(item)


def test_of_many_that_win_at_once_one_alone_hands_its_weights_over(server):
    environments = [make_environment(server, 200, f"local_thread{i}") for i in range(6)]
    pushed = []
    for environment in environments:
        environment.agent.brain.push_parameter_server = lambda: pushed.append(1)
        play(environment, 9)
    server.history = SlowList(server.history)
    threads = [threading.Thread(target=e.run) for e in environments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pushed == [1] and len(server.history) == 6 * 9 + 1


def test_worker_gives_up_after_exactly_max_episodes():
    server = a3c.ParameterServer(max_episodes=5)
    worker = a3c.WorkerThread("local_thread1", server)
    worker.environment.env = FakeEnv(20)
    worker.run()
    assert len(server.history) == 5 and not server.is_learned and server.stop.is_set()


def test_eight_threads_count_every_step_also_if_python_switches_while_they_count():
    class Server(a3c.ParameterServer):
        @property
        def frames(self):
            frames = self.counted
            time.sleep(0)  # let other threads run between reading and storing
            return frames

        @frames.setter
        def frames(self, frames):
            self.counted = frames

    server = Server()
    threads = [threading.Thread(target=lambda: [server.count_step() for _ in range(200)])
               for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.frames == 8 * 200
