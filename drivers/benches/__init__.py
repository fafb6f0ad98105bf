"""The sections of drivers/bench.py."""
