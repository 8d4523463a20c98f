"""Texts longer than a model holds: read once into banks, asked often."""
