"""How an agent acts, how an episode is played and rewarded, and who may call it learned."""

import threading

import gymnasium as gym
import numpy as np
import pytest
from conftest import FakeEnv, fill_queue

import a3c_cartpole as a3c


@pytest.fixture
def agent(server):
    return a3c.Agent("agent", server)


@pytest.mark.parametrize(
    "frames, epsilon", [(0, 0.5), (400, 0.375), (800, 0.25), (1600, 0), (1601, 0), (10**7, 0)]
)
def test_epsilon_falls_from_a_half_to_0_over_eps_steps(server, frames, epsilon):
    assert a3c.EPS_STEPS == 1600
    server.frames = frames
    assert server.epsilon() == pytest.approx(epsilon)


def test_epsilon_falls_in_200_steps_a_worker():
    server = a3c.ParameterServer(workers=2)
    server.frames = 200
    assert server.epsilon() == pytest.approx(0.25)


@pytest.mark.parametrize("frames, share", [(0, 0.5 * 0.5), (800, 0.25 * 0.5), (1600, 0.0)])
def test_share_of_random_actions_is_epsilon(server, agent, frames, share):
    agent.brain.predict_p = lambda s: np.array([[1.0, 0.0]])
    server.frames = frames
    ones = sum(agent.act(np.zeros(4, np.float32)) for _ in range(20_000))
    assert ones / 20_000 == pytest.approx(share, abs=0.0125)  # four standard deviations


@pytest.mark.parametrize("p", [0.1, 0.5, 0.83])
def test_frequency_of_the_sampled_action_follows_p(server, agent, p):
    server.frames = a3c.EPS_STEPS
    agent.brain.predict_p = lambda s: np.array([[1 - p, p]])
    actions = [agent.act(np.zeros(4, np.float32)) for _ in range(20_000)]
    assert set(actions) == {0, 1}
    assert np.mean(actions) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 20_000))


def test_greedy_action_is_the_most_probable_whatever_epsilon(server, agent):
    agent.brain.predict_p = lambda s: np.array([[0.4, 0.6]])
    assert {agent.act(np.zeros(4, np.float32), greedy=True) for _ in range(100)} == {1}


def server_without_updates(**options):
    """A server whose brains need not compile what no update of the test will call."""
    server = a3c.ParameterServer(**options)
    server.update_graph = False
    return server


def test_agents_draw_from_their_own_streams_fixed_by_seed_and_name():
    def draws(seed, name):
        agents = [a3c.Agent(name, server_without_updates(seed=seed)) for _ in range(2)]
        return [agent.random.random() for agent in agents]

    same, again = draws(3, "local_thread1")
    assert same == again
    assert same not in draws(3, "local_thread2") + draws(4, "local_thread1") + draws(
        None, "local_thread1"
    )


def played(server, length, episodes=1, name="local_thread1"):
    """An environment that has played this many episodes of this length."""
    environment = a3c.Environment(name, "learning", server)
    environment.env = FakeEnv(length)
    environment.agent.brain.update_parameter_server = lambda: None
    for _ in range(episodes):
        environment.run()
    return environment


@pytest.mark.parametrize("env, limit", [("CartPole-v0", 200), ("CartPole-v1", 500)])
def test_reward_is_0_then_minus_1_for_a_fall_and_plus_1_from_limit_minus_1(env, limit):
    for length in 1, 2, limit - 2, limit - 1, limit:
        server = server_without_updates(env=env)
        environment = a3c.Environment("local_thread1", "learning", server)
        assert server.limit == limit
        environment.env, rewards = FakeEnv(length), []
        environment.agent.advantage_push_local_brain = lambda s, a, r, s_: rewards.append(
            (r, s_ is None)
        )
        environment.run()
        assert rewards == [(0, False)] * (length - 1) + [(-1 if length < limit - 1 else 1, True)]


def test_worker_updates_and_pulls_every_t_max_steps_and_at_the_end(server):
    environment = a3c.Environment("local_thread1", "learning", server)
    environment.env, calls, brain = FakeEnv(27), [], environment.agent.brain
    brain.update_parameter_server = lambda: calls.append(("update", environment.env.step_count))
    brain.pull_parameter_server = lambda: calls.append(("pull", environment.env.step_count))
    environment.run()
    assert calls == [("pull", 0)] + [
        (what, step) for step in (10, 20, 27) for what in ("update", "pull")
    ]


def test_batch_of_an_update_never_exceeds_the_rows_compiled_for(server):
    environment, sizes = a3c.Environment("local_thread1", "learning", server), []
    brain = environment.agent.brain

    def update():
        sizes.append(len(brain.train_queue[0]))
        if sizes[-1] >= a3c.MIN_BATCH:
            brain.train_queue = [[], [], [], [], []]

    brain.update_parameter_server = update
    for length in range(1, 60):
        environment.env = FakeEnv(length)
        environment.run()
    assert max(sizes) <= a3c.BATCH_ROWS


def test_episodes_and_steps_are_counted_and_recorded(server):
    environment = played(server, 30, episodes=12)
    assert (
        server.frames == 360 and server.episodes == 12 and environment.count_trial_each_thread == 12
    )
    assert [(e.thread, e.episode, e.steps, e.total_steps) for e in server.history] == [
        ("local_thread1", i, 30, 30 * i) for i in range(1, 13)
    ]
    assert [round(e.mean_of_last_10, 6) for e in server.history] == [
        3.0 * min(i, 10) for i in range(1, 13)
    ]


