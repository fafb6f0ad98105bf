"""Losses on one process: theta to a number and its derivatives, and what they cost."""
