"""The A3C of a3c_cartpole.py on many cores and many machines, with Ray.

Python runs one thread of a program at a time. Here each worker is a process of its own, on any
core of any machine, so the workers play at the same time, if there are enough cores. The parameter
server is one more process, and the workers call its methods through Ray (https://docs.ray.io).

    python companions/a3c_ray.py                                    # on this machine
    python companions/a3c_ray.py --address 192.168.0.1:6379         # on a Ray cluster, started on
                                                                    # one of its machines
    python companions/a3c_ray.py --address ray://192.168.0.1:10001  # the same from elsewhere

Start a cluster by `ray start --head` on one machine, and `ray start --address=HOST:6379` on the
others. Each machine needs the same Python, Ray, and the packages of the main file.

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
call them. (It is not the actor of Actor-Critic.) Here the server is an actor, and so is each
worker. A handle stands for an actor in the processes that call it. `method.remote(...)` sends a
call and returns at once, with a reference to the result; `ray.get` waits for the result. The driver
is this program, which you start and which shows the progress.

What differs from the main file:
- A worker learns what the others have done (steps, updates, the end of learning) only from the
  server's answers: before its first step, and after each of its updates. After the end it may begin
  one more episode.
- The server runs one call at a time, so two updates never meet, and its lock is always free.
- If a worker is lost, for example with its machine, the others go on: A3C loses only what this one
  would have played. If the server is lost, the run ends, and the weights seen last are saved.
As in the main file, --seed repeats a run only if there is one worker.
"""
import logging
import os
import signal
import socket
import sys
import threading

import common

import a3c_cartpole as a3c

import gymnasium as gym

os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")     # print no line of the workers' logs
try:
    import ray
except ImportError:
    print("error: Ray is not installed. Install it by: pip install 'ray>=2.50,<3'", file=sys.stderr)
    sys.exit(2)

LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError,
        ray.exceptions.RuntimeEnvSetupError)


# A class of actors: Server.remote(...) starts a process with a Server in it. Ray only counts CPUs;
# the server takes none, so that it starts in any case.
@ray.remote(num_cpus=0)
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

    def state(self):
        """Return what a worker must know before it plays on: θ, frames, and whether to stop."""
        return self.weights, self.frames, self.stop.is_set()

    def news(self, known):
        """Return the state, and the episodes after the first `known` ones."""
        return self.state(), self.history[known:]


class RemoteServer:
    """Stands in for the parameter server in a worker's process.

    It has all that the main file's other classes use of a ParameterServer. What would change the
    parameter server is passed on to it: `self.server.update.remote(...)` sends the call to the
    server's process, and `ray.get` waits for the answer.
    """

    def __init__(self, server, seed):
        self.server = server            # the handle of the server's actor
        self.seed = seed                # for Agent
        self.stop = threading.Event()   # for WorkerThread
        self.compiled_gradients = a3c.ParameterServer().compiled_gradients      # (only for these)
        self.steps_since_update = 0
        self.is_winner = False
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
        self.weights, self.frames, stop = state
        if stop:
            self.stop.set()

    def count_step(self):
        """Count a step of this worker. The server hears of it with the next gradients."""
        self.frames += 1
        self.steps_since_update += 1

    def record(self, episode, has_learned):
        """Let the server record an episode. Return True if this worker is the winner.

        Environment.finish_episode then calls push_parameter_server, which puts the weights to keep
        into `self.weights`. Worker.run returns them.
        """
        self.is_winner = ray.get(self.server.record.remote(episode, has_learned))
        if self.is_winner:
            self.stop.set()
        return self.is_winner


@ray.remote(num_cpus=1)
class Worker:
    """A worker as an actor: a process in which the main file's WorkerThread runs."""

    def run(self, name, server, seed, env_name):
        """Play until learning is over. Return the weights to keep if this worker is the winner."""
        remote_server = RemoteServer(server, seed)
        # run() and not start(): no new thread is needed in this process.
        a3c.WorkerThread(name, remote_server, env_name).run()
        return remote_server.weights if remote_server.is_winner else None


