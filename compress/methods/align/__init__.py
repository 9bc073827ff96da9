"""One model's vectors in another model's space: closed-form maps, and training on queries alone."""
