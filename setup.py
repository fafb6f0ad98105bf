"""Packaging of ddml; the versions it is built and tested with stand in versions.txt."""

import os
import platform
import shutil
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

# The kernels are built for several instruction sets, and ddml.kernels takes the best that the processor has: a
# login node may build for its compute nodes. Where the compiler is missing or fails, torch does the work.
INSTRUCTIONS = {"portable": []}
if platform.machine() == "x86_64":
    INSTRUCTIONS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}


def with_petsc() -> list[Extension]:
    """What is linked with PETSc, where petsc4py is there already."""
    try:
        import petsc4py
    except ImportError:
        return []
    config = petsc4py.get_config()
    places = [Path(config["PETSC_DIR"]), Path(config["PETSC_DIR"], config["PETSC_ARCH"] or "")]
    libraries = [str(place / "lib") for place in places]
    return [
        Extension(
            "ddml.kernels._sums",
            ["ddml/kernels/sums.c"],
            include_dirs=[str(place / "include") for place in places],
            library_dirs=libraries,
            runtime_library_dirs=libraries,
            libraries=["petsc"],
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ]


if shutil.which("mpicc"):  # the compiler that PETSc's headers need
    os.environ.setdefault("CC", "mpicc")

setup(
    name="ddml",
    version="0.1.0",
    description="Train neural networks with domain decomposition and multilevel methods on MPI and PETSc",
    packages=find_packages(include=["ddml", "ddml.*", "solvers", "solvers.*"]),
    package_data={"ddml.data": ["digits.npz"]},
    ext_modules=[
        Extension(
            f"ddml.kernels._{name}",
            [f"ddml/kernels/{source}.c" for source in ("factored", "jets", "symmetric")],
            depends=glob("ddml/kernels/*.h"),
            extra_compile_args=["-O3", *flags],
            optional=True,
        )
        for name, flags in INSTRUCTIONS.items()
    ]
    + with_petsc(),
    python_requires=">=3.11",
    install_requires=["numpy", "scipy", "torch", "h5py", "mpi4py", "petsc4py>=3.25"],
    extras_require={"plot": ["matplotlib"], "progress": ["tqdm"]},
)
