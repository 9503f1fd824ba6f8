"""The A3C of a3c_cartpole.py on many cores and many machines, with Ray.

Threads of one Python program run one at a time. Here each worker is a process of its own, on any
core of any machine, so many workers really play at once. The parameter server is one more process,
and the workers call its methods through Ray (https://docs.ray.io).

    python -m companions.a3c_ray                                    # on this machine
    python -m companions.a3c_ray --address 192.168.0.1:6379         # on a Ray cluster, started on
                                                                    # one of its machines
    python -m companions.a3c_ray --address ray://192.168.0.1:10001  # the same from elsewhere

Read a3c_cartpole.py first. Its WorkerThread, Environment, Agent and LocalBrain run here unchanged.
In the main file, they reach the parameter server as an object in memory. Here they reach a
RemoteServer, which has the same attributes and methods, but passes calls on to the server's
process. One update, with the numbers of the main file:

    a worker's process                                      the server's process
    6. LocalBrain computes a gradient with θ'
    7. RemoteServer.apply_gradient    gradient, steps →     8. Server.update changes θ
       RemoteServer.take           ← θ, updates, frames        and answers
    9. LocalBrain copies this θ: θ' ← θ

Words of Ray: an actor is a process that holds one object and runs its methods when other processes
call them. Here the server is one, and each worker. A handle stands for an actor in the processes
that call it. The driver is this program, which you start and which shows the progress.

To understand                   read
what a worker sends and gets    RemoteServer.apply_gradient, then Server.update
what runs in its process        Worker.run
how a class becomes a process   start_server, start_workers
what happens if one is lost     call_server, SafeServer.call, then Driver. All this stands below the
                                line "Not needed to understand A3C with Ray".

What differs from the main file:
- A worker learns of the steps and updates of the others only from the server's answers: before its
  first step, and after each of its gradients. Meanwhile it counts only its own steps.
- The server runs one call at a time, so two gradients never meet, and its locks are always free.
- A worker begins as soon as its process is ready. It does not wait for the other workers.
- A lost worker is started anew. It begins with an empty queue and with its first episode.
- --seed fixes the first weights and what each worker draws, but not the order in which gradients
  arrive. So a run repeats only with one worker.
"""
import contextlib
import logging
import math
import os
import signal
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # to run it by its path too
import a3c_cartpole as base  # isort: skip  (first, because it sets up Keras and TensorFlow)

# Ray reads these when it is imported.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")     # no lines of its own about lost workers
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")    # nor about graphics cards

try:
    import ray
except ImportError:
    ray = None          # main says how to install it

NAME = "a3c_ray"
MAX_RESTARTS = 3            # how often Ray may start a lost worker anew


class Server(base.ParameterServer):
    """The parameter server. It inherits θ, apply_gradient and take_over from the main file.

    Another process cannot read its attributes. It can only call its methods, and gets a copy of
    what they return. So `update` also returns everything that a worker must know to play on.
    """

    def update(self, gradient, updates_at_pull, steps):
        """Apply a worker's gradient (W,), before which it played so many steps. Return the state.

        `updates_at_pull` says after how many updates the worker had got the θ that it used.
        """
        self.frames += steps
        self.apply_gradient(gradient, updates_at_pull)      # 8. θ changes
        return self.state()

    def state(self):
        """Return what a worker must know before it plays on."""
        is_over = self.progress.stop.is_set()
        return self.theta, self.updates, self.frames, is_over

    def finish_episode(self, *episode):
        """Record an episode. Return False if learning was over. See Progress.finish_episode."""
        return self.progress.finish_episode(*episode)


