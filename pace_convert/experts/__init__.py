"""Cortical experts: rows of weights to balanced clusters, and clusters to permutations. Pure."""
