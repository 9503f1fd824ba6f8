"""The A3C of a3c_cartpole.py on many cores and many machines, with Ray.

Python runs the code of one thread at a time. Here each worker is a process of its own, on any core
of any machine, so the workers play at the same time. The parameter server is one more process, and
the workers call its methods through Ray (https://docs.ray.io). Each update costs such a call, about
a millisecond. So this pays where a step of the game takes long; a step of CartPole does not.

    python companions/a3c_ray.py                        # on this machine
    python companions/a3c_ray.py --workers 32 --address 192.168.0.1:6379
                                                        # on a cluster, from one of its machines
    python companions/a3c_ray.py --workers 32 --address ray://192.168.0.1:10001
                                                        # on a cluster, from another machine

A cluster is several machines on which Ray runs; companions/README.md says how to start it. Read
a3c_cartpole.py first. Its WorkerThread, Environment, Agent and LocalBrain run here unchanged. They
call the methods of a ParameterServer and read its attributes. Here the parameter server is in
another process, so each worker has a RemoteServer, which sends calls there and keeps what is
answered. One update, with the numbers of the main file:

    a worker's process                                      the server's process
    6. LocalBrain computes gradients with θ'
    7. RemoteServer.apply_gradients   gradients, steps →    8. Server.update changes θ
       RemoteServer.take              ← θ, frames, stop        and answers
    9. LocalBrain takes this θ: θ' ← θ

It is still asynchronous: a worker waits for the server's answer, not for the steps of others. The
more workers, the older the gradients: with 64, about 63 updates by others come between copy and
update. (Tried here with 2 and 8 workers only.)

Words of Ray: an actor is a process that holds one object and runs its methods when other processes
call them. (It is not the actor of Actor-Critic.) Here the server is an actor, and so is each
worker. A handle stands for an actor in the processes that call it. `handle.method.remote(...)`
sends a call and returns at once, with a reference to the result; `ray.get` waits for the result.
The driver is the program that you start. It shows the progress.

What differs from the main file:
- A worker learns what the others have done (steps, updates, the end of learning) only from the
  server's answers, before its first step and after each of its updates. So it may play on after the
  end, until ray.shutdown ends it.
- The server's lock has nothing to do, because the server answers one call after another.
- If a worker is lost, for example with its machine, the others go on: A3C loses only its unsent
  steps and its later play. If the server is lost, the run ends, and the weights seen last are kept.
"""
import logging
import os
import signal
import socket
import sys

import common

import a3c_cartpole as a3c

import gymnasium as gym

# Ray reads these settings at its import.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")     # no lines of Ray's about lost workers
os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "10")    # try for 10 s to connect
os.environ.setdefault("RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S", "5")   # with ray://: for 3 times 5 s
try:
    import ray
except ImportError:
    ray = None      # start_ray says how to install it


def learn(run, names, args, learning_rate):
    """Start the processes, let the workers play until learning is over, and show it.

    `run`, a common.Run, has the driver's list of episodes, the bars, and the weights to keep.
    """
    # M0. Start the server's process. `ray.remote(...)(Server)` is a class of actors, and
    #     `server_class.remote` starts one in a process. It runs on the machine to which the driver
    #     connects: no other's loss ends the run. num_cpus=0: it starts even if other programs have
    #     taken all CPUs of the cluster. (Ray counts CPUs, but binds no cores.)
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False)
    server_class = ray.remote(num_cpus=0, scheduling_strategy=here)(Server)
    server = server_class.remote(args.seed, args.max_episodes, learning_rate)

    # M1. Start the workers' processes, on any machines with free CPUs. The handles are kept in a
    #     list, because Ray ends an actor when no handle is left.
    worker_class = ray.remote(num_cpus=1)(Worker)
    workers = [worker_class.remote() for _ in names]

    # M2. Let them play. Each worker gets the server's handle, so that it can call the server.
    references = {name: worker.run.remote(name, server, args.seed, args.env)
               for name, worker in zip(names, workers)}

    # Show the progress: ask the server for news, five times a second.
    playing = {reference: name for name, reference in references.items()}
    is_over = False
    while playing and not is_over:
        ended, _ = ray.wait(list(playing), timeout=.2)      # until a worker has ended, or .2 s
        is_over = take_news(server, run)        # after `wait`; fails if the server is lost
        for reference in ended:
            name = playing.pop(reference)
            try:
                ray.get(reference)              # raises the worker's error, or that it is lost
            except lost_errors() as error:
                common.say(f"{name} is lost: {reason(error)}")

    # M3. Get the winner's weights. The others are not awaited: ray.shutdown, in `main`, ends them.
    if run.is_learned:
        winner = run.history[-1].worker         # (after its episode the server records no other)
        try:
            run.best_ten = [ray.get(references[winner], timeout=10)]
        except lost_errors():
            common.say("the winner is lost: the mean of the last ten θ that came here is saved")
    elif not is_over:
        print("error: all workers are lost", file=sys.stderr)


