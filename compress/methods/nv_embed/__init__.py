"""Methods for NV-Embed's latent-attention head."""
