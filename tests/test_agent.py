"""How an agent acts, how an episode is played and rewarded, and who may call it learned."""

import threading
import types

import numpy as np
import pytest
from conftest import FakeEnv, fill_queue

import a3c_cartpole as a3c


def no_update(packed):
    """Stands for the compiled update where a test needs none: θ and mean square as they were."""
    W = 131
    return types.SimpleNamespace(numpy=lambda: np.append(packed[-2 * W :], 0))


def make_server(**options):
    """A server whose brains need not compile an update."""
    server = a3c.ParameterServer(**options)
    server.update_graph = no_update
    return server


@pytest.fixture
def agent():
    return a3c.Agent("agent", make_server(seed=7))


def with_p(agent, p):
    agent.brain.predict_p = lambda s: np.array([[1 - p, p]])
    return agent


STATE = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    "frames, epsilon", [(0, 0.5), (400, 0.375), (800, 0.25), (1600, 0), (1601, 0), (10**7, 0)]
)
def test_share_of_random_actions_falls_from_a_half_to_0_over_eps_steps(agent, frames, epsilon):
    assert a3c.EPS_STEPS == 1600
    agent.parameter_server.frames = frames
    ones = np.mean([with_p(agent, 0.0).act(STATE) for _ in range(20_000)])
    assert ones == pytest.approx(epsilon / 2, abs=0.0125 if epsilon else 0)  # 4 deviations


def test_epsilon_falls_in_200_steps_a_worker():
    agent = a3c.Agent("agent", make_server(workers=2))
    for frames, epsilon in (0, 0.5), (200, 0.25), (400, 0), (401, 0):
        agent.parameter_server.frames = frames
        assert agent.epsilon() == pytest.approx(epsilon)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.83])
def test_frequency_of_the_sampled_action_follows_p(agent, p):
    agent.parameter_server.frames = a3c.EPS_STEPS
    actions = [with_p(agent, p).act(STATE) for _ in range(20_000)]
    assert set(actions) == {0, 1}
    assert np.mean(actions) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 20_000))


def test_agents_draw_from_their_own_streams_fixed_by_seed_and_name():
    def draws(seed, name):
        agents = [a3c.Agent(name, make_server(seed=seed)) for _ in range(2)]
        return [agent.random.random() for agent in agents]

    same, again = draws(3, "local_thread1")
    assert same == again
    others = draws(3, "local_thread2"), draws(4, "local_thread1"), draws(None, "local_thread1")
    assert same not in [draw for pair in others for draw in pair]


def make_environment(server, length, name="local_thread1"):
    environment = a3c.Environment(name, "learning", server)
    environment.env.close()
    environment.env = FakeEnv(length)
    return environment


@pytest.mark.parametrize("env, limit", [("CartPole-v0", 200), ("CartPole-v1", 500)])
def test_reward_is_0_then_minus_1_for_a_fall_and_plus_1_from_limit_minus_1(env, limit):
    for length in 1, 2, limit - 2, limit - 1, limit:
        environment, rewards = make_environment(make_server(env=env), length), []
        environment.agent.advantage_push_local_brain = lambda s, a, r, s_: rewards.append(r)
        environment.run()
        assert rewards == [0] * (length - 1) + [-1 if length < limit - 1 else 1]


def test_each_step_passes_on_its_s_a_and_s_and_none_at_the_end():
    environment, passed, actions = make_environment(make_server(seed=1), 23), [], []
    act, step = environment.agent.act, environment.env.step
    environment.agent.act = lambda s, **k: actions.append(act(s, **k)) or actions[-1]
    played = []
    environment.env.step = lambda a: played.append(a) or step(a)
    environment.agent.advantage_push_local_brain = lambda *sample: passed.append(sample)
    assert environment.run() == 23
    assert [a for _, a, _, _ in passed] == actions == played
    for i, (s, _, _, s_) in enumerate(passed):  # FakeEnv's state after step i is full of i / 100
        np.testing.assert_allclose(s, np.full(4, i / 100))
        if i < 22:
            np.testing.assert_allclose(s_, np.full(4, (i + 1) / 100))
    assert passed[-1][3] is None


def test_worker_updates_and_pulls_every_t_max_steps_and_at_the_end():
    environment, calls = make_environment(make_server(), 27), []
    brain, env = environment.agent.brain, environment.env
    brain.update_parameter_server = lambda: calls.append(("update", env.step_count))
    brain.pull_parameter_server = lambda: calls.append(("pull", env.step_count))
    environment.run()
    expected = [(what, step) for step in (10, 20, 27) for what in ("update", "pull")]
    assert calls == [("pull", 0), *expected]


def test_test_worker_acts_greedily_learns_nothing_and_counts_no_step():
    server = make_server(seed=1)
    environment, asked = a3c.Environment("test_thread", "test", server), []
    environment.env.close()
    environment.env, theta = FakeEnv(30), server.theta
    with_p(environment.agent, 0.6)  # sampled, it would choose 0 in 2 steps of 5
    step = environment.env.step
    environment.env.step = lambda a: asked.append(a) or step(a)
    assert environment.run() == 30
    assert asked == [1] * 30
    assert server.frames == server.updates == len(server.history) == 0
    np.testing.assert_array_equal(server.theta, theta)