def learn(run, names, args, learning_rate):
    """Start the processes, let the workers play until learning is over, and show it."""
    # M0 and M1. Start the processes, on any machines with free CPUs. `remote` returns a handle.
    server = Server.remote(args.seed, args.max_episodes, learning_rate)
    workers = [Worker.remote() for _ in names]      # kept, because Ray ends an actor without handle

    # M2. Let them play. Each worker gets the server's handle, so that it can call the server.
    results = {name: worker.run.remote(name, server, args.seed, args.env)
               for name, worker in zip(names, workers)}

    # Not in the main file: ask the server for news, five times a second.
    playing = {result: name for name, result in results.items()}
    is_over = False
    while playing and not is_over:
        ended, _ = ray.wait(list(playing), timeout=.2)      # until a worker has ended, or .2 s
        is_over = take_news(server, run)                    # (fails if the server is lost)
        for result in ended:
            name = playing.pop(result)
            try:
                ray.get(result)                             # fails if the worker is lost
            except LOST as error:
                print(f"{name} is lost: {reason(error)}", flush=True)

    # M3. Only the winner has something to hand over; ray.shutdown ends the others.
    if run.is_learned:
        try:
            run.best_weights = ray.get(results[run.history[-1].worker], timeout=10)
        except (*LOST, ray.exceptions.GetTimeoutError):
            print("the winner is lost: kept is the mean of the last ten θ seen here", flush=True)
    elif not is_over:
        print("error: all workers are lost", file=sys.stderr)


def take_news(server, run):
    """Ask the server for the episodes that the driver does not know. Return True if it has ended.

    The driver's Run applies the same rule to the same episodes as the workers do, so both agree.
    Its own mean of weights, of θ up to .2 s late, is kept only if the winner is lost.
    """
    (weights, frames, stop), episodes = ray.get(server.news.remote(len(run.history)))
    if frames == 0:
        run.start_clock()       # the clock starts with the first update
    for e in episodes:
        run.steps = e.total_steps
        run.finish_episode(e.worker, e.steps, weights)
    run.steps = frames
    return stop


# == Not needed to understand A3C with Ray: options, starting Ray, test ============================

def reason(error):
    """Return the last line of an error of Ray, which says why, up to its first full stop."""
    return str(error).strip().splitlines()[-1].partition(". ")[0]


def start_ray(args):
    """Start Ray on this machine, or connect to a cluster. If this fails, end with status 2."""
    options = {"num_cpus": args.workers} if args.address == "local" else {}
    try:
        if args.address not in ("local", "auto"):       # Ray itself would try for long
            host, _, port = args.address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, port), timeout=5).close()
        # Ray sends the main file to the workers. (It sends the classes of this file by itself.)
        ray.init(args.address, log_to_driver=False, logging_level=logging.CRITICAL,
                 runtime_env={"py_modules": [a3c.__file__]}, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        print(f"error: argument --address: no Ray at {args.address!r}:"
              f" {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    # Let SIGTERM be like Ctrl-C again. Ray has put something else there.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    free = int(ray.available_resources().get("CPU", 0))
    if free < args.workers:
        print(f"{args.workers} workers need a CPU each; {free} of the cluster's are free: waiting",
              flush=True)


def main(argv=None):
    """Learn on all workers, keep what was learned, play with it. Return the exit status."""
    parser = common.make_parser("Learn CartPole with A3C in many processes, then film it.",
                                "a3c_ray", a3c.MAX_EPISODES)
    parser.add_argument("--env", default=a3c.ENV, choices=["CartPole-v0", "CartPole-v1"],
                        help="episodes of at most 200 or 500 steps")
    parser.add_argument("--workers", type=a3c.positive_number, metavar="N",
                        default=max(2, min(8, os.cpu_count() - 1)),
                        help="learning processes; each needs a CPU")
    parser.add_argument("--address", default="local",
                        help="a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; or local, which"
                             " is this machine alone")
    args = common.parse_options(parser, argv)

    learning_rate = a3c.LEARNING_RATE_V1 if args.env == "CartPole-v1" else a3c.LEARNING_RATE
    own = a3c.ParameterServer()         # the driver's own, for its Keras model
    a3c.check_predict(own)
    brain = a3c.LocalBrain(own)
    names = [f"worker_{i + 1}" for i in range(args.workers)]
    run = common.Run(own.model, gym.make(args.env, render_mode="rgb_array"),
                     f"A3C with Ray, {args.env}, {args.workers} processes", args, names)
    if not args.play:
        start_ray(args)
        try:
            with run:
                learn(run, names, args, learning_rate)
        except LOST as error:
            sys.exit(f"error: the server is lost, and with it the run: {reason(error)}")
        finally:
            ray.shutdown()

    def act(weights, s):
        brain.weights = weights
        return int(brain.predict_p(s).argmax())

    return run.test(act)


if __name__ == "__main__":
    common.run_program(main)
