"""Long lists of cases of one kind: `make test` takes every k-th, `make test-slow` all of them."""

from collections.abc import Iterable

import pytest


def thinned(cases: Iterable, every: int) -> list:
    """``cases`` for ``parametrize``, tuples being several arguments; all but the first, (1 + every)-th … are marked slow.

    >>> [bool(case.marks) for case in thinned("abcde", 2)]
    [False, True, False, True, False]
    """
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] if k % every else [])
        for k, case in enumerate(cases)
    ]
