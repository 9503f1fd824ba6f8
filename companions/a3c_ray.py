"""The A3C of a3c_cartpole.py on many cores and many machines, with Ray.

Python runs one thread of a program at a time. Here each worker is a process of its own, on any
core of any machine, so the workers play at the same time, if there are enough cores. The parameter
server is one more process, and the workers call its methods through Ray (https://docs.ray.io).

    python -m companions.a3c_ray                                    # on this machine
    python -m companions.a3c_ray --address 192.168.0.1:6379         # on a Ray cluster, started on
                                                                    # one of its machines
    python -m companions.a3c_ray --address ray://192.168.0.1:10001  # the same from elsewhere

Read a3c_cartpole.py first. Its WorkerThread, Environment, Agent and LocalBrain run here unchanged.
In the main file, they reach the parameter server as an object in memory. Here they reach a
RemoteServer. It has what they use of a ParameterServer, answers some of it from its own memory
(weights, frames, stop), and sends the rest to the server's process. Look first at the two methods
that make one update, with the numbers of the main file:

    a worker's process                                      the server's process
    6. LocalBrain computes gradients with θ'
    7. RemoteServer.apply_gradients   gradients, steps →    8. Server.update changes θ
       RemoteServer.take              ← θ, frames, stop        and answers
    9. LocalBrain takes this θ: θ' ← θ

Words of Ray: an actor is a process that holds one object and runs its methods when other processes
call them. (It is not the actor of Actor-Critic.) Here the server is one, and each worker. A handle
stands for an actor in the processes that call it. `method.remote(...)` sends a call and returns at
once, with a reference to the result; `ray.get` waits for the result. The driver is this program,
which you start and which shows the progress.

Start a cluster by `ray start --head` on one machine, and `ray start --address=HOST:6379` on the
others. Each machine needs the same Python, Ray, and the packages of the main file.

What differs from the main file:
- A worker learns what the others have done (steps, updates, the end of learning) only from the
  server's answers: before its first step, and after each of its updates. Until then it counts only
  its own steps, and after the end it may begin one more episode.
- The server runs one call at a time, so two updates never meet, and its lock is always free.
- Processes start seconds apart, threads almost at once. So the first worker may have played many
  episodes before the last one begins.
- If a worker is lost, for example with its machine, the others go on. A3C loses only what this one
  would have played. If the server is lost, the run is lost, too.
As in the main file, --seed repeats a run only if there is one worker.
"""
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import a3c_cartpole as a3c
from companions import common

# Ray reads this at its import: no lines of its own about lost workers.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
try:
    import ray
except ImportError:
    ray = None          # start_ray says how to install it

NAME = "a3c_ray"


def learn(seen, run, args):
    """Start the processes, and let the workers play until learning is over.

    `seen` is the driver's own ParameterServer. It gets the weights that the server had last.
    """
    # M0. Start the server's process. `ray.remote` makes an actor class of a class. Calling `remote`
    #     on the actor class starts a process with an object of the class, and returns a handle.
    #     num_cpus=1: Ray starts no more actors than the machines have CPUs. (This is only counting:
    #     on this machine alone, start_ray declares one for each actor.)
    actor_class = ray.remote(num_cpus=1)(Server)
    server = actor_class.remote(args.seed, args.max_episodes, seen.learning_rate)

    # M1. Start the workers' processes, on any machines with free CPUs. Keep their handles: Ray ends
    #     an actor when no handle to it is left.
    actor_class = ray.remote(num_cpus=1)(Worker)
    workers = [actor_class.remote() for _ in run.workers]

    # M2. Let them play. Each worker gets the server's handle, so that it can call the server.
    playing = {worker.run.remote(name, server, args.seed, args.env): name
               for worker, name in zip(workers, run.workers)}

    # Not in the main file: ask the server for news, five times a second.
    is_over = False
    while playing and not is_over:
        ended, _ = ray.wait(list(playing), timeout=.2)      # until a worker has ended, or .2 s
        is_over = take_news(server, seen, run)      # fails if the server is lost
        for result in ended:
            name = playing.pop(result)
            try:
                ray.get(result)                     # fails if the worker is lost
            except ray.exceptions.RayActorError as error:
                print(f"{name} is lost: {reason(error)}", flush=True)
    if is_over:
        # M3. Each worker ends after its present episode. The winner may still have to hand over its
        #     weights.
        ray.wait(list(playing), num_returns=len(playing), timeout=5)
        take_news(server, seen, run)
    else:
        print("error: all workers are lost", file=sys.stderr)


class Worker:
    """A worker as an actor: a process in which the main file's WorkerThread runs."""

    def run(self, name, server, seed, env):
        """Play episodes with the classes of the main file until learning is over."""
        # run() and not start(): no new thread is needed in this process.
        a3c.WorkerThread(name, "learning", RemoteServer(server, seed), env).run()


