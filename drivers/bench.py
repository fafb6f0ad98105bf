"""Measure: python drivers/bench.py [-seconds 60] [-only evaluation,ranks,...] [-delays 0,3,10].

Prints tables with medians and ratios; what is compared is measured side by side in the same
process, alternately where it is short. Sections: evaluation, restricted, ranks, overhead, balance,
rounding, solvers, preconditioners, kernels; others, which -only map,classifiers,... names, are run only where it does.
"""

from __future__ import annotations

from common.program import HELP, run_program

import torch
from benches.classifiers import classifiers
from benches.closures import closures
from benches.evaluations import balance, evaluation, ranks, ranks_worker, restricted
from benches.kernel_balance import kernels_balance, kernels_balance_worker
from benches.kernel_deep import deep_kernels
from benches.kernel_machines import kernels, kernels_iterations
from benches.kernel_scaling import kernels_scaling, kernels_scaling_worker
from benches.large import large, large_worker
from benches.levels import levels
from benches.preconditioners import preconditioners
from benches.prices import prices
from benches.samples import samples
from benches.synchronisations import map_worker, solver_map
from benches.tile_schwarz import tiles_schwarz
from benches.tiles import tiles
from benches.training import overhead, rounding, solvers
from benches.work import work
from mpi4py import MPI

from ddml import options
from ddml.errors import InputError
from ddml.options import Option

