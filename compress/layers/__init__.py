"""Layers that a compressed model is made of."""
