"""Kernel machines whose samples are cut into subdomains: cuts, their balance, operators on coefficients, pivots."""

from .balance import balanced
from .domain import SampleDomain
from .functions import Kernel, median_distance, named
from .layout import SampleLayout
from .operator import KernelOperator
from .shapes import carried, grown
from .speeds import Speeds

__all__ = [
    "Kernel",
    "KernelOperator",
    "SampleDomain",
    "SampleLayout",
    "Speeds",
    "balanced",
    "carried",
    "grown",
    "median_distance",
    "named",
]
