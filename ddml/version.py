"""The version of ddml, and the petsc4py that it needs: the one place where they stand."""

__version__ = "0.1.0"

PETSC4PY = (3, 26)
"""Before, a line search of TAO called from Python begins with the value 0, whatever the function is, and fails."""


def refuse_old(petsc4py: str) -> None:
    """Raise an ImportError for a version of petsc4py, as in ``"3.25.6"``, before :data:`PETSC4PY`."""
    if tuple(map(int, petsc4py.split(".")[:2])) < PETSC4PY:
        least = ".".join(map(str, PETSC4PY))
        raise ImportError(f"petsc4py {petsc4py} is too old: ddml needs {least} or newer, where line searches are right")