SECTIONS = {
    "evaluation": evaluation,
    "restricted": restricted,
    "ranks": ranks,
    "overhead": overhead,
    "balance": balance,
    "rounding": rounding,
    "solvers": solvers,
    "preconditioners": preconditioners,
    "kernels": kernels,
}
# only where -only names them
ASKED = {
    "map": solver_map,
    "classifiers": classifiers,
    "levels": levels,
    "work": work,
    "prices": prices,
    "closures": closures,
    "samples": samples,
    "large": large,
    "kernels_deep": deep_kernels,
    "tiles": tiles,
    "tiles_schwarz": tiles_schwarz,
    "kernels_balance": kernels_balance,
    "kernels_balance_worker": kernels_balance_worker,
    "kernels_iterations": kernels_iterations,
    "kernels_scaling": kernels_scaling,
    "ranks_worker": ranks_worker,
    "map_worker": map_worker,
    "large_worker": large_worker,
    "kernels_scaling_worker": kernels_scaling_worker,
}
OPTIONS = (
    Option("seconds", 60.0, "Budget of each solver in the sections solvers and map.", above=0.0),
    Option("only", ",".join(SECTIONS), "Sections to run."),
    Option("delays", "0,3,10", "What a synchronisation costs more than it does here, in the sections map and "
           "tiles_schwarz (ms)."),
    Option("map_cases", "burgers-20x8,klein_gordon-20x4,klein_gordon-50x6", "Problems and networks of the map; or as "
           "for -classifiers."),
    Option("classifiers", "digits:mlp:240", "Data, network, batch size and, if not all, samples in that section, as in "
           "mnist.h5:mlp:10000,cifar10.h5:cnn:1000:10000; batch size 0 is all samples."),
    Option("levels_cases", "digits:euler:0", "Of the section levels, as for -classifiers; further options follow, as "
           "in digits:euler:0:blocks=64:width=8:levels=3."),
    Option("levels_methods", "", "Words; methods whose names have one of them are in that section."),
    Option("methods", "tr,apts,torch", "Words; methods whose names have one of them are in that section."),
    Option("marks", "10,30,60,120", "Work units where these sections measure."),
    Option("seeds", "0", "Seeds of the map, of classifiers, levels and nests of samples: medians are printed."),
    Option("logistic_data", "digits:4:9,wide", "Data of the sections prices and samples, named as for logistic.py, "
           "with classes behind them, as in a9a.gz,mnist.h5:4:9."),
    Option("sample_tables", "counts,gaps", "Tables of the section samples."),
    Option("sample_drawn", 60.0, "Work units at which they give SVRG and SARAH up.", above=0.0),
    Option("sample_fractions", "0.01:0.075,0.1:0.1,0.25:0.5,0.5:0.75", "Parts of the samples in them, each with the "
           "rate of sub-sampled Newton there (those of the slides)."),
    Option("large_data", "", "Data file of the section large (default: random numbers)."),
    Option("large_widths", "2048,2048,2048", "Hidden layers of its network."),
    Option("large_batch", 1000, "Samples of its batches.", minimum=1),
    Option("deep_data", "mnist.h5", "Data file of the section kernels_deep."),
    Option("deep_samples", "2000", "Its numbers of samples."),
    Option("deep_networks", "mlp,cnn", "Its classifiers, of the seeds that -seeds names."),
    Option("deep_iterations", 60, "Iterations of tr that these are trained for.", minimum=1),
    Option("tiles_data", "yale.h5", "Data file of the section tiles, of images or volumes."),
    Option("tiles_network", "vgg", "Its network."),
    Option("tiles_cases", "4x4:0,4x4:4,4x4:8,2x2:0", "Its splits, each with an overlap."),
    Option("tiles_epochs", 12, "Its epochs.", minimum=1),
    Option("tiles_batch", 32, "Samples of a batch.", minimum=1),
    Option("tiles_rates", "1e-3:3e-3", "Rates of Adam for the undivided network, and for those of tiles."),
    Option("tiles_transfer_epochs", 4, "Epochs of its coherent nets behind a finished coarse phase; 0: there are none.",
           minimum=0),
    Option("tiles_links", "log_probabilities,logits", "Links with which its coherent nets begin at random values."),
    Option("tiles_schwarz_iterations", 40, "Of the solvers of coherent nets in the section tiles_schwarz.", minimum=1),
    Option("tiles_figures", "", "Folder that its figures are written to (default: none are)."),
    Option("kernels_balance_data", "digits", "Data of the section kernels_balance: as for classify.py, or LIBSVM "
           "files."),
    Option("kernels_balance_samples", 20_000, "Samples that it moves, at most.", minimum=1),
    Option("kernels_balance_solved", 4096, "Samples that it solves for, at most.", minimum=64),
    Option("kernels_data", "digits", "Data of the sections kernels and kernels_scaling: as for classify.py, or LIBSVM "
           "files to train and test, as in a9a.gz:a9a.t.gz."),
    Option("kernels_sizes", "1400", "Numbers of samples in the sections kernels, which takes the first so many; "
           "kernels_scaling takes the first number."),
    Option("kernels_kernel", "rbf", "Kernel of the sections kernels and kernels_scaling."),
    Option("kernels_width", 0.5, "Its width, over the median distance.", above=0.0),
    Option("kernels_lambda", 0.1, "Regularisation there.", above=0.0),
    Option("kernels_tests", 10_000, "Samples to test with, at most.", minimum=1),
    Option("kernels_repeats", 1, "Runs of each method.", minimum=1),
    Option("kernels_methods", "", "Words; methods whose names have one of them are in the section kernels, and "
           "KernelRidge is."),
    Option("kernels_ranks", "0.025,0.05,0.1,0.2", "Ranks of Nystrom's preconditioner, over the number of samples."),
    Option("kernels_sets", "digits", "Data of the section kernels_iterations."),
    Option("kernels_kernels", "rbf:0.5,laplace:1", "Its kernels, each with a width."),
    Option("kernels_lambdas", "0.1,1e-3", "Its regularisations."),
    Option("kernels_counts", "4,16,64", "Its numbers of subdomains."),
    Option("delay", 0.0, "Of map_worker (ms).", minimum=0.0),
    Option("driver", "pinn", "Of map_worker.", choices=("pinn", "classify")),
    Option("repeats", 7, "Timings of each short measurement.", minimum=1),
)  # fmt: skip


def main(comm: MPI.Comm) -> int:
    """Run the sections that are asked for."""
    if HELP:
        print("\n".join([__doc__ or "", *map(str, OPTIONS)]))
        return 0
    settings = options.read(OPTIONS)
    torch.set_num_threads(1)
    for name in settings.only.split(","):
        if name not in {**SECTIONS, **ASKED}:
            known = [*SECTIONS, *(asked for asked in ASKED if not asked.endswith("_worker"))]
            raise InputError(f"option -only must name some of {', '.join(known)}; got '{name}'")
        {**SECTIONS, **ASKED}[name](settings)
    return 0


if __name__ == "__main__":
    run_program(main)
