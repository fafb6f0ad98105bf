"""Stating and evaluating a partial differential equation."""
