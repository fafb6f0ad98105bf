"""A restart on another number of ranks.

A run of three ranks stops after 40 iterations; two go on from its file, then one. The history is that of a run that was
never stopped, to the last bit: sums are made in a fixed order, whatever the ranks.
"""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot

import ddml

matplotlib.use("agg")
PINN = Path(__file__).resolve().parents[2] / "drivers" / "pinn.py"


def run(ranks, *options):
    """Train on so many ranks; where ddml is installed, ``mpiexec -n 3 ddml-pinn`` does the same."""
    command = ["mpiexec", "-n", str(ranks), sys.executable, "-m", "mpi4py", str(PINN), *map(str, options)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


WHAT = ("-problem", "burgers", "-points", 500, "-solver", "lbfgs", "-overwrite", "-progress", "none")
run(1, *WHAT, "-max_it", 120, "-output", "whole.h5")
run(3, *WHAT, "-max_it", 40, "-output", "stopped.h5")
run(2, "-restart", "stopped.h5", "-max_it", 80, "-progress", "none")
run(1, "-restart", "stopped.h5", "-max_it", 120, "-progress", "none")

whole, stopped = ddml.open_run("whole.h5"), ddml.open_run("stopped.h5")
same = np.array_equal(whole.history["loss"], stopped.history["loss"]) and whole.theta.equal(stopped.theta)
print(f"{len(stopped.history)} iterations, the same to the last bit: {same}")

figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
axes.semilogy(whole.history["loss"], color="lightgrey", linewidth=6, label="never stopped")
for ranks, begin in ((3, 0), (2, 40), (1, 80)):
    part = slice(begin, begin + 41)
    numbers = stopped.history["iteration"][part]
    axes.semilogy(numbers, stopped.history["loss"][part], label=f"{ranks} ranks" if ranks > 1 else "1 rank")
axes.set(xlabel="iterations", ylabel="loss")
axes.legend()
figure.savefig("restart_on_other_ranks.png", dpi=120)
