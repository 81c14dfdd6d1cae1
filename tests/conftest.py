"""What every test shares: no network, fixed seeds, one thread (or OMP_NUM_THREADS), and the demo pipeline."""

import os

# Before anything imports Hugging Face's libraries or matplotlib.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import random

import numpy as np
import pytest
import torch

THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)  # for fixtures of a session or module, made before `seeded` sees to it


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped, with this reason, where torch sees none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, torch sees none"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state and number of threads (which sets the last bit of sums), whatever ran before it."""
    torch.set_num_threads(THREADS)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_demo_pipe():
    """Returns a function; each call gives a fresh float32 copy of the trained demo pipeline, on the CPU and silent.

    The files are read once. For tests and fixtures that need several pipelines; for one, ask for `demo_pipe`.
    """
    pytest.importorskip(
        "diffusers", reason="the demo pipeline is a diffusers pipeline: install qgen-diffusion[diffusers]"
    )
    from qgen.demo import demo_pipeline

    original = demo_pipeline()
    original.set_progress_bar_config(disable=True)
    return lambda: copy.deepcopy(original)


@pytest.fixture
def demo_pipe(make_demo_pipe):
    """A copy of the trained demo pipeline that this test may change."""
    return make_demo_pipe()