def take_news(server, run):
    """Ask the server for the episodes that the driver does not know. Return whether it has stopped.

    `run` applies the workers' rule again. With each episode it keeps the θ of this answer; the mean
    of ten stands in for a lost winner's.
    """
    (weights, frames, stop), episodes = ray.get(server.news.remote(len(run.history)))
    if frames == 0:
        run.start_clock()       # again and again, until the first update
    for e in episodes:
        run.steps = e.total_steps
        run.finish_episode(e.worker, e.steps, weights)
    run.steps = frames
    return stop


class Worker:
    """A worker as an actor: a process in which the main file's WorkerThread runs."""

    def run(self, name, server, seed, env_name):
        """Play until learning is over. Return the weights to keep if this worker is the winner."""
        remote_server = RemoteServer(server, seed)
        # run() and not start(): no new thread is needed in this process.
        a3c.WorkerThread(name, remote_server, env_name).run()
        return remote_server.weights if remote_server.is_learned else None


class Server(a3c.ParameterServer):
    """The parameter server as an actor, with θ, apply_gradients and record of the main file.

    Another process cannot read its attributes. It can only call its methods, and gets a copy of
    what they return. So `update` also returns everything that a worker must know to play on.
    """

    def update(self, gradients, steps):
        """Apply a worker's gradients, after `steps` more steps of this worker."""
        self.frames += steps
        self.apply_gradients(gradients)         # 8. θ changes
        return self.answer()

    def answer(self):
        """Return what a worker must know before it plays on: θ, frames, and whether to stop."""
        return self.weights, self.frames, self.stop.is_set()

    def news(self, known):
        """Return the same, and the episodes after the first `known` ones."""
        return self.answer(), self.history[known:]


class RemoteServer(a3c.ParameterServer):
    """A worker's stand-in for the parameter server.

    For the main file's classes it is a ParameterServer. But its `weights`, `frames` and `stop` come
    from the server's last answer. It sends gradients, steps and episodes to the server, nothing
    else.
    """

    def __init__(self, server, seed):
        super().__init__(seed)      # for `seed`, `stop`, `is_learned` and `compiled_gradients`
        self.server = server        # the handle of the server's actor
        self.steps_since_update = 0
        self.take(ray.get(self.server.answer.remote()))     # 1. the first θ

    def apply_gradients(self, gradients):
        """7. Send gradients to the server, which applies them, and get its θ."""
        answer = ray.get(self.server.update.remote(gradients, self.steps_since_update))
        self.steps_since_update = 0
        self.take(answer)

    def take(self, answer):
        """Take over what the server has answered.

        9. LocalBrain.pull_parameter_server then takes this θ, without a call to the server.
        """
        self.weights, self.frames, stop = answer
        if stop:
            self.stop.set()

    def count_step(self):
        """Count a step of this worker. The server hears of it with the next gradients."""
        self.frames += 1
        self.steps_since_update += 1

    def record(self, episode, has_learned):
        """Let the server record an episode. Return True if this worker is the winner.

        Environment.finish_episode then puts the mean of the last ten θ' here, not on the server.
        Worker.run returns it to the driver. `is_learned` is true only for the winner.
        """
        self.is_learned = ray.get(self.server.record.remote(episode, has_learned))
        if self.is_learned:
            self.stop.set()         # so it ends, and no answer replaces these weights
        return self.is_learned


