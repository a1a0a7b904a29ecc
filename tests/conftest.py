"""Shared by all tests: the devices, and hypothesis settings that give the same examples on every run."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("house")

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request) -> str:
    return request.param
