"""A3C with Ray: its classes without Ray, then runs on two nodes that lose a worker or server."""

import contextlib
import os
import runpy
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

import a3c_cartpole as a3c
from companions import a3c_ray, common

import numpy as np
import pytest


class Handle:
    """Stands for an actor's handle: `method.remote` calls the method at once, in this process."""

    def __init__(self, actor):
        self.actor = actor

    def __getattr__(self, method):
        return types.SimpleNamespace(remote=getattr(self.actor, method))


@pytest.fixture
def no_ray(monkeypatch):
    """What the program asks of Ray, answered without it. A result may be an error."""
    def get(result):
        if isinstance(result, Exception):
            raise result
        return result

    def actor_class(cls):
        return types.SimpleNamespace(remote=lambda *arguments: Handle(cls(*arguments)))

    monkeypatch.setattr(a3c_ray, "ray", types.SimpleNamespace(
        init=lambda *_, **__: None, shutdown=lambda: None, cluster_resources=lambda: {"CPU": 3.},
        remote=lambda num_cpus: actor_class, get=get, wait=lambda results, **_: (results, []),
        exceptions=types.SimpleNamespace(RayActorError=ConnectionAbortedError)))


def test_one_worker_plays_the_same_episodes_as_one_thread_of_the_main_file(no_ray):
    here = a3c.ParameterServer(seed=5, max_episodes=12)
    a3c.WorkerThread("one", "learning", here).run()
    server = a3c_ray.Server(seed=5, max_episodes=12)
    a3c_ray.Worker().run("one", Handle(server), 5, "CartPole-v0")

    assert server.history == here.history and len(here.history) == 12
    assert (server.weights[0] != a3c.ParameterServer(seed=5).weights[0]).any()
    for one, other in zip(server.weights, here.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradients_change_the_server_and_other_workers_see_it_at_their_next_update(no_ray):
    server = a3c_ray.Server(seed=5)
    expected = a3c.ParameterServer(seed=5)
    a, b = [a3c_ray.RemoteServer(Handle(server), seed=None) for _ in range(2)]
    before = server.weights[0]
    gradients = [np.ones_like(w) for w in server.weights]
    a.count_step()
    a.count_step()
    a.apply_gradients(gradients)
    expected.apply_gradients(gradients)
    np.testing.assert_array_equal(a.weights[0], expected.weights[0])
    np.testing.assert_array_equal(b.weights[0], before)
    assert (a.frames, b.frames) == (2, 0)

    b.count_step()
    b.apply_gradients(gradients)
    expected.apply_gradients(gradients)
    np.testing.assert_array_equal(b.weights[0], expected.weights[0])
    assert (a.frames, b.frames) == (2, 3)


def test_the_winner_ends_learning_for_all_and_its_weights_are_kept(no_ray):
    server = a3c_ray.Server(seed=5)
    winner, other = [a3c_ray.RemoteServer(Handle(server), seed=None) for _ in range(2)]
    episode = a3c.Episode("winner", 10, 200, 200., 2000)
    assert winner.record(episode, True) is True
    assert other.record(episode, True) is False
    brain = a3c.LocalBrain(winner)
    brain.weights = [np.full_like(w, .5) for w in server.weights]
    brain.push_parameter_server()
    other.apply_gradients([np.ones_like(w) for w in server.weights])
    assert server.is_learned and winner.stop.is_set() and other.stop.is_set()
    assert all((w == .5).all() for w in server.weights + other.weights)


def weights_of(path):
    """The weights in a file, as a list of arrays."""
    return common.load_weights(a3c.ParameterServer().model, path)


def test_if_all_workers_are_lost_one_message_says_so_and_the_weights_are_kept(
        no_ray, monkeypatch, capsys, tmp_path):
    class Lost:
        def run(self, *_):
            return ConnectionAbortedError("its machine is off")

    monkeypatch.setattr(a3c_ray, "Worker", Lost)
    assert a3c_ray.main(["--workers", "2", "--seed", "5", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("worker_1 is lost: its machine is off\nworker_2 is")
    assert err == "error: all workers are lost\n"
    kept = weights_of(tmp_path / "a3c_ray.unfinished.weights.h5")
    np.testing.assert_array_equal(kept[0], a3c.ParameterServer(seed=5).weights[0])


def refused(main, capsys, *options):
    """Run a program's `main`, which must end with status 2, and return its one line of error."""
    with pytest.raises(SystemExit) as end:
        main(options)
    assert end.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_where_nothing_answers_is_refused(form, no_ray, capsys, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = form.format(f"127.0.0.1:{silent.getsockname()[1]}")
        line = refused(a3c_ray.main, capsys, "--address", address, "--out", str(tmp_path))
    assert line.startswith(f"error: argument --address: no Ray at {address!r}: ")


def test_more_workers_than_the_cluster_has_cpus_for_are_refused(no_ray, capsys, tmp_path):
    line = refused(a3c_ray.main, capsys,
                   "--address", "auto", "--workers", "3", "--out", str(tmp_path))
    assert line.endswith("3 workers and the server need 4 CPUs, and the cluster has 3")


def test_without_ray_one_line_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)       # now `import ray` fails
    program = runpy.run_path(a3c_ray.__file__)
    line = refused(program["main"], capsys, "--out", str(tmp_path))
    assert "pip install 'ray" in line


# -- runs with Ray

@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes on this machine, which have two CPUs and one."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster
    os.environ["RAY_worker_niceness"] = "0"     # otherwise actors wait for all else that runs here
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()
    del os.environ["RAY_worker_niceness"]


# The next two tests define classes in a function, because Ray sends such a class as it is to the
# other processes.

def test_workers_on_two_nodes_go_on_and_learn_though_one_is_lost(
        cluster, monkeypatch, capfd, tmp_path):
    class Worker(a3c_ray.Worker):
        def run(self, name, server, seed, env):
            if name == "worker_1":      # is lost at the end of its first episode
                a3c_ray.RemoteServer.record = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            super().run(name, server, seed, env)

    monkeypatch.setattr(a3c_ray, "Worker", Worker)
    status = a3c_ray.main(["--address", cluster, "--workers", "2", "--no-render",
                           "--test-episodes", "1", "--out", str(tmp_path)])
    out, err = capfd.readouterr()
    assert (status, err) == (0, "")
    assert out.count("worker_1 is lost: ") == out.count(" is lost") == 1
    assert "\nlearned in " in out and " 2 workers, " in out
    assert float(out.partition("test: mean of 1 episodes ")[2].split()[0]) >= 195
    assert {"a3c_ray.weights.h5", "history.csv", "learning_curve.png", "A3C-episode-0.mp4"} <= set(
        os.listdir(tmp_path))


def test_a_lost_server_ends_the_run_and_the_weights_seen_last_are_kept(
        cluster, monkeypatch, capfd, tmp_path):
    class Server(a3c_ray.Server):
        def news(self, episodes):
            if episodes > 0:            # is lost when the driver has heard of an episode
                os.kill(os.getpid(), signal.SIGKILL)
            return super().news(episodes)

    monkeypatch.setattr(a3c_ray, "Server", Server)
    status = a3c_ray.main(["--address", cluster, "--workers", "1", "--seed", "5",
                           "--out", str(tmp_path)])
    out, err = capfd.readouterr()
    assert status == 1
    assert err.startswith("error: the server is lost, and with it the run: ")
    assert err.count("\n") == 1 and "\nnot learned in " in out and " is lost" not in out
    kept = weights_of(tmp_path / "a3c_ray.unfinished.weights.h5")
    assert (kept[0] != a3c.ParameterServer(seed=5).weights[0]).any()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_ctrl_c_keeps_the_weights_and_leaves_no_process(monkeypatch, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    mark = f"test_ctrl_c_{os.getpid()}"
    monkeypatch.setenv("MARK", mark)

    def processes():
        """Ids of the processes that have been started since."""
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark.encode() in environment.read_bytes():
                    found.append(environment.parent.name)
        return found

    def record(run, *episode):
        original(run, *episode)
        if not started:
            started.extend(processes())
            threading.Timer(.3, os.kill, [os.getpid(), signal.SIGINT]).start()

    started = []
    original = common.Run.record
    monkeypatch.setattr(common.Run, "record", record)
    with pytest.raises(KeyboardInterrupt):
        a3c_ray.main(["--workers", "1", "--out", str(tmp_path)])
    assert (tmp_path / "a3c_ray.unfinished.weights.h5").is_file()
    assert len(started) > 2
    end = time.monotonic() + 30
    while processes() and time.monotonic() < end:
        time.sleep(.1)
    assert not processes()