def test_batch_of_an_update_never_exceeds_the_rows_compiled_for():
    server, sizes = make_server(), []
    environment = make_environment(server, 1)
    server.apply_update = lambda batch, theta: sizes.append(len(batch))
    for length in range(1, 60):
        environment.env = FakeEnv(length)
        environment.run()
    assert set(sizes) == {a3c.BATCH_ROWS}


def play(environment, episodes):
    for _ in range(episodes):
        environment.run()


def test_episodes_and_steps_are_counted_and_recorded():
    server = make_server()
    play(make_environment(server, 30), 12)
    assert server.frames == 360
    assert [(e.thread, e.episode, e.steps, e.total_steps) for e in server.history] == [
        ("local_thread1", i, 30, 30 * i) for i in range(1, 13)
    ]
    means = [e.mean_of_last_10 for e in server.history]
    assert means == pytest.approx([3.0 * min(i, 10) for i in range(1, 13)])


@pytest.mark.parametrize("env, limit", [("CartPole-v0", 200), ("CartPole-v1", 500)])
def test_mean_of_limit_minus_1_is_not_enough_and_above_it_is(env, limit):
    server = make_server(env=env)
    environment = make_environment(server, limit - 1)
    play(environment, 10)
    assert server.history[-1].mean_of_last_10 == limit - 1 and not server.stop.is_set()
    environment.env.length = limit
    environment.run()
    assert server.is_learned.is_set() and server.stop.is_set()


def test_winner_hands_over_the_mean_of_its_ten_theta():
    server = make_server()
    environment = make_environment(server, 200)
    brain = environment.agent.brain
    brain.update_parameter_server = lambda: None

    def pull():  # in the first episode the brain holds 1, in the second 2, ...
        brain.theta = np.full(131, environment.count_trial_each_thread + 1, np.float32)

    brain.pull_parameter_server = pull
    environment.env.length = 150
    environment.run()  # its θ, 1, is not among the ten
    environment.env.length = 200
    play(environment, 10)
    assert server.is_learned.is_set()
    np.testing.assert_allclose(server.theta, np.mean(range(2, 12)))
    assert server.theta.dtype == np.float32


def test_second_winner_is_ignored():
    server = make_server()
    first, second = (make_environment(server, 200, f"local_thread{i}") for i in (1, 2))
    play(first, 9)
    play(second, 9)
    first.run()
    theta, episodes = server.theta, len(server.history)
    assert server.is_learned.is_set() and episodes == 19
    second.agent.brain.theta = theta + 1
    assert second.run() is None
    assert server.theta is theta and len(server.history) == episodes


def test_of_many_simultaneous_winners_exactly_one_wins():
    server, won, barrier = make_server(), [], threading.Barrier(16)

    def claim(name):
        barrier.wait()
        if server.finish_episode(name, 10, 200, 200.0):
            won.append(name)

    threads = [threading.Thread(target=claim, args=[f"local_thread{i}"]) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and [e.thread for e in server.history] == won


def test_gradient_after_the_win_is_refused(server, brain, rng):
    before = server.theta
    server.stop.set()
    fill_queue(brain, rng, 10)
    brain.update_parameter_server()
    assert server.theta is before and server.updates == 0


def test_push_waits_for_an_update_under_way_which_so_cannot_overwrite_it(server, brain, rng):
    winner = a3c.LocalBrain("winner", server)
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
    winner.theta = np.full_like(server.theta, 3)
    push = threading.Thread(target=winner.push_parameter_server)
    push.start()
    finish.set()
    push.join(20)
    update.join(20)
    assert server.updates == 1 and (server.theta == 3).all()


def test_learning_is_given_up_after_exactly_max_episodes():
    server = make_server(max_episodes=5)
    environment = make_environment(server, 20)
    play(environment, 5)
    assert server.stop.is_set() and not server.is_learned.is_set()
    assert environment.run() is None and len(server.history) == 5


def test_eight_threads_count_every_step_and_episode():
    server = make_server()
    environments = [make_environment(server, 10, f"local_thread{i}") for i in range(8)]
    threads = [threading.Thread(target=play, args=(e, 50)) for e in environments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.frames == 8 * 50 * 10 and len(server.history) == 400
    assert sum(e.steps for e in server.history) == server.frames


def test_one_failing_worker_ends_all_threads():
    server, caught = make_server(), []
    workers = [a3c.WorkerThread(f"local_thread{i}", "learning", server) for i in range(4)]
    for worker in workers:
        worker.environment.env = FakeEnv(50)
    workers[2].environment.env = FakeEnv(10**6, fail_at=500)
    hook, threading.excepthook = threading.excepthook, caught.append
    try:
        a3c.run_threads({w.name: w.run for w in workers}, server.stop, server.failed)
    finally:
        threading.excepthook = hook
    assert not [t for t in threading.enumerate() if t.name.startswith("local_thread")]
    shown = [(c.thread.name, str(c.exc_value)) for c in caught]
    assert shown == [("local_thread2", "the pole broke")] and server.failed == ["local_thread2"]


def test_thread_that_hangs_does_not_hold_up_the_others_or_the_end():
    release, over, ended = threading.Event(), threading.Event(), []
    jobs = {f"hangs{i}": release.wait for i in range(8)}
    jobs["ends"] = lambda: over.wait() and ended.append(True)
    timer = threading.Timer(0.2, over.set)
    timer.start()
    try:
        a3c.run_threads(jobs, over, [])  # 8 that hang are waited for together, not each in turn
        assert ended and not release.is_set()
    finally:
        release.set()
