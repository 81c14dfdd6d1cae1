"""Kernel tests share `interpreter.py`, which lies beside them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def loud_memory(monkeypatch):
    """Fresh memory holds 0x7F in every byte: NaN in e4m3, 3e38 in float32, 127 in int8. What a kernel leaves unwritten shows."""
    empty = torch.empty

    def loud(*args, **kwargs):
        new = empty(*args, **kwargs)
        if type(new) is torch.Tensor and new.dim() and new.is_contiguous():
            new.view(torch.uint8).fill_(0x7F)
        return new

    monkeypatch.setattr(torch, "empty", loud)
