"""Shared by all tests: the devices, and hypothesis settings that give the same examples on every run."""

import gc
import re

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("house")

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def pytest_collection_finish(session):
    gc.freeze()  # ten thousand collected tests stay to the end: tests that call the collector need not wait for them


def pytest_runtest_setup(item):
    torch.manual_seed(0)  # the same numbers in whatever order, on whatever worker, a test runs


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request) -> str:
    return request.param


def pytest_make_parametrize_id(val):
    """Values as they are written, without addresses: names are the same in every process (pytest-xdist compares them)."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(val)) if isinstance(val, dict | tuple | list) else None
