"""What the tests of classify.py share: batches of digits, and data and networks as users write them."""

BATCHES = ("-batch_size", "300", "-batch_overlap", "0.1", "-widths", "12", "-summation_blocks", "4")

USER = """
import numpy as np
from torch import nn


def rings():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (500, 2))
    y = (np.hypot(*x.T) > 0.7).astype(int)
    train, test = {"inputs": x[:400], "labels": y[:400]}, {"test_inputs": x[400:], "test_labels": y[400:]}
    return {**train, **test, "classes": ["in", "out"]}


def net(shape, classes):
    return nn.Sequential(nn.Linear(*shape, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, classes))


def narrow(shape, classes):
    return nn.Linear(3, classes)


def solids():  # noisy volumes with a bright half along one of the axes
    rng = np.random.default_rng(0)
    y = np.arange(80) % 3
    x = rng.standard_normal((80, 1, 7, 8, 9)).astype("float32")
    for i, axis in enumerate(y):
        x[i, 0][(slice(None),) * axis + (slice(4),)] += 1
    train, test = {"inputs": x[:60], "labels": y[:60]}, {"test_inputs": x[60:], "test_labels": y[60:]}
    return {**train, **test, "classes": ["D", "H", "W"]}


def wrong_labels():
    return {**rings(), "classes": ["in"]}
"""