def test_mean_of_199_is_not_enough_and_above_it_is(server):
    environment = played(server, 199, episodes=10)
    assert environment.total_reward_vec.mean() == 199 and not server.is_learned.is_set()
    environment.env.length = 200
    environment.run()
    assert server.is_learned.is_set() and server.stop.is_set() and server.winner == "local_thread1"


def test_stop_rule_of_cartpole_v1_is_its_own_limit():
    server = server_without_updates(env="CartPole-v1")
    environment = played(server, 499, episodes=10)
    assert not server.is_learned.is_set()
    environment.env.length = 500
    environment.run()
    assert server.is_learned.is_set()


def test_winner_pushes_its_weights_and_the_second_winner_is_ignored(server):
    first, second = (
        played(server, 200, episodes=9),
        played(server, 200, episodes=9, name="local_thread2"),
    )
    for environment, value in (first, 1.0), (second, 2.0):
        environment.agent.brain.pull_parameter_server = lambda: None
        environment.agent.brain.model.set_weights(
            [np.full(w.shape, value, np.float32) for w in server.model.get_weights()]
        )
    first.run()
    assert all((w == 1).all() for w in server.model.get_weights())
    assert second.run() is None
    assert not server.finish_episode("local_thread2", 10, 200, 200.0)
    assert all((w == 1).all() for w in server.model.get_weights())
    assert server.winner == "local_thread1" and server.episodes == 19


def test_of_many_simultaneous_winners_exactly_one_wins(server):
    won, barrier = [], threading.Barrier(16)

    def claim(name):
        barrier.wait()
        if server.finish_episode(name, 10, 200, 200.0):
            won.append(name)

    threads = [threading.Thread(target=claim, args=(f"local_thread{i}",)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [server.winner] and server.episodes == 1


def test_gradients_after_the_win_are_refused(server, rng):
    brain = a3c.LocalBrain("brain", server)
    before = [w.copy() for w in server.model.get_weights()]
    server.is_learned.set()
    fill_queue(brain, rng, 10)
    brain.update_parameter_server()
    for a, b in zip(before, server.model.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert int(server.optimizer.iterations) == 0


def test_push_waits_for_an_update_under_way_which_so_cannot_overwrite_it(server, rng):
    brain = a3c.LocalBrain("brain", server)
    began, finish, real = threading.Event(), threading.Event(), server.update_graph

    def slow(packed):
        began.set()
        assert finish.wait(20)
        return real(packed)

    server.update_graph = slow
    fill_queue(brain, rng, 10)
    update = threading.Thread(target=brain.update_parameter_server)
    update.start()
    assert began.wait(20)
    winner = a3c.LocalBrain("winner", server)
    winner.model.set_weights([np.full(w.shape, 3, np.float32) for w in server.model.get_weights()])
    server.is_learned.set()
    push = threading.Thread(target=winner.push_parameter_server)
    push.start()
    push.join(0.2)
    assert push.is_alive()
    finish.set()
    push.join(20)
    update.join(20)
    assert all((w == 3).all() for w in server.model.get_weights())
    assert (server.newest[1] == 3).all()


def test_update_that_has_just_ended_publishes_nothing_over_the_winners_push(server, rng):
    brain, winner = a3c.LocalBrain("brain", server), a3c.LocalBrain("winner", server)
    winner.model.set_weights([np.full(w.shape, 3, np.float32) for w in winner.model.get_weights()])
    idle = server.idle

    class PushAtTheFirstChance:
        """The condition `idle`, after whose first release the winner pushes at once."""

        notify_all = idle.notify_all

        def __enter__(self):
            idle.acquire()

        def __exit__(self, *_):
            idle.release()
            server.idle = idle
            winner.push_parameter_server()

    server.idle = PushAtTheFirstChance()
    fill_queue(brain, rng, 10)
    brain.update_parameter_server()
    assert server.idle is idle and (server.newest[1] == 3).all()


def test_learning_is_given_up_after_exactly_max_episodes():
    server = server_without_updates(max_episodes=5)
    environment = played(server, 20, episodes=7)
    assert server.episodes == len(server.history) == 5 and server.frames == 100
    assert server.stop.is_set() and not server.is_learned.is_set()
    assert environment.run() is None


def test_eight_threads_count_every_step_and_episode(server):
    def play(i):
        played(server, 10, episodes=50, name=f"local_thread{i}")

    threads = [threading.Thread(target=play, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.frames == 8 * 50 * 10 and server.episodes == len(server.history) == 400
    assert sum(e.steps for e in server.history) == server.frames
    assert [e.total_steps for e in server.history] == sorted(e.total_steps for e in server.history)


def test_test_worker_waits_for_the_win_then_plays_its_episodes_with_unchanged_weights(capsys):
    server = a3c.ParameterServer(test_episodes=3, seed=1)
    worker, played_steps = a3c.WorkerThread("test_thread", "test", server), []
    thread = threading.Thread(target=lambda: played_steps.extend(worker.run()))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not played_steps
    server.is_learned.set()
    thread.join(20)
    assert len(played_steps) == 3 and server.frames == 0 and int(server.optimizer.iterations) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [int(line.split()[-1]) for line in printed[:3]] == played_steps
    assert printed[3] == f"test: mean of 3 episodes {np.mean(played_steps):.1f} steps"


def test_environment_is_made_with_its_own_limit():
    assert gym.spec("CartPole-v0").max_episode_steps == 200
    environment = a3c.Environment("x", "learning", a3c.ParameterServer(env="CartPole-v1"))
    assert environment.env.spec.max_episode_steps == environment.parameter_server.limit == 500
