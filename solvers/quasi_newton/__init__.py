"""Quasi-Newton methods of all parameters at once."""
