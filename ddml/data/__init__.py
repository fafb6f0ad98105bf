"""Data sets, their files, files of others, scaling, numbers of samples and sequences of points."""

from .data_set import DataSet

__all__ = ["DataSet"]
