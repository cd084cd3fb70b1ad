"""Where a model's inputs go."""

from __future__ import annotations

from typing import Any

import torch


def input_device(model: Any) -> torch.device:
    """That of the input embedding: the model may lie on several devices (``device_map``)."""
    return next(model.get_input_embeddings().parameters()).device
