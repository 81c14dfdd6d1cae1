"""Checkpoints of other projects, in and out: one peer per file. `base` holds what they share."""

from qgen.io.peers.base import Layer, Model, Plain, Source, exporters, importers

__all__ = ["Layer", "Model", "Plain", "Source", "exporters", "importers"]
