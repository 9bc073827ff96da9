"""What several tests of distillation share."""

from __future__ import annotations

from pathlib import Path

import torch
from tests_support import network_of

# A student that is made and trained in a moment.
SMALL = {"width": 16, "blocks": 2, "heads": 2, "mlp": 32, "latents": 4, "latent_heads": 2, "vocabulary": 600, "max_length": 64}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a variant's network, as they are stored."""
    return network_of(folder).state_dict()
