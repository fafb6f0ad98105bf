"""Quick starts: processes forked from one interpreter whose imports are done.

What a test or mpiexec starts (:func:`ask`) imports next to nothing: it hands its environment, folder, arguments and
some of its open files to the interpreter (:func:`serve`), whose child does the work, and waits for the exit code. A
child whose client is killed is killed at once; it gets the client's other signals, and blocks those that the client was
started with blocked.
"""

import array
import atexit
import gc
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

_FOREIGN = ("OMPI_", "PMIX_", "ORTE_", "PETSC_OPTIONS")


def surroundings() -> dict[str, str]:
    """The environment of what is started; a test that itself runs under MPI must not pass that on."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
    environment["OMP_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = "1"
    environment["OMPI_MCA_mpi_yield_when_idle"] = "1"  # tests run on busy machines
    environment["OMPI_MCA_hwloc_base_binding_policy"] = "none"  # or programs side by side share the first core
    return environment


def started(*command: str) -> str:
    """The address of an interpreter that this process starts, and ends when it ends itself."""
    import subprocess  # which who asks does not need
    import tempfile

    folder = tempfile.TemporaryDirectory()
    address = f"{folder.name}/socket"
    server = subprocess.Popen(
        [sys.executable, *command, address], env=surroundings(), text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert server.stdin and server.stdout and server.stdout.readline() == "ready\n"

    def end() -> None:
        server.communicate()  # it ends with its input
        folder.cleanup()

    atexit.register(end)
    return address


def _receive(connection: socket.socket) -> tuple[dict[str, object], list[int], bytes]:
    """What a client asks for, its open files, and the signals that it has had already."""
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_LEN(3 * fds.itemsize))
    for _, _, content in ancillary:
        fds.frombytes(content)
    while b"\n" not in data:
        data += connection.recv(1 << 20)
    request, _, signals = data.partition(b"\n")
    return json.loads(request), list(fds), signals


def serve(address: str, become: Callable[[dict[str, object]], None]) -> None:
    """Fork a process for every client until standard input ends; ``become`` is what it does."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    waiting = selectors.DefaultSelector()
    waiting.register(sys.stdin, selectors.EVENT_READ)
    waiting.register(listener, selectors.EVENT_READ)
    clients: dict[int, socket.socket] = {}  # by the process that was forked for them
    gc.freeze()  # or the last collection of each child looks through it, and copies its memory: 0.25 s
    print("ready", flush=True)
    while True:
        for key, _ in sorted(waiting.select(), key=lambda event: event[0].data is None):  # kills before starts
            if waiting.get_map().get(key.fd) is not key:  # a client that went when its child did
                continue
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                request, fds, signals = _receive(connection)
                mask = signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])  # type: ignore[arg-type]
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        for fd, target in zip(fds, request["fds"], strict=True):  # type: ignore[call-overload]
                            os.dup2(fd, target)
                        become(request)
                        code = 0
                    except BaseException:
                        sys.excepthook(*sys.exc_info())
                    os._exit(code)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                for fd in fds:
                    os.close(fd)
                for number in signals:
                    os.kill(pid, number)
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
            elif signals := key.fileobj.recv(64):  # type: ignore[union-attr]
                for number in signals:
                    os.kill(key.data, number)
            else:  # the client was killed
                waiting.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)


def ask(address: str, arguments: list[str], *more: int) -> int:
    """The exit code of a fork with this process's environment, folder, outputs and ``more`` open files.

    Where a signal has ended it, this process ends by the same.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    fds = [1, 2, *more]
    request = {"environment": dict(os.environ), "folder": os.getcwd(), "arguments": arguments, "fds": fds,
               "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, []))}  # fmt: skip
    socket.send_fds(connection, [b" "], fds)
    connection.sendall(json.dumps(request).encode() + b"\n")

    def pass_on(number: int, _: object) -> None:
        with suppress(OSError):  # the fork has ended meanwhile
            connection.sendall(bytes([number]))

    passed = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    for number in passed:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed)
    said = connection.recv(1)
    code = said[0] if said else 1
    if code > 256 - signal.NSIG:
        signal.signal(256 - code, signal.SIG_DFL)
        os.kill(os.getpid(), 256 - code)
    return code
