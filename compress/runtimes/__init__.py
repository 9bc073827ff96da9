"""Runtimes: a variant in, an Embedder out."""
