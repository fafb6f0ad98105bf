"""Packaging of ddml; the versions it is built and tested with stand in versions.txt, its own in ddml/version.py."""

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

HERE = Path(__file__).parent
ABOUT: dict = {}
exec((HERE / "ddml/version.py").read_text(), ABOUT)
PETSC4PY = "petsc4py>=" + ".".join(map(str, ABOUT["PETSC4PY"]))

# The programs of drivers/ that people start; in a wheel they are modules of ddml_drivers, behind console commands.
PROGRAMS = ("pinn", "classify", "logistic", "kernel", "plot", "predict", "export")

setup(
    name="ddml",
    version=ABOUT["__version__"],
    description="Train neural networks with domain decomposition and multilevel methods on MPI and PETSc",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The ddml authors",
    license="BSD-2-Clause",
    license_files=["LICENSE"],
    packages=[
        *find_packages(include=["ddml", "ddml.*", "solvers", "solvers.*"]),
        "ddml_drivers.common",
        "ddml_drivers.kernel_machines",
        "ddml_drivers.tiled",
    ],
    package_dir={"ddml_drivers": "drivers"},
    py_modules=[f"ddml_drivers.{name}" for name in ("commands", *PROGRAMS)],
    entry_points={"console_scripts": [f"ddml-{name} = ddml_drivers.commands:{name}" for name in PROGRAMS]},
    package_data={"ddml.data": ["digits.npz"]},
    ext_modules=[
        Extension(
            f"ddml.kernels._{name}",
            [f"ddml/kernels/{source}.c" for source in ("factored", "jets", "pieces", "symmetric")],
            depends=glob("ddml/kernels/*.h"),
            extra_compile_args=["-O3", *flags],
            optional=True,
        )
        for name, flags in INSTRUCTIONS.items()
    ]
    + with_petsc(),
    python_requires=">=3.11",
    # The oldest with which the tests were run, or that have what the code calls: docs/installing.md says which.
    install_requires=["numpy>=1.26", "scipy>=1.11", "torch>=2.6", "h5py>=3.11", "mpi4py>=4.1", PETSC4PY],
    extras_require={
        "plot": ["matplotlib>=3.8"],
        "progress": ["tqdm"],
        "images": ["Pillow"],
        "scans": ["nibabel"],
        "tables": ["xarray", "pandas", "h5netcdf"],
        "tensorboard": ["tensorboard"],
        "onnx": ["onnx", "onnxscript"],
        "docs": (HERE / "docs/requirements.txt").read_text().split(),
    },
)
