"""Pruning: weights set to zero and stored as a bit and nothing more."""
