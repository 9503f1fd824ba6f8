"""A3C with Ray: its classes without Ray, then runs on two nodes that lose a node or the server."""
import contextlib
import csv
import os
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

import common

import a3c_cartpole as a3c

import a3c_ray
import keras
import numpy as np
import pytest

os.environ["RAY_AUTH_MODE"] = "disabled"        # use no token that this user may have
needs_ray = pytest.mark.skipif(a3c_ray.ray is None, reason="Ray is not installed")


class Handle:
    """Stands for an actor's handle: `method.remote` calls the method at once, in this process."""

    def __init__(self, actor):
        self.actor = actor

    def __getattr__(self, method):
        return types.SimpleNamespace(remote=getattr(self.actor, method))


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(a3c_ray, "ray", types.SimpleNamespace(get=lambda result: result))


def weights_in(folder, name="A3C.unfinished.weights.h5"):
    """The weights that a run has saved, as a list of arrays."""
    return common.load_weights(a3c.ParameterServer().model, folder / name)


def test_one_worker_plays_the_same_episodes_as_one_thread_of_the_main_file(no_ray):
    here = a3c.ParameterServer(seed=5, max_episodes=12)
    a3c.WorkerThread("one", here).run()
    server = a3c_ray.Server(seed=5, max_episodes=12)
    assert a3c_ray.Worker().run("one", Handle(server), 5, "CartPole-v0") is None
    assert server.history == here.history and len(here.history) == 12
    assert (server.weights[0] != a3c.ParameterServer(seed=5).weights[0]).any()
    for one, other in zip(server.weights, here.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradients_change_the_server_and_other_workers_see_it_at_their_next_update(no_ray):
    server = a3c_ray.Server(seed=5)
    expected = a3c.ParameterServer(seed=5)
    a, b = [a3c_ray.RemoteServer(Handle(server), seed=None) for _ in range(2)]
    gradients = [np.ones_like(w) for w in server.weights]
    before = server.weights[0]
    for worker, steps in (a, 2), (b, 1):
        for _ in range(steps):
            worker.count_step()
        worker.apply_gradients(gradients)
        expected.apply_gradients(gradients)
        np.testing.assert_array_equal(worker.weights[0], expected.weights[0])
        if worker is a:
            np.testing.assert_array_equal(b.weights[0], before)
    assert (a.frames, b.frames, server.frames) == (2, 3, 3)


def test_the_first_to_learn_ends_learning_for_all_and_only_its_weights_are_kept(
        no_ray, monkeypatch):
    server = a3c_ray.Server(seed=5)
    other = a3c_ray.RemoteServer(Handle(server), seed=None)

    def run(thread):
        winner = thread.parameter_server
        assert winner.record(a3c.Episode("winner", 10, 200, 200., 2000), True) is True
        brain = a3c.LocalBrain(winner)
        brain.weights = [np.full_like(w, .5) for w in server.weights]
        brain.push_parameter_server()

    monkeypatch.setattr(a3c.WorkerThread, "run", run)
    kept = a3c_ray.Worker().run("winner", Handle(server), None, "CartPole-v0")
    assert all((w == .5).all() for w in kept)
    assert other.record(a3c.Episode("other", 10, 200, 200., 2010), True) is False
    other.apply_gradients([np.ones_like(w) for w in server.weights])
    assert server.is_learned and other.stop.is_set() and len(server.history) == 1


# -- bad addresses, and no Ray

def refused(capsys, *options):
    """Run `main`, which must end with status 2, and return its one line of error."""
    with pytest.raises(SystemExit) as end:
        a3c_ray.main(options)
    assert end.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    return line


@needs_ray
@pytest.mark.parametrize("address, why", [
    ("localhost:10001", "this is the port of ray://localhost:10001"),
    ("ray://localhost:6379", "this is the port of localhost:6379"),
    ("localhost:{closed}", "refused"),
    ("ray://localhost:{closed}", "refused"),
    ("localhost", ""),
])
def test_an_address_without_ray_is_refused_at_once(address, why, capsys, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))       # nobody listens there
        address = address.format(closed=closed.getsockname()[1])
        started = time.monotonic()
        line = refused(capsys, "--address", address, "--out", str(tmp_path))
    assert line.startswith(f"error: argument --address: cannot use Ray at {address!r}: ")
    assert why in line and time.monotonic() - started < 10


