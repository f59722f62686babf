"""Weights in files written by torch."""

from __future__ import annotations

import warnings

import numpy as np

from jaxgen.errors import UserError

SAFE = (2, 6)  # before it, `weights_only` could be made to run code (CVE-2025-32434)


def read(path: str) -> dict[str, np.ndarray]:
    """{name: array} of a .pth or .pt file of tensors, without running any code that it names.

    Raises:
      UserError: torch is too old for that.
      ImportError: there is no torch.
      Exception: of any kind where the file is something else.
    """
    import torch

    version = tuple(int(part) for part in torch.__version__.split('+')[0].split('.')[:2])
    if version < SAFE:
        raise UserError(
            f'reading {path} needs torch 2.6 or newer, since a file can make older ones run code; this is '
            f'{torch.__version__}: pip install -U torch, or give the weights as .safetensors'
        )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # on archives that are then refused
        tensors = torch.load(path, map_location='cpu', weights_only=True)
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}
