"""Subdomains of the parameters: which entries, and the matrices between them and the whole."""