def test_only_learning_needs_ray(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(a3c_ray, "ray", None)       # as if not installed
    assert "pip install 'ray" in refused(capsys, "--out", str(tmp_path))
    a3c.ParameterServer().model.save_weights(tmp_path / "A3C.weights.h5")
    play = ["--no-render", "--out", str(tmp_path), "--play"]
    assert a3c_ray.main([*play, str(tmp_path / "A3C.weights.h5"), "--test-episodes", "1"]) == 0
    assert capsys.readouterr().out.startswith("test  episode 1  steps ")
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save_weights(
        tmp_path / "other.weights.h5")
    assert "does not hold the weights" in refused(capsys, *play, str(tmp_path / "other.weights.h5"))


# -- runs with Ray

@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_two_ctrl_c_keep_the_results_and_leave_no_process(monkeypatch, tmp_path):
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

    def finish_episode(run, *episode):
        original(run, *episode)
        if not started:
            started.extend(processes())
            for seconds in .3, .5:
                threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()

    started = []
    original = common.Run.finish_episode
    monkeypatch.setattr(common.Run, "finish_episode", finish_episode)
    with pytest.raises(KeyboardInterrupt):
        a3c_ray.main(["--workers", "1", "--no-render", "--out", str(tmp_path)])
    assert weights_in(tmp_path) and (tmp_path / "history.csv").is_file()
    assert len(started) > 2
    end = time.monotonic() + 30
    while processes() and time.monotonic() < end:
        time.sleep(.1)
    assert not processes()


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two nodes on this machine, with a CPU each."""
    from ray.cluster_utils import Cluster
    os.environ["RAY_worker_niceness"] = "0"     # otherwise actors wait for all else that runs here
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.second_node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()
    del os.environ["RAY_worker_niceness"]


@pytest.fixture
def options(cluster, tmp_path):
    return ["--address", cluster.address, "--seed", "5", "--no-render", "--test-episodes", "0",
            "--out", str(tmp_path)]


@needs_ray
def test_another_version_of_ray_is_named_with_ours(options, monkeypatch, capfd):
    with monkeypatch.context() as other:
        other.setattr(a3c_ray.ray, "__version__", "2.0.1")
        line = refused(capfd, *options)
    assert "Version mismatch: The cluster was started with: Ray: " in line and "2.0.1" in line


@needs_ray
def test_a_busy_cluster_is_waited_for_with_a_line(cluster, options, monkeypatch, tmp_path):
    ray = a3c_ray.ray
    ray.init(cluster.address)
    holder_class = ray.remote(num_cpus=1)(type("Holder", (), {}))
    for name in "one", "two":           # actors of another program, which hold all CPUs
        holder_class.options(name=name, namespace="other", lifetime="detached").remote()
    end = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) and time.monotonic() < end:
        time.sleep(.1)
    ray.shutdown()

    def say(line):
        said.append(line)
        if "wait until" in line:
            for name in "one", "two":
                ray.kill(ray.get_actor(name, namespace="other"))

    said = []
    monkeypatch.setattr(common, "say", say)
    assert a3c_ray.main([*options, "--workers", "1", "--max-episodes", "1"]) == 1
    assert said[0].startswith("0 CPUs of the cluster are free")
    with open(tmp_path / "history.csv", newline="") as file:
        assert [row["worker"] for row in csv.DictReader(file)] == ["worker_1"]


# The next test defines a class in a function, because Ray sends such a class as it is to the other
# processes.

@needs_ray
def test_a_lost_server_ends_the_run_and_the_weights_seen_last_are_kept(
        options, monkeypatch, capfd, tmp_path):
    class Server(a3c_ray.Server):
        def news(self, known):
            if known > 0:               # is lost when the driver has heard of an episode
                os.kill(os.getpid(), signal.SIGKILL)
            return super().news(known)

    monkeypatch.setattr(a3c_ray, "Server", Server)
    with pytest.raises(SystemExit) as end:
        a3c_ray.main([*options, "--workers", "1"])
    # Python prints this, and ends with status 1.
    assert end.value.code.startswith("error: the server is lost, so the run ends: ")
    out, err = capfd.readouterr()
    assert "\n" not in end.value.code and err == ""
    assert "\nnot learned in " in out and " is lost" not in out
    assert (weights_in(tmp_path)[0] != a3c.ParameterServer(seed=5).weights[0]).any()


@needs_ray
def test_it_learns_on_two_nodes_and_goes_on_when_one_is_removed(
        cluster, options, monkeypatch, capfd, tmp_path):
    def finish_episode(run, *episode):
        original(run, *episode)
        both_play = len({e.worker for e in run.history}) == 2
        if both_play and cluster.second_node in cluster.worker_nodes:
            cluster.remove_node(cluster.second_node, allow_graceful=False)

    original = common.Run.finish_episode
    monkeypatch.setattr(common.Run, "finish_episode", finish_episode)
    status = a3c_ray.main([*options, "--workers", "2", "--test-episodes", "1"])
    out, err = capfd.readouterr()
    assert (status, err) == (0, "")
    assert out.count(" is lost: ") == out.count(" is lost") == 1
    assert "\nlearned in " in out and " 2 workers, " in out
    assert float(out.partition("test: mean of 1 episodes ")[2].split()[0]) >= 195
    assert weights_in(tmp_path, "A3C.weights.h5")
