"""A classifier without a learning rate.

A torch module and a criterion, minimised by a trust region in the modular norm on batches of 300 of the digits that
come with ddml. No step increases the loss of its batch, so there is no rate to tune.
"""

import matplotlib
import torch
from matplotlib import pyplot
from mpi4py import MPI
from torch import nn

import ddml
import solvers
from ddml.data import files

matplotlib.use("agg")
digits = files.load("digits", MPI.COMM_SELF)
images, test = (torch.from_numpy(a / digits.maximum).float() for a in (digits.inputs, digits.test_inputs))
labels, wanted = (torch.from_numpy(a).long() for a in (digits.labels, digits.test_labels))

torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
loss = ddml.ModuleLoss(network, lambda out, y: nn.functional.cross_entropy(out, y, reduction="none"), images, labels)
result = solvers.minimise(loss, "tr", iterations=120, options={"batch_size": 300})
loss.assign(result.theta)
with torch.no_grad():
    chances = network(test).softmax(1)
right = chances.argmax(1) == wanted
print(f"{right.float().mean():.1%} of {len(test)} test samples, after {result.work:.0f} passes over the data")

figure = pyplot.figure(figsize=(10, 3.6), layout="constrained")
left, cells = figure.subfigures(1, 2)
axes = left.subplots()
axes.semilogy(result.losses, linewidth=0.8)
axes.set(xlabel="iterations", ylabel="loss of the batch")
cells.suptitle("the test samples it is least sure of, and what it says")
doubtful = chances.max(1).values.argsort()[:10]
for axes, i in zip(cells.subplots(2, 5).ravel(), doubtful.tolist(), strict=True):
    axes.imshow(test[i].reshape(8, 8), cmap="gray_r")
    axes.set_title(f"{chances[i].argmax()}, {chances[i].max():.0%}", color="black" if right[i] else "red", fontsize=9)
    axes.set_axis_off()
figure.savefig("classifier.png", dpi=120)
