"""The layers of a compressed model: storage formats, grids, kernels."""
