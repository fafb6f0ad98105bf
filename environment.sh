#!/usr/bin/env bash
# Makes .venv, the Python environment of ddml, from nothing: Debian packages
# where it may install them, then the versions of versions.txt, with PETSc,
# petsc4py and h5py built against the system's MPI and parallel HDF5.
#
# A Python that already imports petsc4py (cluster modules) is used as it is.
# Settings: PYTHON (interpreter, default python3), DDML_CACHE (where built
# wheels are kept, default ~/.cache/ddml), and all of pip's own variables.
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
venv=$PWD/.venv
started=$SECONDS
say() { printf 'environment: %s (%d s)\n' "$1" $((SECONDS - started)) >&2; }
fail() { printf 'environment: error: %s\n' "$1" >&2; exit 1; }

command -v "$python" >/dev/null || fail "no interpreter '$python'; set PYTHON to a Python 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is older than 3.11; set PYTHON"

key=$({ cat environment.sh versions.txt setup.py; "$python" -VV; uname -m; echo "$PWD" "${PETSC_DIR:-}" "${PETSC_ARCH:-}"; } | sha256sum | cut -c1-12)
sources=$(cat ddml/kernels/*.[ch] setup.py | sha256sum)
if [ "$(cat "$venv/.ready" 2>/dev/null)" = "$key" ]; then
    [ "$(cat "$venv/.kernels" 2>/dev/null)" = "$sources" ] && exit 0
    say "building the kernels"
    "$venv/bin/python" setup.py -q build_ext --inplace --force
    echo "$sources" >"$venv/.kernels"
    exit 0
fi

given=no # is petsc4py there already?
"$python" -c 'from petsc4py import PETSc' 2>/dev/null && given=yes
if [ $given = no ] && [ -n "${PETSC_DIR:-}" ]; then
    fail "PETSC_DIR is set but $python does not import petsc4py: load its module, or add \$PETSC_DIR/\$PETSC_ARCH/lib to PYTHONPATH, or unset PETSC_DIR to build PETSc"
fi

debian_packages() {
    local wanted="gcc make libopenmpi-dev openmpi-bin libhdf5-openmpi-dev libopenblas-dev patchelf pkg-config"
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
if [ $given = no ]; then
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
"$python" -m venv $([ $given = yes ] && echo --system-site-packages) "$venv"
echo "$PWD" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ddml.pth" # in place
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
if [ $given = yes ]; then
    say "petsc4py of $python is used as it is"
    add $(pins 'setuptools|wheel')
    kernels
    add $(others | grep -vE '^(numpy|mpi4py|torch)') $(pins h5py)
    for module in numpy mpi4py torch; do
        "$venv/bin/python" -c "import $module" 2>/dev/null || add $(pins $module)
    done
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
import pytest

if not h5py.get_config().mpi:
    raise SystemExit("environment: error: this h5py is not built for MPI")
P
"$venv/bin/python" drivers/pinn.py -help >/dev/null # imports what a run imports
echo "$sources" >"$venv/.kernels"
echo "$key" >"$venv/.ready"
say "ready"
