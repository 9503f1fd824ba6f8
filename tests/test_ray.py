"""A3C with Ray: the classes in one process, then runs on two nodes that lose workers and server."""

import contextlib
import os
import runpy
import signal
import socket
import sys
import threading
import time
import types
import uuid
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, start_python

from companions import a3c_ray  # isort: skip  (before Ray, which reads what it sets)

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

base = a3c_ray.base
FILE = ROOT / "companions" / "a3c_ray.py"
QUIET = "--no-render", "--log"
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


# -- server, remote server and worker in one process, without Ray

class Direct:
    """Stands for an actor's handle: `call.remote` calls the server in this process.

    The first answers are lost on the way: instead of them `failures` are raised.
    """

    def __init__(self, server, failures=()):
        self.server = server
        self.failures = list(failures)
        self.call = self

    def remote(self, *arguments):
        answer = self.server.call(*arguments)
        return self.failures.pop(0) if self.failures else answer


@pytest.fixture
def no_ray(monkeypatch):
    """What the program asks of Ray, answered without it: see Direct."""
    def get(answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    context = types.SimpleNamespace(was_current_actor_reconstructed=False)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(a3c_ray, "RETRY_SECONDS", 0)


def unavailable():
    return ray.exceptions.ActorUnavailableError("the network has a hiccup", None)


def test_one_worker_plays_the_same_episodes_as_one_thread_of_the_main_file(no_ray):
    here = base.ParameterServer(seed=5, max_episodes=12, n_workers=1)
    base.WorkerThread("one", "learning", here).run()

    server = a3c_ray.SafeServer("CartPole-v0", 5, max_episodes=12, n_workers=1)
    a3c_ray.Worker().run("one", Direct(server), "CartPole-v0", 5, n_workers=1)

    assert [e[:-1] for e in server.progress.history] == [e[:-1] for e in here.progress.history]
    np.testing.assert_array_equal(server.theta, here.theta)
    assert server.updates == here.updates > 12
    assert server.staleness == [0] * server.updates


@pytest.fixture(scope="module")
def pair():
    """A server, and two remote servers that reach it. Tests replace the way to it."""
    server = a3c_ray.SafeServer("CartPole-v0", 5, max_episodes=20, n_workers=2)
    remote = [a3c_ray.RemoteServer(name, Direct(server), "CartPole-v0", 6, 2) for name in "ab"]
    return server, *remote


def test_a_gradient_changes_the_server_and_other_workers_see_it_at_their_next_call(no_ray, pair):
    server, a, b = pair
    a.join(False)
    b.join(False)
    before = server.theta
    np.testing.assert_array_equal(a.theta, before)
    a.count_step()
    a.count_step()
    a.apply_gradient(np.ones_like(before), a.updates)
    assert (server.theta < before).all() and server.frames == 2
    np.testing.assert_array_equal(a.theta, server.theta)
    np.testing.assert_array_equal(b.theta, before)

    b.apply_gradient(np.ones_like(before), b.updates)
    np.testing.assert_array_equal(b.theta, server.theta)
    assert b.frames == 2
    assert server.staleness[-2:] == [0, 1]      # b did not know of the update by a


def test_a_call_whose_answer_was_lost_is_made_again_but_counts_once(no_ray, pair):
    server, a, _ = pair
    a.join(False)
    updates = server.updates
    episodes = len(server.progress.history)
    server_handle = a.server
    server_handle.failures = [unavailable(), unavailable()]
    a.apply_gradient(np.ones_like(a.theta), a.updates)
    server_handle.failures = [unavailable()]
    assert a.progress.finish_episode("a", 1, 30, 3., 30, False) is True
    assert not server_handle.failures
    assert server.updates == updates + 1 == a.updates
    assert len(server.progress.history) == episodes + 1


def test_the_winner_ends_learning_for_all_and_its_weights_are_kept(no_ray):
    server = a3c_ray.SafeServer("CartPole-v0", 5, max_episodes=20, n_workers=2)
    winner = a3c_ray.RemoteServer("winner", Direct(server), "CartPole-v0", None, 2)
    other = a3c_ray.RemoteServer("other", Direct(server), "CartPole-v0", None, 2)
    assert winner.progress.finish_episode("winner", 10, 200, 200., 2000, True) is True
    assert other.progress.finish_episode("other", 10, 200, 200., 2000, True) is False
    weights = np.full_like(server.theta, .5)
    winner.take_over(weights)
    other.apply_gradient(np.ones_like(weights), 0)
    assert server.is_learned and other.progress.stop.is_set()
    np.testing.assert_array_equal(server.theta, weights)


def test_a_worker_that_loses_the_server_ends_without_an_error(no_ray):
    server = a3c_ray.SafeServer("CartPole-v0", 5, max_episodes=20, n_workers=2)
    lost = ray.exceptions.ActorDiedError()
    a3c_ray.Worker().run("one", Direct(server, [lost]), "CartPole-v0", 5, 1)


# -- runs with Ray

@pytest.fixture(scope="module")
def mark():
    """A text in the environment of every process that these tests start."""
    name = "TEST_OF_A3C_RAY"
    os.environ[name] = uuid.uuid4().hex
    yield f"{name}={os.environ[name]}".encode()
    del os.environ[name]


@pytest.fixture(scope="module")
def cluster(mark):
    """Two nodes on this machine: one with CPUs for the server and a worker, one for a worker."""
    os.environ["RAY_worker_niceness"] = "0"     # otherwise actors wait for all else that runs here
    cluster = Cluster(initialize_head=True,
                      head_node_args=dict(num_cpus=2, include_dashboard=False))
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()
    del os.environ["RAY_worker_niceness"]


def find(mark, title=""):
    """Ids of the processes with this mark, whose command line begins with a title."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_ours = mark in (folder / "environ").read_bytes()
            if is_ours and (folder / "cmdline").read_text().startswith(title):
                found.append(int(folder.name))
    return [number for number in found if number != os.getpid()]


def parent(process):
    """The process that has started a process: of an actor, its node."""
    return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1]


def wait_until(fact, seconds=120):
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.1)


@pytest.fixture
def said(monkeypatch):
    """The lines that the program says."""
    lines = []
    monkeypatch.setattr(base, "say", lines.append)
    return lines


@contextlib.contextmanager
def meanwhile(act):
    """Let a function act in a thread while the program runs in the main thread."""
    errors = []

    def work():
        try:
            act()
        except BaseException as error:
            errors.append(error)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=work)
    thread.start()
    with contextlib.suppress(KeyboardInterrupt):
        yield
        thread.join()
    assert not errors, errors


@linux
def test_workers_on_two_nodes_learn_though_one_is_lost_and_the_test_shows_what_they_learned(
        cluster, mark, said, monkeypatch, tmp_path, capfd):
    # A class in a function, because Ray sends such a class to the other processes whole.
    class Patient(a3c_ray.SafeServer):
        def finish_episode(self, *episode):
            if self.restarts:
                return super().finish_episode(*episode)
            # Nobody wins before the lost worker has begun anew.
            super().finish_episode(*episode[:-1], False)
            return False

    def act():
        wait_until(lambda: {"worker_1", "worker_2"} <= {line.split()[0] for line in said})
        workers.extend(find(mark, "ray::Worker.run"))
        nodes.update(map(parent, workers))
        os.kill(workers[0], signal.SIGKILL)

    def remote(original=ray.remote, **options):
        return lambda cls: original(**options)(Patient if cls is a3c_ray.SafeServer else cls)

    workers = []
    nodes = set()
    monkeypatch.setattr(ray, "remote", remote)
    status = None
    with meanwhile(act):
        status = a3c_ray.main(
            ["--address", cluster.address, *QUIET, "--test-episodes", "1", "--out", str(tmp_path)])
    assert (status, *capfd.readouterr()) == (0, "", "")
    assert len(workers) == len(nodes) == 2      # as many as there are CPUs beside the server's
    assert [line for line in said if line.endswith(" was lost, and has been started anew")]
    summary, = [line for line in said if " episodes, " in line]
    assert summary.startswith("learned in ") and " 2 workers, " in summary
    mean, = [line for line in said if line.startswith("test: mean of 1 episodes ")]
    assert float(mean.split()[5]) >= 195
    names = {path.name for path in tmp_path.iterdir()}
    assert {"a3c_ray.weights.h5", "history.csv", "learning_curve.png", "three_as.png",
            "a3c_ray-episode-0.mp4"} <= names


@linux
def test_a_lost_server_ends_the_run_and_what_the_driver_saw_last_is_kept(
        cluster, mark, said, tmp_path, capfd):
    def act():
        wait_until(lambda: any(" episode 2 " in line for line in said))
        os.kill(*find(mark, "ray::SafeServer"), signal.SIGKILL)

    status = None
    with meanwhile(act):
        status = a3c_ray.main(
            ["--address", cluster.address, *QUIET, "--workers", "1", "--out", str(tmp_path)])
    assert (status, *capfd.readouterr()) == (
        1, "", "error: the parameter server is lost, and with it the run: its process has ended\n")
    summary, = [line for line in said if " episodes, " in line]
    assert summary.startswith("not learned, the server failed, in ")
    model = base.ParameterServer().keras_model
    before = model.get_weights()[0]
    model.load_weights(tmp_path / "a3c_ray.unfinished.weights.h5")
    assert (model.get_weights()[0] != before).any()
    wait_until(lambda: not find(mark, "ray::Worker"))


@linux
def test_sigterm_keeps_what_was_learned_and_ends_the_actors(cluster, mark, said, tmp_path):
    def act():
        wait_until(lambda: any(" episode 2 " in line for line in said))
        os.kill(os.getpid(), signal.SIGTERM)

    arguments = ["--address", cluster.address, *QUIET, "--workers", "1", "--out", str(tmp_path)]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with meanwhile(act), pytest.raises(SystemExit) as end:
            base.run_program(lambda: a3c_ray.main(arguments))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert end.value.code == 143
    assert (tmp_path / "a3c_ray.unfinished.weights.h5").is_file()
    wait_until(lambda: not find(mark, "ray::Worker") + find(mark, "ray::SafeServer"))


@linux
def test_ctrl_c_while_ray_starts_leaves_nothing_running(mark, tmp_path):
    before = set(find(mark))
    run = start_python(FILE, *QUIET, "--workers", 1, cwd=tmp_path, **environment())
    wait_until(lambda: len(set(find(mark)) - before) > 1)       # Ray's first process is there
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (130, "")
    wait_until(lambda: not set(find(mark)) - before)


def environment():
    return {name: value for name, value in os.environ.items() if name == "TEST_OF_A3C_RAY"}


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_without_a_cluster_is_one_line_and_status_2(form, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(a3c_ray, "ADDRESS_SECONDS", .5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = form.format(f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(SystemExit) as end:
            a3c_ray.main(["--address", address, "--out", str(tmp_path)])
    assert end.value.code == 2
    assert capfd.readouterr().err == \
        f"error: argument --address: no Ray cluster answers at {address!r}\n"


def test_the_variable_ray_address_gives_the_address(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(a3c_ray, "ADDRESS_SECONDS", .5)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with pytest.raises(SystemExit) as end:
        a3c_ray.main(["--out", str(tmp_path)])
    assert end.value.code == 2
    assert "no Ray cluster answers at 'nowhere'" in capfd.readouterr().err


def test_without_ray_one_line_says_how_to_install_it_and_status_2(monkeypatch, capfd, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)       # now `import ray` fails
    program = runpy.run_path(str(FILE), run_name="program")
    with pytest.raises(SystemExit) as end:
        program["main"](["--out", str(tmp_path)])
    assert end.value.code == 2
    line, = capfd.readouterr().err.splitlines()
    assert "pip install 'ray" in line
