"""Every case of a problem, one after another in one process a rank: python -m mpi4py same_bits.py FOLDER PROBLEM.

The run file of each is in FOLDER and named after it, see :func:`file_of`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "drivers"))

import classify  # first: it initialises PETSc
import pinn
from common.program import run_program
from mpi4py import MPI
from petsc4py import PETSc

MAINS = {"digits": classify.main, "klein_gordon": pinn.main}
COMMON = {
    "digits": "-data digits -max_it 3 -progress none",
    "klein_gordon": "-problem klein_gordon -points 200 -error_points 100 -test_points 50 -max_it 3 -progress none",
}
SMALL = "-width 12 -depth 3"  # what dense matrices are quick for
CASES = {
    "digits": [
        *(f"-solver {name}" for name in ("tr", "apts_weights", "apts_data", "napts", "lbfgs", "aspqn", "mspqn")),
        *(f"-solver {name} -widths 12" for name in ("ssbroyden", "ssbfgs", "mspqn_dense")),
        "-solver tr -norm infinity",
        *(f"-solver tr -norm {norm} -model {model}"
          for norm in ("2", "kfac") for model in ("first", "sr1", "lbfgs", "hessian", "gauss_newton")),
        "-solver tr -norm kfac -batch_size 300 -max_it 12",  # factors are measured again
        "-solver tr -batch_size 200 -batch_growth 1.5 -batch_overlap 0.2 -max_it 12",
        "-solver tr -widths 300,280",  # directions from matrix products
        "-solver tr -network residual -samples 300",
        *("-solver astrom -coarse_steps 2", "-solver newton"),
        "-solver apts_weights -norm kfac",
        "-solver apts_weights -norm 2 -model sr1",
        "-solver apts_data -norm 2 -subdomains 3",
        "-solver apts_data -subdomains 5",
        "-solver napts -norm 2 -model sr1 -decomposition layers",
        "-solver napts -norm kfac",
        "-solver aspqn -coarse_step true -local_steps 5",
        "-solver mspqn -side_by_side 0 -local_steps 5",
    ],
    "klein_gordon": [
        *(f"-solver {name}" for name in ("gauss_newton", "lbfgs", "aspqn", "mspqn")),
        *(f"-solver {name} {SMALL}" for name in ("ssbroyden", "ssbfgs", "mspqn_dense")),
        *(f"-solver {name} -norm 2" for name in ("tr", "apts_weights", "apts_data", "napts")),
        f"-solver ssbroyden {SMALL} -resample_interval 2 -max_it 8",
        f"-solver mspqn_dense -side_by_side 0 {SMALL}",
        "-solver gauss_newton -form dual",
        f"-solver gauss_newton -form primal -preconditioner schwarz {SMALL}",
        "-solver aspqn -additive_step subspace -local_steps 5",
        "-solver aspqn -subdomains 3 -overlap 1 -balance cost -balance_steps true -local_steps 5",
        f"-solver aspqn -local_solver ssbroyden -local_memory keep {SMALL} -local_steps 5",
        "-solver lbfgs -network residual -dtype float32",
        "-solver tr -norm 2 -model gauss_newton",
    ],
}  # fmt: skip


def file_of(case: str) -> str:
    """The name of a case's run file."""
    return "".join(c if c.isalnum() else "_" for c in case.strip("-")) + ".h5"


def main(comm: MPI.Comm) -> int:
    """Run the cases; the exit code. Collective."""
    (folder, problem), database = sys.argv[1:], PETSc.Options()
    before = database.getAll()
    for case in CASES[problem]:
        words = f"{COMMON[problem]} {case} -output {Path(folder) / file_of(case)}".split()
        sys.argv[1:] = words
        database.insertString(" ".join(words))
        if MAINS[problem](comm):
            return 1
        for key in database.getAll().keys() - before.keys():
            database.delValue(key)
    return 0


if __name__ == "__main__":
    run_program(main)
