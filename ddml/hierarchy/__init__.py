"""Levels of a problem, and what carries parameters and gradients between them."""
