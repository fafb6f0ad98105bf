"""Gauss-Newton with preconditioned linear systems."""