class RemoteServer(base.ParameterServer):
    """Stands in for the parameter server in a worker's process.

    Environment, Agent and LocalBrain read its θ, updates, frames and progress, as they would read
    those of the parameter server. What would change the parameter server is passed on to it.
    """

    def __init__(self, name, server, env, seed, n_workers):
        super().__init__(env, seed, n_workers=n_workers)    # its own first θ is not used
        self.name = name                        # of the worker
        self.server = server                    # the handle of the server's actor
        self.steps_since_update = 0
        # Environment ends an episode by progress.finish_episode. This must reach the server, too.
        self.progress.finish_episode = self.finish_episode

    def ask(self, method, *arguments):
        """Let the server's process run one of its methods, wait for the answer, and return it.

        For `update` this means `ray.get(self.server.update.remote(...))`: `remote` sends the call,
        and `ray.get` waits for the answer. call_server also makes sure that a lost answer does no
        harm.
        """
        return call_server(self.server, self.name, method, *arguments)

    def join(self, is_restart):
        """Tell the server that this worker begins, and get the first θ. See SafeServer.join."""
        self.take(self.ask("join", self.name, is_restart))

    def apply_gradient(self, gradient, updates_at_pull):
        """7. Send a gradient (W,) to the server, and get θ (W,) as it is after the update."""
        state = self.ask("update", gradient, updates_at_pull, self.steps_since_update)
        self.steps_since_update = 0
        self.take(state)

    def take(self, state):
        """Take over what the server has answered.

        9. The next pull of LocalBrain copies this θ. It needs no call of its own.
        """
        self.theta, self.updates, self.frames, is_over = state
        if is_over:
            self.progress.stop.set()

    def count_step(self):
        """Count a step of this worker. The server hears of it with the next gradient."""
        self.frames += 1
        self.steps_since_update += 1

    def finish_episode(self, *episode):
        """Let the server record an episode. Return False if learning was over."""
        return self.ask("finish_episode", *episode)

    def take_over(self, theta):
        """Hand the weights (W,) of this worker to the server, because it has won."""
        self.ask("take_over", theta)


class Worker:
    """A worker as an actor: a process in which the main file's WorkerThread runs."""

    def run(self, name, server, env, seed, n_workers):
        """Play episodes with the classes of the main file until learning is over."""
        remote_server = RemoteServer(name, server, env, seed, n_workers)
        worker = base.WorkerThread(name, "learning", remote_server)     # compiles its gradient
        # Has Ray started this process anew, because the one before was lost?
        is_restart = ray.get_runtime_context().was_current_actor_reconstructed
        # If the server is lost, end without an error. The driver finds it lost, too.
        with contextlib.suppress(ray.exceptions.ActorDiedError):
            remote_server.join(is_restart)      # the first θ
            worker.run()                        # from here on as in the main file


def start_server(args):
    """M0. Start the server's process, and return its handle.

    `ray.remote` makes an actor class of a class, and says what its processes need. Calling `remote`
    on the actor class starts a process with an object of it.
    """
    # On the driver's own machine, if a CPU is free there.
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True)
    # SafeServer is Server with more methods, for lost answers, lost workers and the driver.
    actor_class = ray.remote(num_cpus=1, scheduling_strategy=here)(SafeServer)
    return actor_class.remote(args.env, args.seed, args.max_episodes, args.workers)


def start_workers(server, args):
    """M1 and M2. Start the workers' processes, and let them play.

    Each has a CPU of its own, and they spread over the machines. Returns the handles, without which
    Ray would end the processes, and {call of `run`: name of the worker}.
    """
    # If Ray starts a lost worker anew, it also repeats the call of `run`.
    actor_class = ray.remote(num_cpus=1, scheduling_strategy="SPREAD",
                             max_restarts=MAX_RESTARTS, max_task_retries=-1)(Worker)
    workers = []
    runs = {}
    for i in range(args.workers):
        name = f"worker_{i + 1}"
        worker = actor_class.remote()
        workers.append(worker)
        # This does not wait until `run` has ended. Each worker gets the handle of the server.
        run = worker.run.remote(name, server, args.env, args.seed, args.workers)
        runs[run] = name
    return workers, runs


