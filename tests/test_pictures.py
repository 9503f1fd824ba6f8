"""The tools for learners: pictures of a run, and one episode number by number."""

import csv
import threading

import a3c_cartpole as a3c
from companions import microscope, pictures

import matplotlib.image
import numpy as np
import pytest


def in_thread(name, call, *arguments):
    thread = threading.Thread(target=call, args=arguments, name=name)
    thread.start()
    thread.join()


def test_updates_by_others_are_those_between_a_threads_own_copy_and_update():
    server = pictures.NotingServer()
    zero = [np.zeros_like(w) for w in server.weights]
    brains = {name: a3c.LocalBrain(server) for name in "ABC"}

    # a small letter copies, a capital letter updates
    for letter in "a b c  B b  C c  A a  A  a B  C".replace(" ", ""):
        name = letter.upper()
        if letter == name:
            in_thread(name, server.apply_gradients, zero)
        else:
            in_thread(name, brains[name].pull_parameter_server)
    server.stop.set()
    in_thread("A", server.apply_gradients, zero)

    noted = [(u.thread, u.copied, u.made, pictures.by_others(u)) for u in server.updates]
    assert noted == [("B", 0, 1, 0), ("C", 0, 2, 1), ("A", 0, 3, 2), ("A", 3, 4, 0),
                     ("B", 1, 5, 3), ("C", 2, 6, 3)]
    times = [time for u in server.updates for time in (u.start, u.end)]
    assert all(start < end for start, end in zip(times[::2], times[1::2]))
    assert times[1::2] == sorted(times[1::2])


@pytest.mark.parametrize("name, n_workers", [("A3C", pictures.LANES + 2), ("A3C.unfinished", 1)])
def test_pictures_of_a_run(name, n_workers, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "UPDATES", 150)
    a3c.ParameterServer().model.save_weights(tmp_path / f"{name}.weights.h5")
    episodes = [a3c.Episode(f"local_thread{worker + 1}", i + 1, 200, 20 * i, 200 * i)
                for i in range(12) for worker in range(n_workers)]
    with open(tmp_path / "history.csv", "w", newline="") as file:
        csv.writer(file).writerows([a3c.Episode._fields, *episodes])

    assert pictures.main([str(tmp_path)]) == 0

    curve = matplotlib.image.imread(tmp_path / "learning_curve.png")
    assert coloured(curve) > 50
    three_as = matplotlib.image.imread(tmp_path / "three_as.png")
    height, width, _ = three_as.shape
    assert coloured(three_as[:height // 2]) > 20_000
    assert coloured(three_as[height // 2:, :width * 3 // 4]) > 20_000       # the lanes


def coloured(image):
    """The number of points that are not white, black or grey."""
    return np.count_nonzero(np.ptp(image[..., :3], axis=-1) > .3)


def test_without_weights_a_message_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        pictures.main([str(tmp_path)])
    assert end.value.code == 2 and "no weights" in capsys.readouterr().err


def test_numbers_of_the_microscope_are_those_of_the_equations(server):
    server.seed = 1
    before = server.weights
    rows = microscope.look(server)

    # The same episode once more, by its actions
    environment = a3c.Environment("local_thread1", "learning", server)
    s, _ = environment.env.reset()
    states = [s]
    for _, a, *_ in rows:
        s, _, is_over, _, _ = environment.env.step(a)
        states.append(s)
    assert is_over and len(rows) > 5

    for t, (_, a, r, *numbers) in enumerate(rows):
        assert r == (-1 if t == len(rows) - 1 else 0)
        R_n = sum(.99 ** k * row[2] for k, row in enumerate(rows[t:t + 5]))
        mask = t < len(rows) - 5
        p, v = forward(before, states[t])
        _, v_ = forward(before, states[t + 5] if mask else np.zeros(4))
        R = R_n + .99 ** 5 * v_ if mask else R_n
        p_after, v_after = forward(server.weights, states[t])
        np.testing.assert_allclose(numbers, [R_n, mask, v, v_, R, R - v, p[a], p_after[a], v_after],
                                   atol=1e-5)
        assert abs(v_after - v) > 1e-4


def forward(weights, s):
    """Compute p and V of one state, each sum by hand."""
    kernel, bias, p_kernel, p_bias, v_kernel, v_bias = [np.asarray(w, float) for w in weights]
    hidden = [max(0, sum(s * kernel[:, i]) + bias[i]) for i in range(16)]
    z = [sum(hidden * p_kernel[:, i]) + p_bias[i] for i in range(2)]
    return np.exp(z) / sum(np.exp(z)), sum(hidden * v_kernel[:, 0]) + v_bias[0]


def test_microscope_prints_an_episode_with_one_update(capsys):
    assert microscope.main([]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()
               if line[:4].strip().isdecimal()]
    rows = microscope.look(a3c.ParameterServer(microscope.SEED))
    assert len(rows) == a3c.T_MAX
    np.testing.assert_allclose(np.array(printed, float), np.array(rows, float), atol=.0051)
