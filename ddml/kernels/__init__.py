"""C code for what torch is slow at, built by setup.py once per instruction set of the processor.

The build is part of ``make env``; by hand it is ``python setup.py build_ext --inplace``. Without a C
compiler there is no library, and torch does the work.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

LIBRARIES = ("avx512", "avx2", "portable")
"""What setup.py builds, best first."""


def usable() -> list[str]:
    """The libraries whose instructions this processor has (or that ATEN_CPU_CAPABILITY allows), best first."""
    known = {"AVX512": 0, "AVX2": 1}
    return list(LIBRARIES)[known.get(torch.backends.cpu.get_cpu_capability(), 2) :]


@cache
def library() -> tuple[str, ctypes.CDLL] | None:
    """Name and functions of the best library that was built and runs here, if there is one."""
    for name in usable():
        for suffix in EXTENSION_SUFFIXES:
            path = Path(__file__).with_name(f"_{name}{suffix}")
            if path.exists():
                return name, ctypes.CDLL(str(path))
    return None
