"""Package data: the embedded suite, calibration texts, the model nano, and the shapes of models known by name."""
