"""Packaging of ddml; the versions it is built and tested with stand in versions.txt."""

from setuptools import find_packages, setup

setup(
    name="ddml",
    version="0.1.0",
    description="Train neural networks with domain decomposition and multilevel methods on MPI and PETSc",
    packages=find_packages(include=["ddml", "ddml.*", "solvers", "solvers.*"]),
    python_requires=">=3.11",
    install_requires=["numpy", "scipy", "torch", "h5py", "mpi4py", "petsc4py"],
    extras_require={"plot": ["matplotlib"], "progress": ["tqdm"]},
)
