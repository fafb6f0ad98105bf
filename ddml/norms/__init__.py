"""Norms of parameters: of vectors, modular, Kronecker-factored, and choosing one by name."""
