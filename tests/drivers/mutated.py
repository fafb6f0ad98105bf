"""Reads files that the standard input names, as a user's program would; a process of its own, for test_mutations.py.

A line ``reader path`` is answered by one of JSON: what was said, seconds of a processor, and what was opened that is
neither the file nor a part of Python and its packages.
"""

import importlib.util
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import answers
from calling import call
from launch import LONG, ROOT
from mpi4py import MPI

import ddml
import ddml.hdf5
from ddml.data import arrays, files, images, libsvm, tables
from ddml.errors import InputError, printable

_spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
assert _spec is not None and _spec.loader is not None
prepare = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prepare)
COMM = MPI.COMM_SELF


def idx(path: Path) -> None:
    prepare.main(["mnist", str(path.parent), "-o", str(path.with_name("made.h5"))])


def cifar(path: Path) -> None:
    prepare.main(["cifar10", str(path.parent), "-o", str(path.with_name("made.h5"))])


def numpy(path: Path) -> None:
    found = arrays.load(path, ("inputs", "labels"))
    for name, array in found.items():
        if name == "labels":
            arrays.classes_of((name, array))
        else:
            rows = range(array.shape[0] if array.ndim else 0)
            dtype = arrays.stored_type("inputs", array)
            list(arrays.source(array, array, arrays.np.array(rows, int), dtype, "inputs").pieces())


def image(path: Path) -> None:
    images.image_folder(path.parents[1])
    images.pixels(path, (8, 8), False)


def restart(path: Path) -> None:
    call("pinn", "-restart", path, "-output", path.with_name("more.h5"), "-overwrite", "-max_it", 4, comm=COMM)


READERS: dict[str, Callable[[Path], Any]] = {
    "run": lambda path: ddml.open_run(path),
    "network": lambda path: ddml.open_run(path).network(),
    "restart": restart,
    "data": lambda path: files.load(str(path), COMM),
    "idx": idx,
    "cifar": cifar,
    "numpy": numpy,
    "image": image,
    "libsvm": lambda path: libsvm.read([str(path)], COMM),
    "points": lambda path: tables.points(path, ["t", "x"]),
    "torch": lambda path: ddml.open_network(path),
}


def spent() -> float:
    """Seconds of a processor, those of processes that have ended included, but for HDF5's, which have limits."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak() -> int:
    """Bytes of memory, at most, of this process or of one that it has started, but for HDF5's."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    seen: list[str] = []
    own = tuple({sys.prefix, sys.base_prefix, str(ROOT), "/proc", "/sys", "/dev/fd", "/dev/null", "/dev/urandom"})

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            seen.append(os.path.abspath(os.fsdecode(arguments[0])))
        elif event in ("os.system", "os.exec", "os.posix_spawn"):
            seen.append(f"{event} {arguments[:1]}")
        elif event == "subprocess.Popen" and arguments[1][: len(command)] != command:
            seen.append(f"{event} {arguments[1]}")

    if not LONG:
        ddml.hdf5.command = answers.command
    command = ddml.hdf5.command()  # started before somebody watches
    found = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what drivers print
    sys.addaudithook(watch)
    for line in sys.stdin:
        reader, _, name = line.rstrip("\n").partition(" ")
        path, before = Path(name), spent()
        seen.clear()
        try:
            READERS[reader](path)
            said = "read"
        except InputError as error:
            said = f"refused: {printable(error)}"  # as programs print it
        except SystemExit as end:  # of prepare.py
            said = f"refused: {end}" if str(end).startswith("error: ") else f"exit {end}"
        except BaseException:
            said = traceback.format_exc()
        around = (*own, str(path.parents[1]))
        opened = [p for p in seen if not p.startswith(around) and not p.endswith("petscrc")]
        answer = {"said": said, "seconds": spent() - before, "opened": opened, "peak": peak()}
        print(json.dumps(answer), file=found, flush=True)


if __name__ == "__main__":
    main()