class RemoteServer:
    """Stands in for the parameter server in a worker's process.

    It has all that the main file's other classes use of a ParameterServer. What would change the
    parameter server is passed on to it: `self.server.update.remote(...)` sends the call to the
    server's process, and `ray.get` waits for the answer.
    """

    def __init__(self, server, seed):
        self.server = server            # the handle of the server's actor
        self.seed = seed                # read by Agent
        self.compiled_gradients = a3c.ParameterServer().compiled_gradients      # by LocalBrain
        self.stop = threading.Event()   # by WorkerThread
        self.steps_since_update = 0
        self.take(ray.get(self.server.state.remote()))      # the first θ

    def apply_gradients(self, gradients):
        """7. Send gradients to the server, and get θ as it is after the update."""
        state = ray.get(self.server.update.remote(gradients, self.steps_since_update))
        self.steps_since_update = 0
        self.take(state)

    def take(self, state):
        """Take over what the server has answered.

        9. LocalBrain.pull_parameter_server then takes this θ. It needs no call of its own.
        """
        self._weights, self.frames, is_over = state
        if is_over:
            self.stop.set()

    @property
    def weights(self):
        """θ, as the server has answered last."""
        return self._weights

    @weights.setter
    def weights(self, weights):
        """Hand weights to the server. Only LocalBrain.push_parameter_server does so, at the end."""
        self.take(ray.get(self.server.replace_weights.remote(weights)))

    def count_step(self):
        """Count a step of this worker. The server hears of it with the next gradients."""
        self.frames += 1
        self.steps_since_update += 1

    def record(self, episode, has_learned):
        """Let the server record an episode. Return True if this worker is the winner."""
        return ray.get(self.server.record.remote(episode, has_learned))


class Server(a3c.ParameterServer):
    """The parameter server. It inherits θ, apply_gradients and record from the main file.

    Another process cannot read its attributes. It can only call its methods, and gets a copy of
    what they return. So `update` also returns everything that a worker must know to play on.
    """

    def update(self, gradients, steps):
        """Apply gradients of a worker, which has played `steps` steps since its last ones."""
        self.frames += steps
        self.apply_gradients(gradients)         # 8. θ changes
        return self.state()

    def replace_weights(self, weights):
        """Take the winner's weights."""
        self.weights = weights
        return self.state()

    def state(self):
        """Return what a worker must know before it plays on."""
        return self.weights, self.frames, self.stop.is_set()

    def news(self, episodes):
        """Return the state, and what is new for a driver that knows this number of episodes."""
        return self.state(), self.history[episodes:], self.is_learned


# == Not needed to understand A3C with Ray: display, options, starting Ray, test ===================


def take_news(server, seen, run):
    """Ask the server for news, and show them. Return True if learning is over."""
    state, episodes, run.is_learned = ray.get(server.news.remote(len(run.history)))
    for e in episodes:
        run.steps = e.total_steps               # (run.record notes them with the episode)
        run.record(e.thread, e.steps, e.mean_of_last_10)
    seen.weights, run.steps, is_over = state
    if run.steps == 0:
        run.started = time.perf_counter()       # the clock starts with the first update
    return is_over


def reason(error):
    """Return the last line of an error of Ray, which says why, without what follows there."""
    return str(error).strip().splitlines()[-1].partition(". ")[0]


def read_options(argv):
    """Read the command line of this program."""
    parser = common.make_parser("Learn CartPole with A3C in many processes, then film it.", NAME,
                                max_episodes=20_000)
    parser.add_argument("--env", default=a3c.ENV, choices=["CartPole-v0", "CartPole-v1"],
                        help="episodes of at most 200 or 500 steps")
    parser.add_argument("--workers", type=a3c.positive_number, metavar="N",
                        default=max(2, min(8, os.cpu_count() - 1)),
                        help="learning processes; each needs a CPU, and one more is for the server")
    parser.add_argument("--address", default="local",
                        help="a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; or local, which"
                             " is this machine alone")
    return common.read_options(parser, argv)


def start_ray(args):
    """Start Ray on this machine, or connect to a cluster. If this fails, end with status 2."""
    if ray is None:
        refuse("Ray is not installed. Install it by: pip install 'ray>=2.50,<3'")
    options = {}
    if args.address == "local":
        options["num_cpus"] = args.workers + 1
    try:
        check_address(args.address)
        ray.init(args.address, log_to_driver=False, logging_level=logging.CRITICAL,
                 # Our own modules, which Ray sends to the machines: a file and a folder
                 runtime_env={"py_modules": [a3c.__file__, str(Path(__file__).parent)]}, **options)
    except (OSError, RuntimeError, ValueError) as error:    # OSError: also of the network
        refuse(f"argument --address: no Ray at {args.address!r}: {reason(error)}")
    # Let SIGTERM be like Ctrl-C again. Ray has put something else there.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < args.workers + 1:
        refuse(f"argument --workers: {args.workers} workers and the server need"
               f" {args.workers + 1} CPUs, and the cluster has {cpus}")


def check_address(address):
    """Raise an error if nothing listens at HOST:PORT. Ray itself would try for minutes."""
    if address not in ("local", "auto"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host, port), timeout=5).close()


def refuse(message):
    """Say in one line why the program cannot start, and end it with exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    """Learn on all workers, keep what was learned, play with it. Return the exit status."""
    args = read_options(argv)
    learning_rate = a3c.LEARNING_RATE_V1 if args.env == "CartPole-v1" else a3c.LEARNING_RATE
    # The driver's own parameter server: the weights that it has seen last are saved and tested.
    seen = a3c.ParameterServer(args.seed, args.max_episodes, learning_rate)
    a3c.check_predict(seen)
    environment = a3c.Environment("test_thread", "test", seen, args.env)

    if args.play:
        seen.weights = common.load_weights(seen.model, args.play)
    else:
        start_ray(args)
        run = common.Run(f"A3C with Ray, {args.env}, {args.workers} processes",
                         environment.max_steps, args.out,
                         [f"worker_{i + 1}" for i in range(args.workers)])
        try:
            with run:
                learn(seen, run, args)
        except ray.exceptions.RayActorError as error:
            print(f"error: the server is lost, and with it the run: {reason(error)}",
                  file=sys.stderr)
        finally:
            seen.model.set_weights(seen.weights)
            run.keep({NAME: seen.model})
            ray.shutdown()
        if not run.is_learned:
            return 1

    a3c.test(environment, args)
    return 0


if __name__ == "__main__":
    common.run_program(main)
