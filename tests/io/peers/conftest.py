"""A source of tensors in memory, for importers that need no file."""

from pathlib import Path

import pytest


class DictSource:
    """`qgen.io.peers.base.Source` over a dictionary. reads: the names that were read, in order."""

    def __init__(self, tensors, metadata=None, config=None, where="memory.safetensors"):
        self.tensors, self.metadata, self.config = dict(tensors), metadata or {}, config or {}
        self.where, self.reads = Path(where), []
        self.shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}
        self.dtypes = {name: t.dtype for name, t in self.tensors.items()}

    def read(self, name):
        self.reads.append(name)
        return self.tensors[name].clone()


@pytest.fixture(scope="session")
def dict_source():
    """The class: `dict_source(tensors, metadata, config)`."""
    return DictSource
