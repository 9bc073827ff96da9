"""What a smaller model costs and gains: accuracy, fidelity, speed, memory. Sees Embedders and nothing of how they were made."""
