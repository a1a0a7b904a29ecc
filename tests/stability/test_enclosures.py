"""T4, T5 and the path lengths against their matrix recursion, and as enclosures of anything whatever."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability import ellipsoidal_enclosure, path_length, scalar_enclosure
from stability.enclosures import ellipsoid_radii, ellipsoid_step
from tests.stability.dense import F64


def drawn(seed, T, n, p, size, start):
    """Errors e_t and matrices A_t that know nothing of each other: the enclosures have to hold all the same."""
    draw = torch.Generator().manual_seed(seed)
    e = torch.randn(T + 1, n * p, generator=draw, dtype=F64)
    e[0] *= start
    e[torch.rand(T + 1, generator=draw) < 0.2] = 0.0
    return e, [size * torch.randn(n * p, n * p, generator=draw, dtype=F64) / (n * p) ** 0.5 for _ in range(T)]


@given(
    seed=st.integers(0, 100_000),
    T=st.integers(1, 12),
    n=st.integers(1, 4),
    p=st.integers(1, 3),
    size=st.sampled_from([0.0, 0.3, 0.9, 1.5]),
    start=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_enclosures_hold_for_any_errors_and_any_matrices(seed, T, n, p, size, start):
    e, A = drawn(seed, T, n, p, size, start)
    per_sample = e.unflatten(-1, (n, p)).norm(dim=-1)
    E, (radii, stacked), (path, paths) = scalar_enclosure(e, A), ellipsoidal_enclosure(e, A, p), path_length(e, p)
    slack = 1 + 1e-9
    assert (E * slack >= e.norm(dim=-1)).all()
    assert (radii * slack + 1e-12 >= per_sample).all()
    assert (stacked * slack + 1e-12 >= e.norm(dim=-1)).all()
    assert (stacked <= E * slack + 1e-12).all()  # T5 ≤ T4
    assert (radii.amax(-1) <= stacked * slack + 1e-12).all()
    assert (path * slack >= e.norm(dim=-1)).all()
    assert (paths * slack >= per_sample).all()


def test_the_factor_form_is_the_matrix_recursion_through_the_compression():
    T, D = 9, 4  # more steps than dimensions: the factor is compressed
    e, A = drawn(7, T, 2, 2, 0.8, 1.0)
    F, P = e[0][:, None], torch.outer(e[0], e[0])
    for t in range(T):
        w = e[t + 1] - A[t] @ e[t]
        F = ellipsoid_step(F, A[t] @ F, w)
        APA = A[t] @ P @ A[t].T
        a, b = APA.trace().sqrt(), w.norm()
        if a == 0 or b == 0:
            P = APA + torch.outer(w, w)
        else:
            beta = a / b
            P = (1 + 1 / beta) * APA + (1 + beta) * torch.outer(w, w)
        assert F.shape[-1] <= D
        torch.testing.assert_close(F @ F.T, P, rtol=1e-11, atol=1e-11)
    blocks = torch.stack([torch.linalg.eigvalsh(P[i : i + 2, i : i + 2])[-1].sqrt() for i in (0, 2)])
    torch.testing.assert_close(ellipsoid_radii(F, 2), blocks)


def test_no_closed_loop_gives_back_the_error_and_identity_the_path():
    e, _ = drawn(1, 6, 3, 2, 0.0, 1.0)
    D = e.shape[1]
    torch.testing.assert_close(scalar_enclosure(e, [torch.zeros(D, D, dtype=F64)] * 6), e.norm(dim=-1))
    torch.testing.assert_close(scalar_enclosure(e, [torch.eye(D, dtype=F64)] * 6), path_length(e)[0])


def test_an_exact_closed_loop_injects_nothing():
    A = 0.5 * torch.eye(2, dtype=F64)
    e = torch.stack([torch.tensor([1.0, -2.0], dtype=F64) * 0.5**t for t in range(5)])
    radii, stacked = ellipsoidal_enclosure(e, [A] * 4)
    torch.testing.assert_close(radii, e.abs())
    torch.testing.assert_close(stacked, e.norm(dim=-1))


def test_errors_and_matrices_must_match():
    with pytest.raises(
        ValueError, match=r"errors must be \[T \+ 1, D\] with T closed-loop matrices; got \(3, 2\) and 1"
    ):
        scalar_enclosure(torch.zeros(3, 2), [torch.eye(2)])
