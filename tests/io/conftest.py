"""The tiny models of this folder, and a registered qgen."""

import importlib.util
from pathlib import Path

import pytest

from qgen.io import install


def load_tiny():
    spec = importlib.util.spec_from_file_location("qgen_tests_tiny", Path(__file__).with_name("tiny.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny():
    """The module tests/io/tiny.py: tiny models of every family and a quantizer."""
    pytest.importorskip("diffusers", reason="tiny models are diffusers' and transformers'")
    install()
    return load_tiny()