def main(argv=None):
    """Learn on all workers, keep what was learned, play with it; return the exit status."""
    args = read_options(argv)

    # The driver's own copy of the server: the main thread shows it, saves it and tests it.
    copy = base.ParameterServer(args.env, args.seed, args.max_episodes)
    base.check_predict_p(copy)
    test = base.WorkerThread("test_thread", "test", copy)

    # Learn, or read the weights of an earlier run.
    if args.play:
        copy.theta = copy.pack(base.load_weights(copy.keras_model, args.play))
    else:
        learn(copy, args)
        if not copy.is_learned:
            return 1

    # Test in this process, as the main file does.
    test.environment.env = base.film(test.environment.env, args.out, NAME, args.render)
    with contextlib.closing(test.environment.env):
        test.run(args.test_episodes)
    return 0


def learn(copy, args):
    """Let the workers play until learning is over, and keep the results, in `copy` and in files."""
    with ray_started(args):
        driver = Driver(copy, args)
        try:
            # Driver.run calls start_server and start_workers, and then asks the server for news,
            # in a thread of its own. The main thread shows the progress.
            base.run_threads({"driver": driver.run}, copy.progress, args.log)
        finally:
            with base.no_interruption():
                base.keep({NAME: copy.model}, copy.progress, copy.is_learned, copy.frames,
                          f"A3C, {args.env}, {copy.progress.workers} processes", args.out)
                if copy.updates:
                    base.draw_three_as(copy, args.out / "three_as.png")


# == Not needed to understand A3C with Ray: lost processes, options, starting and ending Ray =======

MAX_WORKERS_HERE = 8        # on a single machine, unless --workers says otherwise
REPORT_SECONDS = .2         # between two reports of the server to the driver
RETRY_SECONDS = 1           # between two attempts to reach the server
START_SECONDS = 60          # after this time, say how many workers have started
END_SECONDS = 5             # the time that workers have to end by themselves
ADDRESS_SECONDS = 5         # the time that a cluster has to answer

# Each worker has one core, so the libraries in it get one thread each, and no graphics card.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
}


def call_server(server, caller, method, *arguments):
    """Let the server's process run a method, wait for the answer, and return it.

    Raises ActorDiedError if the process is lost.
    """
    call_id = uuid.uuid4().hex
    while True:
        try:
            return ray.get(server.call.remote(caller, call_id, method, *arguments))
        except ray.exceptions.ActorUnavailableError:
            # The connection broke, but the process may well live. Call again: see SafeServer.call.
            time.sleep(RETRY_SECONDS)


class SafeServer(Server):
    """A Server that goes on if answers or workers are lost, and reports to the driver."""

    def __init__(self, env, seed, max_episodes, n_workers):
        super().__init__(env, seed, max_episodes, n_workers)
        self.last_calls = {}                    # of each caller: its last call, and the answer
        self.workers = set()                    # the names of the workers that have begun
        self.restarts = []                      # the name of a worker, each time it began anew

    def call(self, caller, call_id, method, *arguments):
        """Run a method. If this very call has come before, only repeat its answer.

        When a connection breaks, a caller cannot know whether its call has arrived, so it calls
        again. But no gradient must be applied twice, and no episode counted twice.
        """
        last_id, answer = self.last_calls.get(caller, (None, None))
        if call_id != last_id:
            answer = getattr(self, method)(*arguments)
            self.last_calls[caller] = call_id, answer
        return answer

    def join(self, name, is_restart):
        """Note that a worker begins, or begins anew. The first one starts the clock."""
        if not self.workers:
            self.progress.started = time.perf_counter()
        self.workers.add(name)
        if is_restart:
            self.restarts.append(name)
        return self.state()

    def report(self, episodes, updates):
        """Return what is new for the driver, if it knows so many episodes and updates."""
        seconds = time.perf_counter() - self.progress.started if self.workers else 0
        return {
            "state": self.state(),
            "is_learned": self.is_learned,
            "seconds": seconds,
            "workers": len(self.workers),
            "restarts": self.restarts,
            "episodes": self.progress.history[episodes:],
            "staleness": self.staleness[updates:],
        }


