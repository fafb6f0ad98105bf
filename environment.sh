#!/usr/bin/env bash
# Makes .venv, the Python environment of ddml, from nothing: Debian packages
# where it may install them, then the versions of versions.txt, with PETSc,
# petsc4py and h5py built against the system's MPI and parallel HDF5.
#
# Where Python already imports petsc4py (cluster modules, an environment of one's
# own), that one is used, with its numpy, mpi4py and parallel h5py: nothing is put
# in their place, what lacks is built against them. What does not fit is refused
# before anything is installed.
# Settings: PYTHON (interpreter, default python3), DDML_CACHE (where built
# wheels are kept, default ~/.cache/ddml), DDML_CUDA=1 (PETSc with CUDA, for the
# GPU of this machine or DDML_CUDA_ARCH, such as 90; CUDA_HOME, default that of
# nvcc), and pip's own variables.
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
venv=$PWD/.venv
started=$SECONDS
say() { printf 'environment: %s (%d s)\n' "$1" $((SECONDS - started)) >&2; }
fail() { printf 'environment: error: %s\n' "$1" >&2; exit 1; }

command -v "$python" >/dev/null || fail "no interpreter '$python'; set PYTHON to a Python 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is older than 3.11; set PYTHON"

key=$({ cat environment.sh versions.txt setup.py; "$python" -VV; uname -m
    echo "$PWD" "${PETSC_DIR:-}" "${PETSC_ARCH:-}" "${DDML_CUDA:-}" "${DDML_CUDA_ARCH:-}" "${CUDA_HOME:-}"; } | sha256sum | cut -c1-12)
