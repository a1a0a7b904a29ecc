"""Large products by oneDNN: against float64, and left to torch wherever derivatives, transforms or other types come in."""

import pytest
import torch
import torch.nn.functional as F

from nt_kernel.products import dense
from nt_kernel.products.dense import linear, product, rows_product

M, P, N = 260, 197, 223  # no multiples of anything; more than LARGE multiplications
needs_one_dnn = pytest.mark.skipif(dense._one_dnn() is None, reason="this torch has no oneDNN product")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = {
    "as it is": lambda t: t,
    "transposed in memory": lambda t: t.mT.contiguous().mT,
    "every second row": lambda t: t.repeat_interleave(2, -2)[..., ::2, :],
    "part of a wider one": lambda t: F.pad(t, (1, 2))[..., 1:-2],
}


@pytest.fixture
def taken(monkeypatch):
    """The number of products that oneDNN made."""
    calls, multiply = [], dense._one_dnn()
    if multiply is not None:
        monkeypatch.setattr(dense, "_one_dnn", lambda: lambda *args: calls.append(args) or multiply(*args))
    return calls


def assert_close(found, left, right_rows):
    exact = left.double() @ right_rows.double().mT
    assert found.dtype == left.dtype
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    sizes = left.double().norm(dim=-1)[..., None] * right_rows.double().norm(dim=-1)[..., None, :]
    assert ((found - exact).abs() <= 2e-6 * sizes).all()  # of every entry, next to what it sums


@needs_one_dnn
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_products_of_rows(first, second, batch, taken):
    left, right = LAYOUTS[first](draw(*batch, M, P)), LAYOUTS[second](draw(*batch, N, P, seed=1))
    assert_close(rows_product(left, right), left, right)
    assert_close(product(left, right.mT), left, right)
    assert len(taken) == 2 * max(1, *batch, 1)
    assert all(
        second.is_contiguous() or second.mT.is_contiguous() for _, second, *_ in taken
    )  # the others take seconds


@needs_one_dnn
def test_linear_layers(taken):
    x, weight, bias = draw(M, P), draw(N, P, seed=1), draw(N, seed=2)
    assert_close(linear(x, weight), x, weight)
    assert_close(linear(x, weight, bias) - bias, x, weight)
    assert len(taken) == 2
    torch.testing.assert_close(linear(x[:, None], weight, bias), F.linear(x[:, None], weight, bias))
    assert len(taken) == 2


def test_small_and_double_products_are_torchs(taken):
    left, right = draw(M, P), draw(N, P, seed=1)
    assert torch.equal(rows_product(left.double(), right.double()), left.double() @ right.double().mT)
    assert torch.equal(rows_product(left[:9], right[:9]), left[:9] @ right[:9].mT)
    assert torch.equal(linear(left.double(), right.double()), F.linear(left.double(), right.double()))
    assert not taken


@pytest.mark.parametrize("which", [0, 1, 2])
def test_derivatives_are_torchs(which, taken):
    tensors = [draw(M, P), draw(N, P, seed=1), draw(N, seed=2)]
    tensors[which].requires_grad_()
    linear(*tensors).square().sum().backward()
    found, tensors[which].grad = tensors[which].grad, None
    F.linear(*tensors).square().sum().backward()
    torch.testing.assert_close(found, tensors[which].grad)
    assert not taken


def test_transforms_are_torchs(taken):
    left, right = draw(2, M, P), draw(N, P, seed=1)
    torch.testing.assert_close(torch.func.vmap(rows_product, (0, None))(left, right), left @ right.mT)
    _, tangent = torch.func.jvp(lambda a: rows_product(a, right), (left[0],), (left[1],))
    torch.testing.assert_close(tangent, left[1] @ right.mT)
    assert not taken


def test_without_one_dnn(monkeypatch):
    monkeypatch.setattr(dense, "_one_dnn", lambda: None)
    left, right = draw(M, P), draw(N, P, seed=1)
    assert torch.equal(rows_product(left, right), left @ right.mT)


@pytest.mark.parametrize("stand_in", [None, lambda *args: args[0], lambda x, w: x @ w.mT])
def test_another_function_under_the_name_is_not_used(stand_in, monkeypatch):
    """The name is private to torch: what it stands for is tried once."""
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", stand_in, raising=False)
    assert dense._one_dnn.__wrapped__() is None


@needs_one_dnn
def test_batches_of_few_multiplications_are_torchs(taken):
    left, right = draw(50, 9, 10), draw(50, 8, 10, seed=1)
    assert torch.equal(rows_product(left, right), left @ right.mT)
    assert not taken