# == Not needed to understand A3C with Ray: errors, starting Ray, options, test ====================

def lost_errors():
    """Return the errors by which `ray.get` says that an actor is lost, or does not answer.

    (This is a function because Ray may not be installed.)
    """
    return (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError,
            ray.exceptions.RuntimeEnvSetupError, ray.exceptions.GetTimeoutError)


def reason(error):
    """Return the last line of an error of Ray, which says why, up to its first full stop."""
    return str(error).strip().splitlines()[-1].partition(". ")[0]


def start_ray(args):
    """Start Ray on this machine, or connect to a cluster. If this fails, end with status 2."""
    if ray is None:
        refuse("Ray is not installed. Install it by: python -m pip install 'ray>=2.50,<3'")
    options = {"num_cpus": args.workers} if args.address == "local" else {}
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        check_address(args.address)
        # Ray sends only classes of the program itself to the workers, so name the main file here.
        ray.init(args.address, log_to_driver=False, logging_level=logging.CRITICAL,
                 runtime_env={"py_modules": [a3c.__file__]}, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        message = " ".join(str(error).split())      # in one line
        refuse(f"argument --address: cannot use Ray at {args.address!r}: {message}")
    signal.signal(signal.SIGTERM, sigterm_handler)      # Ray has put one of its own there
    free_cpus = int(ray.available_resources().get("CPU", 0))
    if free_cpus < args.workers:
        common.say(f"{free_cpus} CPUs of the cluster are free. Each of the {args.workers} workers"
                   " needs one. The workers without a CPU wait until one is free.")


def check_address(address):
    """Raise an error at once where Ray itself would try for long: up to minutes."""
    if address in ("local", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    right_address = {"6379": f"{host}:6379", "10001": f"ray://{host}:10001"}    # Ray's usual ports
    if address != right_address.get(port, address):
        raise ValueError(f"this is the port of {right_address[port]}")
    socket.create_connection((host, port), timeout=5).close()


def refuse(message):
    """Say in one line why the program cannot start, and end it with exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    """Learn on all workers, keep what was learned, play with it. Return the exit status."""
    parser = common.make_parser("Learn CartPole with A3C in many processes, then film it.",
                                "a3c_ray", a3c.MAX_EPISODES)
    parser.add_argument("--env", default=a3c.ENV, choices=["CartPole-v0", "CartPole-v1"],
                        help="episodes of at most 200 or 500 steps")
    parser.add_argument("--workers", type=common.positive_number, metavar="N",
                        default=max(2, min(8, os.cpu_count() - 1)),     # 1 for server and driver
                        help="learning processes; each needs a CPU")
    parser.add_argument("--address", default="local",
                        help="a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; or local, which"
                             " is this machine alone")
    args = common.parse_options(parser, argv)

    learning_rate = a3c.LEARNING_RATE_V1 if args.env == "CartPole-v1" else a3c.LEARNING_RATE
    own = a3c.ParameterServer(args.seed)        # the driver's own, for its Keras model
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
        except lost_errors() as error:
            sys.exit(f"error: the server is lost, so the run ends: {reason(error)}")
        finally:
            with common.uninterrupted():        # otherwise a second Ctrl-C could leave processes
                ray.shutdown()

    def act(weights, s):
        brain.weights = weights
        return int(brain.predict_p(s).argmax())         # the more probable action

    return run.test(act)


if __name__ == "__main__":
    common.run_program(main)