sources=$(cat ddml/kernels/*.[ch] setup.py | sha256sum)
if [ "$(cat "$venv/.ready" 2>/dev/null)" = "$key" ]; then
    [ "$(cat "$venv/.kernels" 2>/dev/null)" = "$sources" ] && exit 0
    say "building the kernels"
    "$venv/bin/python" setup.py -q build_ext --inplace --force
    echo "$sources" >"$venv/.kernels"
    exit 0
fi

# What a Python with petsc4py brings, a line each: NAME==VERSION of what later installs must leave alone, mpicc=, hdf5=
# (where to build h5py against) and site= (the packages of a virtual environment). Nothing where petsc4py is absent.
given=$("$python" - "${DDML_CUDA:-0}" <<'P'
import importlib
import os
import re
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path

needs_cuda = sys.argv[1] == "1"


def refuse(words):
    raise SystemExit(f"environment: error: {words}")


def load(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


petsc4py = load("petsc4py")
if petsc4py is None:
    sys.exit()
try:
    runpy.run_path("ddml/version.py")["refuse_old"](petsc4py.__version__)
except ImportError as error:
    refuse(f"{error}; load a newer one, or set PYTHON to an interpreter without petsc4py, and PETSc is built")
try:
    from petsc4py import PETSc
except Exception as error:
    refuse(f"petsc4py {petsc4py.__version__} of {sys.executable} does not load: {str(error).splitlines()[0]}")
if PETSc.ScalarType().dtype != "float64":
    refuse(f"the PETSc of {sys.executable} computes in {PETSc.ScalarType().dtype}, ddml in float64")
if needs_cuda and not PETSc.Sys.hasExternalPackage("cuda"):
    refuse(f"DDML_CUDA=1, but the PETSc of {sys.executable} has no CUDA")

config = petsc4py.get_config()
variables = Path(config["PETSC_DIR"], config["PETSC_ARCH"] or "", "lib/petsc/conf/petscvariables")
settings = dict(re.findall(r"^(CC|HDF5_INCLUDE) = (.*)$", variables.read_text() if variables.exists() else "", re.M))
mpicc = next((found for name in (settings.get("CC", ""), "mpicc") if "mpi" in name and (found := shutil.which(name))), "")

numpy, mpi4py, h5py = load("numpy"), load("mpi4py"), load("h5py")
if mpi4py is None and not mpicc:
    refuse(f"{sys.executable} imports petsc4py and no mpi4py, and there is no mpicc to build it with")
if h5py is None or not h5py.get_config().mpi:
    kind = "no h5py" if h5py is None else f"a serial h5py ({h5py.__version__})"
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if h5py is not None and Path(folder).resolve() in Path(h5py.__file__).resolve().parents:
            refuse(f"PYTHONPATH brings {kind}, from {folder}; ddml is tested with one built with MPI: unload its module")
    tool = shutil.which("h5pcc")
    places = [os.environ.get(name) for name in ("HDF5_DIR", "HDF5_ROOT", "HDF5_HOME", "EBROOTHDF5")]
    places += [Path(folder).parent for folder in re.findall(r"-I(\S+)", settings.get("HDF5_INCLUDE", ""))]
    places += [tool and Path(tool).resolve().parents[1]]
    places += [f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}/hdf5/{name}" for name in ("openmpi", "mpich")]
    headers = [Path(place, "include/H5pubconf.h") for place in places if place]
    parallel = [header.parents[1] for header in headers
                if header.exists() and re.search(r"^#define H5_HAVE_PARALLEL 1", header.read_text(), re.M)]
    if not parallel or not mpicc:
        refuse(f"{sys.executable} has {kind}, ddml is tested with one built with MPI, and "
               + ("no parallel HDF5 was found: load its module or set HDF5_DIR" if mpicc else "there is no mpicc"))
    print(f"hdf5={parallel[0]}")
    h5py = None

for module in filter(None, (numpy, mpi4py, h5py, petsc4py)):
    print(f"{module.__name__}=={module.__version__}")
print(f"mpicc={mpicc}")
if sys.prefix != sys.base_prefix:
    print("\n".join(f"site={folder}" for folder in sys.path if Path(sys.prefix) in Path(folder).parents))
P
) || exit 1
of_given() { sed -n "s/^$1=//p" <<<"$given"; }
if [ -z "$given" ] && [ -n "${PETSC_DIR:-}" ]; then
    fail "PETSC_DIR is set but $python does not import petsc4py: load its module, or add \$PETSC_DIR/\$PETSC_ARCH/lib to PYTHONPATH, or unset PETSC_DIR to build PETSc"
fi

cuda_options=
if [ "${DDML_CUDA:-0}" = 1 ] && [ -z "$given" ]; then
    toolkit=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")}
    [ -x "$toolkit/bin/nvcc" ] || fail "DDML_CUDA=1 needs the CUDA toolkit: CUDA_HOME, or its nvcc in PATH"
    architecture=${DDML_CUDA_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d . || true)}
    [[ $architecture =~ ^[0-9]+$ ]] || fail "DDML_CUDA=1 and no architecture: set DDML_CUDA_ARCH (80 for A100, 90 for H100)"
    cuda_options="--with-cuda=1 --with-cuda-dir=$toolkit --with-cuda-arch=$architecture"
fi

debian_packages() {
    local wanted="gcc make libopenmpi-dev openmpi-bin libhdf5-openmpi-dev libopenblas-dev patchelf pkg-config"
    [ "${DDML_CUDA:-0}" = 1 ] && wanted="$wanted g++"
    [ "$(command -v "$python")" = /usr/bin/python3 ] && wanted="$wanted python3-venv python3-dev"
    local missing=""
    for package in $wanted; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
    done
    [ -z "$missing" ] && return
    if [ "$(id -u)" -ne 0 ]; then
        fail "these Debian packages are missing:$missing. Install them (apt-get install) and call again"
    fi
    say "installing Debian packages:$missing"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing; } >/dev/null
}
if [ -z "$given" ]; then
    command -v dpkg-query >/dev/null || fail "not a Debian system and no petsc4py: install MPI, PETSc and petsc4py, then call again"
    debian_packages
fi

# The options that the wheels are built with, and what they are linked to. Optimisation beyond -O1 would add minutes
# here and nothing later: vectors go through BLAS, networks through torch and our own kernels, built with -O3. (Without
# any the compiler takes two minutes less, and products with sparse matrices three times as long.) Memory is aligned
# because BLAS's rounding may depend on it. h5py and petsc4py pass arguments: they are not optimised.
hdf5=/usr/lib/$(gcc -print-multiarch 2>/dev/null)/hdf5/openmpi
petsc_options="--with-fc=0 --with-cxx=0 --with-x=0 --with-ssl=0 --with-debugging=0 --with-cuda=0 --with-cudac=0 --with-hip=0
 --with-memalign=64 --with-hdf5=1 --with-hdf5-dir=$hdf5 --with-blaslapack-lib=-lopenblas COPTFLAGS=-O1"
if [ -n "$cuda_options" ]; then
    petsc_options=${petsc_options/--with-cxx=0 /}
    petsc_options=${petsc_options/--with-cuda=0 --with-cudac=0/$cuda_options}
fi
cores=$(env -u OMP_NUM_THREADS nproc) # which would count as the cores otherwise
wheels=${DDML_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ddml}/wheels-$({ sed -n '/^# compiled:/,$p' versions.txt
    grep -E '^(numpy|mpi4py)==' versions.txt; echo "$petsc_options"; "$python" -VV; uname -m; mpicc -show
    pkg-config --modversion hdf5-openmpi; } 2>/dev/null | sha256sum | cut -c1-12)
mkdir -p "$wheels"
exec 9>"$wheels/.lock"
flock 9
rm -rf "$wheels"/new.*

say "making .venv with $("$python" -V), 6 minutes of processor time, 1 with the wheels in $wheels"
rm -rf "$venv"
"$python" -m venv $([ -n "$given" ] && echo --system-site-packages) "$venv"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$PWD" >"$packages/ddml.pth" # in place
# Quiet twice, errors only: pip warns of each package that one of several configured indexes does not have.
pip() { "$venv/bin/python" -m pip -q -q --disable-pip-version-check "$@"; }
add() { pip install --no-compile "$@"; } # runs import one in nine of the modules: those are compiled at the end

pins() { grep -oE "^($1)==.*" versions.txt; } # pins 'numpy|scipy': their lines
cached() { compgen -G "$wheels/$1-$(pins "$1" | cut -d= -f3)-*.whl" >/dev/null; }
build() { # build NAME: a wheel of it in the cache, under its final name only when whole
    cached "$1" && return
    say "building $1"
    local new log="$wheels/$1.log"
    new=$(mktemp -d "$wheels/new.XXXXXX")
    if ! pip wheel --no-deps --no-build-isolation --no-cache-dir --no-binary "$1" --wheel-dir "$new" $(pins "$1") >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        fail "building $1 failed; the whole log is $log"
    fi
    mv "$new"/*.whl "$wheels"
    rmdir "$new"
    say "built $1"
}

kernels() { # without a compiler torch does their work
    say "building the project's kernels"
    "$venv/bin/python" setup.py -q build_ext --inplace --force
    compgen -G "ddml/kernels/*.so" >/dev/null || say "warning: no kernels were built; torch does their work, slower"
}

others() { sed '/^# compiled:/,$d' versions.txt | grep -v '^#'; } # what is installed as wheels
if [ -n "$given" ]; then
    say "used as they are: $(grep == <<<"$given" | tr '\n' ' ')"
    of_given site | sed 's/.*/import site; site.addsitedir("&")/' >"$packages/given.pth"
    grep == <<<"$given" >"$venv/given.txt"
    # as an address: pip takes what stands behind a blank for another file
    PIP_CONSTRAINT=$("$venv/bin/python" -c 'import pathlib, sys; print(pathlib.Path(sys.argv[1]).as_uri())' "$venv/given.txt")
    printf '[global]\nconstraint = %s\n' "$PIP_CONSTRAINT" >"$venv/pip.conf" # for every later install, too
    export PIP_CONSTRAINT MPICC
    MPICC=$(of_given mpicc)
    add $(pins 'setuptools|wheel|Cython|pkgconfig')
    kernels
    grep -q ^mpi4py== <<<"$given" || add --no-build-isolation --no-cache-dir --no-binary mpi4py $(pins mpi4py)
    if [ -n "$(of_given hdf5)" ]; then
        say "building h5py against $(of_given hdf5)"
        CFLAGS="-O0 -g0" HDF5_MPI=ON CC=$MPICC HDF5_DIR=$(of_given hdf5) H5PY_SETUP_REQUIRES=0 \
            add --ignore-installed --no-deps --no-build-isolation --no-cache-dir --no-binary h5py $(pins h5py)
    fi
    say "installing torch and the other wheels"
    rest=$(others | grep -vE '^(numpy|mpi4py)==')
    if ! add $rest 2>"$venv/pip.log"; then # an older numpy may need others of older versions
        say "the versions of versions.txt do not go with what is given; taking those that do"
        add $(pins torch) $(grep -v ^torch== <<<"$rest" | cut -d= -f1)
    fi
else
    add $(pins 'setuptools|wheel|Cython|pkgconfig|numpy|mpi4py')
    MPICC=$(command -v mpicc) PETSC_CONFIGURE_OPTIONS=$(echo $petsc_options --with-make-np=$cores --with-make-load=8) build petsc &
    petsc=$!
    kernels & # on the core that PETSc's configure leaves
    kernels=$!
    say "installing torch and the other wheels"
    add $(others)
    wait $kernels
    wait $petsc
    add --no-deps --no-index --find-links "$wheels" $(pins petsc)
    CFLAGS="-O0 -g0" HDF5_MPI=ON CC=mpicc HDF5_DIR=$hdf5 H5PY_SETUP_REQUIRES=0 build h5py &
    h5py=$!
    CFLAGS="-O0 -g0" PETSC_DIR='' build petsc4py
    wait $h5py
    add --no-deps --no-index --find-links "$wheels" $(pins 'h5py|petsc4py')
    "$venv/bin/python" setup.py -q build_ext --inplace # what is linked with PETSc
fi
compgen -G "ddml/kernels/_sums*.so" >/dev/null || say "warning: kernels/sums.c was not built; dot products depend on the ranks"
unset PYTHONDONTWRITEBYTECODE
"$venv/bin/python" - <<'P'
import h5py
import matplotlib.backends.backend_agg
import matplotlib.pyplot
import numpy
import pytest
from petsc4py import PETSc

if not h5py.get_config().mpi:
    raise SystemExit("environment: error: this h5py is not built for MPI")
if PETSc.COMM_WORLD.tompi4py().size != 1:
    raise SystemExit("environment: error: petsc4py and mpi4py do not share one MPI")
P
"$venv/bin/python" drivers/pinn.py -help >/dev/null # imports what a run imports
echo "$sources" >"$venv/.kernels"
echo "$key" >"$venv/.ready"
say "ready"
