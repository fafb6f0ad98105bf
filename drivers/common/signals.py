"""Signals that come while modules are imported are remembered until the run can stop."""

from __future__ import annotations

import signal

REMEMBERED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_came: list[int] = []


def remember() -> None:
    """Remember these signals from here on, those included that were blocked so far (``env --block-signal``)."""
    for number in REMEMBERED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda came, _: _came.append(came))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REMEMBERED)


def came() -> bool:
    """Whether there has been one before the handlers of the run took over."""
    return bool(_came)
