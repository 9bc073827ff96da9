"""What several tests of distillation share."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.models.opened import empty_model, weights_of

TEXTS = ["the parcel never came", "rain by the evening", "who wrote it", "x", ""]


SMALL = {"width": 16, "blocks": 2, "heads": 2, "mlp": 32, "latents": 4, "latent_heads": 2, "vocabulary": 600, "max_length": 64}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    network = empty_model(folder)
    weights_of(folder, network).fill(network)
    return network.state_dict()
