"""Data sets, their files, scaling, numbers of samples and sequences of points."""
