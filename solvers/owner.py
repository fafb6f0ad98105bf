"""Who creates a thing destroys it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Owner:
    """Keeps a list of the things that it has created, each with a method ``destroy``, and destroys them.

    A subclass registers what it creates when it creates it, ``self.x = self.own(layout.vector())``, and needs no
    ``destroy`` of its own. It need not call a constructor of this class.
    """

    _things: list[Any] | None = None

    def own(self, thing: T) -> T:
        """Register a thing that this object has created, and return it."""
        if self._things is None:
            self._things = []
        self._things.append(thing)
        return thing

    def release(self, thing: Any) -> None:
        """Destroy a thing of :meth:`own` before the others. Collective on the thing's communicator."""
        things = self._things or []
        del things[next(i for i, other in enumerate(things) if other is thing)]
        thing.destroy()

    def destroy(self, shell: Any = None) -> None:
        """Destroy what :meth:`own` has registered, the last first. Collective on the communicators of the things.

        Parameters
        ----------
        shell
            The PETSc object that this one is the Python context of, where PETSc calls.
        """
        while self._things:
            self._things.pop().destroy()

    @contextmanager
    def building(self) -> Iterator[None]:
        """Destroy everything where the block, which builds this object, raises an exception."""
        try:
            yield
        except BaseException:
            self.destroy()
            raise


class Closed:
    """Contexts that are left when their owner is destroyed."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def destroy(self) -> None:
        """Leave them."""
        self.stack.close()
