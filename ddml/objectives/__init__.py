"""Losses on all ranks: a PETSc vector to a number; whole, restricted, sampled, shifted, consistent."""
