"""Runtimes: each opens a model or a variant as an Embedder."""
