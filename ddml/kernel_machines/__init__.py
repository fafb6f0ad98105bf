"""Kernel machines whose samples are cut into subdomains: cuts, operators on coefficients, pivots."""

from .domain import SampleDomain
from .functions import Kernel, median_distance, named
from .layout import SampleLayout
from .operator import KernelOperator

__all__ = ["Kernel", "KernelOperator", "SampleDomain", "SampleLayout", "median_distance", "named"]
