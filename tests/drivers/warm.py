"""Quick starts of drivers: ranks forked from one interpreter whose imports are done.

MPI forbids to fork a process that has initialised it, so the interpreter (:func:`serve`) imports mpi4py and petsc4py
without that, and torch, ddml and solvers, which takes as long as a short run. What mpiexec starts (this file as a
program) imports next to nothing: it hands its environment, arguments and outputs to the interpreter, whose child is the
rank, and waits for the exit code. A child whose client is killed is killed at once; other signals do not reach it.
"""

import array
import json
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def receive(connection: socket.socket) -> tuple[dict[str, object], list[int]]:
    """What a client wants: environment, folder and arguments, and its standard output and error."""
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_LEN(2 * fds.itemsize))
    for _, _, content in ancillary:
        fds.frombytes(content)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    return json.loads(data), list(fds)


def become(request: dict[str, object], fds: list[int]) -> None:
    """Be the rank, to the end of this process."""
    for target, fd in enumerate((os.open(os.devnull, os.O_RDONLY), *fds)):
        os.dup2(fd, target)
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["folder"]))
    sys.argv = list(request["arguments"])  # type: ignore[call-overload]
    program = Path(sys.argv[0]).resolve()
    sys.path.insert(0, str(program.parent))
    MPI.Init()
    if program.parent.name != "drivers":  # which initialise PETSc themselves
        petsc4py.init()
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    PETSc._finalize()
    MPI.Finalize()


def serve(address: str) -> None:
    """Fork a rank for every client until standard input ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    waiting = selectors.DefaultSelector()
    waiting.register(sys.stdin, selectors.EVENT_READ)
    waiting.register(listener, selectors.EVENT_READ)
    clients: dict[int, socket.socket] = {}  # by the process that was forked for them
    print("ready", flush=True)
    while True:
        for key, _ in sorted(waiting.select(), key=lambda event: event[0].data is None):  # kills before starts
            if waiting.get_map().get(key.fd) is not key:  # a client that went when its child did
                continue
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                request, fds = receive(connection)
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        become(request, fds)
                        code = 0
                    except BaseException:
                        sys.excepthook(*sys.exc_info())
                    os._exit(code)
                for fd in fds:
                    os.close(fd)
                clients[pid] = connection
                waiting.register(connection, selectors.EVENT_READ, pid)
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            elif isinstance(key.fileobj, int):  # the child has ended
                waiting.unregister(key.fileobj)
                os.close(key.fileobj)
                code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                with suppress(KeyError):  # of a connection that was closed before
                    waiting.unregister(clients[key.data])
                with suppress(OSError):
                    clients[key.data].sendall(bytes([code & 255]))
                clients.pop(key.data).close()
            else:  # the client was killed
                waiting.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)


def ask(address: str, arguments: list[str]) -> int:
    """The exit code of a rank that the server forks with this process's environment and outputs."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = {"environment": dict(os.environ), "folder": os.getcwd(), "arguments": arguments}
    socket.send_fds(connection, [b" "], [1, 2])
    connection.sendall(json.dumps(request).encode() + b"\n")
    said = connection.recv(1)
    return said[0] if said else 1


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        import importlib
        import pkgutil
        import runpy

        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
        import mpi4py
        import petsc4py.lib
        import torch._dynamo  # noqa: F401  # which optimizers and exports load late

        mpi4py.rc.initialize = False
        PETSc = petsc4py.lib.ImportPETSc()  # and does not initialise it
        from mpi4py import MPI

        sys.path[0] = str(ROOT)  # in the place of this folder
        for package in map(importlib.import_module, ("ddml", "solvers")):
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                if not module.name.startswith("ddml.kernels."):  # libraries, which are no modules of Python
                    importlib.import_module(module.name)
        assert not MPI.Is_initialized()
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