class Driver:
    """This program itself: starts the actors, and asks the server how learning goes."""

    def __init__(self, copy, args):
        self.copy = copy            # the driver's own ParameterServer: the server as last seen
        self.args = args
        self.server = None          # the handle of the server
        self.workers = []           # the handles of the workers
        self.runs = {}              # of each worker that has not ended: its call of `run` → name
        self.restarts = []          # the name of a worker, each time Ray started it anew
        self.late = time.perf_counter() + START_SECONDS     # by then all workers should play

    def run(self):
        """Start the actors, and follow them until learning is over. An error ends it, too."""
        try:
            # The server first, so that the workers cannot take the CPU that it needs.
            self.server = start_server(self.args)
            self.workers, self.runs = start_workers(self.server, self.args)
            self.follow()
        except ray.exceptions.ActorDiedError as error:
            self.fail("the server", "the parameter server is lost, and with it the run:"
                                    f" {cause_of(error)}")
        except (ray.exceptions.RayError, ConnectionError) as error:
            self.fail("an actor", error)

    def fail(self, who, message):
        """Say what went wrong. The summary line will name who has failed."""
        self.copy.progress.failed = who
        print(f"error: {message}", file=sys.stderr)

    def follow(self):
        """M3. Ask the server for news until learning is over."""
        self.wait_for_server()
        while not self.copy.progress.stop.is_set():     # set by Ctrl-C
            self.wait_for_workers(1, REPORT_SECONDS)
            is_over = self.take_report()
            if is_over:
                # The winner may still have to hand over its weights.
                self.wait_for_workers(len(self.runs), END_SECONDS)
                self.take_report()
                return
            if not self.runs:
                self.fail("every worker", "all workers were lost")
                return
            self.tell_who_is_late()

    def wait_for_server(self):
        """Wait until the server's process is ready. Say so if this takes long."""
        ready, _ = ray.wait([self.server.__ray_ready__.remote()], timeout=START_SECONDS)
        if not ready:
            base.say("still waiting for the server: is there a free CPU in the cluster?")

    def tell_who_is_late(self):
        """Say once how many workers have started, if some have not after START_SECONDS."""
        if time.perf_counter() > self.late:
            self.late = math.inf
            started = self.copy.progress.workers
            if started < self.args.workers:
                base.say(f"{started} of {self.args.workers} workers have started:"
                         " are there free CPUs for the others in the cluster?")

    def wait_for_workers(self, count, timeout):
        """Wait until so many workers have ended, but not longer than `timeout` seconds."""
        ended = []
        if self.runs:
            ended, _ = ray.wait(list(self.runs), num_returns=count, timeout=timeout)
        for run in ended:
            name = self.runs.pop(run)
            try:
                ray.get(run)        # raises the error that has ended it
            except ray.exceptions.ActorDiedError as error:
                base.say(f"{name} was lost for good: {cause_of(error)}")

    def take_report(self):
        """Bring the driver's copy of the server up to date. Return True if learning is over."""
        copy = self.copy
        progress = copy.progress
        report = call_server(
            self.server, "driver", "report", len(progress.history), len(copy.staleness))
        copy.theta, copy.updates, copy.frames, is_over = report["state"]
        copy.is_learned = report["is_learned"]
        copy.staleness.extend(report["staleness"])
        progress.history.extend(report["episodes"])
        progress.workers = report["workers"]
        progress.started = time.perf_counter() - report["seconds"]
        for name in report["restarts"][len(self.restarts):]:
            base.say(f"{name} was lost, and has been started anew")
        self.restarts = report["restarts"]
        return is_over


def cause_of(error):
    """Say in one line why an actor has died: of an error at its start, or for an unknown reason."""
    if error.actor_init_failed:
        return str(error).strip().splitlines()[-1]
    return "its process has ended"


