"""Reading a run.

A run file is all that is needed later: `ddml.open_run` gives its history as arrays and its network as a torch module,
which takes points in the problem's coordinates and knows its derivatives as any module does. The loss jumps where the
run has moved its points to where residuals are large.
"""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

import ddml

matplotlib.use("agg")
PINN = Path(__file__).resolve().parents[2] / "drivers" / "pinn.py"
options = "-problem burgers -points 2000 -max_it 400 -output burgers.h5 -overwrite -progress none"
subprocess.run([sys.executable, str(PINN), *options.split()], check=True, stdout=subprocess.DEVNULL)

run = ddml.open_run("burgers.h5")
print(run)
print(f"{run.options['points']} points, made with ddml {run.attributes['ddml_version']}")

network = run.network()
x = torch.linspace(-1, 1, 401, dtype=torch.float64)
figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for column, marker in (("loss", ""), ("error", "o")):
    known = np.isfinite(run.history[column])  # errors are not measured at every iteration
    left.semilogy(run.history["work"][known], run.history[column][known], marker=marker, label=column)
left.set(xlabel="work, in evaluations of loss and gradient")
left.legend()
for t in (0.0, 0.25, 0.5, 1.0):
    points = torch.stack([torch.full_like(x, t), x], dim=1).requires_grad_()
    u = network(points)
    (slope,) = torch.autograd.grad(u.sum(), points)
    right.plot(x, u.detach(), label=f"t = {t:g}, steepest slope {slope[:, 1].min():.0f}")
right.set(xlabel="x", ylabel="u")
right.legend(fontsize=8)
figure.savefig("reading_a_run.png", dpi=120)
