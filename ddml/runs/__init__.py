"""The loop of a run, its limits, history and file, and figures of it."""