def read_options(argv):
    """Read the command line of this program."""
    parser = base.make_parser(
        "Learn CartPole with A3C in many processes, on one or many machines, then film what was"
        " learned.", f"movie/{NAME}")
    parser.epilog = (
        "Only a run with --workers 1 can be repeated. With more workers, --seed fixes the first"
        " weights and what each worker draws, but not the order of the updates.")
    parser.add_argument("--env", default=base.ENV, choices=["CartPole-v0", "CartPole-v1"],
                        help="episodes of at most 200 or 500 steps")
    parser.add_argument("--workers", type=base.positive, metavar="N",
                        help="learning processes; if not given, one for each CPU but one, which"
                             f" the server needs; on a single machine at most {MAX_WORKERS_HERE}")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS") or "local",
                        help="a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; or local, which"
                             " is this machine alone; RAY_ADDRESS in the environment does the same")
    parser.add_argument("--max-episodes", default=20_000, type=base.positive,
                        help="give up after so many episodes of all workers")
    args = base.check_options(parser, parser.parse_args(argv))
    if not args.play:
        if ray is None:
            refuse("Ray is not installed. Install it by: python -m pip install 'ray>=2.50,<3'")
        if args.address not in ("local", "auto"):
            check_address(args.address)
    return args


def refuse(reason):
    """Say in one line why the program cannot start, and end it with exit status 2."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def ray_started(args):
    """Start Ray on this machine, or connect to a cluster. Afterwards end it, and all actors."""
    try:
        with signals_later():       # cut short while it starts, Ray would leave processes behind
            start_ray(args)
        yield
    finally:
        with base.no_interruption():
            ray.shutdown()


def start_ray(args):
    """Start Ray or connect to it, and choose how many workers there will be."""
    options = {}
    if args.address == "local":
        workers = args.workers or min(MAX_WORKERS_HERE, max(1, os.cpu_count() - 1))
        options["num_cpus"] = workers + 1           # one for the server
        options["include_dashboard"] = False
        options["object_store_memory"] = 10 ** 8    # bytes; the arrays here are small
    try:
        ray.init(
            args.address, log_to_driver=False, logging_level=logging.CRITICAL,
            # What each process of an actor finds: these variables, and these files to import from.
            runtime_env={"env_vars": ENVIRONMENT,
                         "py_modules": [base.__file__, str(Path(__file__).parent)]},
            **options)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        if args.address != "local":
            refuse(f"argument --address: Ray cannot use {args.address!r}: {reason}")
        refuse(f"Ray does not start: {reason}")
    if args.workers is None:
        args.workers = count_workers()


def check_address(address):
    """End with exit status 2 if nothing that could be Ray answers there.

    Ray itself would try for minutes. Its processes are gRPC servers, so ask for one of these.
    """
    import grpc  # here, because only a cluster needs it
    target = address.removeprefix("ray://")
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ADDRESS_SECONDS)
        except grpc.FutureTimeoutError:
            refuse(f"argument --address: no Ray cluster answers at {address!r}")


def count_workers():
    """Count the CPUs of the cluster, less one for the server."""
    workers = int(ray.cluster_resources().get("CPU", 0)) - 1
    machines = [node for node in ray.nodes() if node["Alive"]]
    if len(machines) == 1:
        workers = min(MAX_WORKERS_HERE, workers)
    return max(1, workers)


@contextlib.contextmanager
def signals_later():
    """Let Ctrl-C and SIGTERM wait until the end of the `with`.

    They are not ignored, as in no_interruption, because processes that are started meanwhile would
    ignore them, too, for ever.
    """
    arrived = []
    handlers = {number: signal.signal(number, lambda number, _: arrived.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():        # Ray has put its own there
            signal.signal(number, handler)
    for number in arrived:
        signal.raise_signal(number)


if __name__ == "__main__":
    base.run_program(main)
