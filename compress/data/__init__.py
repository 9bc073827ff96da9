"""Package data: the embedded suite and the shapes of models known by name."""
