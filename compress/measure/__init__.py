"""Measures accuracy, fidelity, speed and memory. Sees Embedders, and nothing of how they were made."""
