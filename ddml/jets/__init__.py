"""Derivatives of networks by their inputs: evaluators in torch and compiled."""
