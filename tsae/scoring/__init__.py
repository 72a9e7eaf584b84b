"""Scores of every feature, from its codes on held-out text."""
