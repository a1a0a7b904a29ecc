"""The part of two twins' velocities that their metrics make, against dense metrics."""

import pytest
import torch

from stability import Replacement
from stability.moving_metric import metric_change
from tests.stability.dense import DenseRun, small_problem, twin_data


@pytest.mark.parametrize("scale", ["mean", "sum", "none"])
def test_both_parts_are_those_of_dense_metrics(scale):
    model, x, a, zs, _ = small_problem(seed=2)
    n, c = len(x), {"mean": 1 / len(x), "sum": 1.0, "none": 0.0}[scale]
    found = metric_change(model, x, a, zs, mass=0.3, scale=scale)
    one = DenseRun(model, x, a, mass=0.3, c=c)

    def parts(run):
        r = (run.outputs(run.x) - run.a).flatten() / n
        return run.metric(), {layer: J.T @ r for layer, J in run.jacobian(run.x).items()}

    G, g = parts(one)
    v = {layer: torch.linalg.solve(G[layer], g[layer]) for layer in G}
    norm = lambda tree: torch.cat(list(tree.values())).norm().item()  # noqa: E731
    assert found.velocity == pytest.approx(norm(v))
    for j, z in enumerate(zs):
        G2, g2 = parts(DenseRun(model, *twin_data(x, a, z), mass=0.3, c=c))
        metric = {k: torch.linalg.solve(G2[k], (G2[k] - G[k]) @ v[k]) for k in G}
        gradient = {k: torch.linalg.solve(G2[k], g[k] - g2[k]) for k in G}
        assert found.metric[j].item() == pytest.approx(norm(metric), rel=1e-8, abs=1e-12)
        assert found.gradient[j].item() == pytest.approx(norm(gradient), rel=1e-8)
        assert found.share[j] == found.metric[j] / found.gradient[j]
    if scale == "none":
        assert found.metric.max() < 1e-12
    else:
        assert found.share.min() > 1e-3


def test_nothing_is_changed_and_bad_input_is_refused():
    model, x, a, zs, _ = small_problem()
    params = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    before = metric_change(model, x, a, zs)
    assert not torch.allclose(metric_change(model, x, a, zs, params=params).metric, before.metric)
    assert torch.equal(metric_change(model, x, a, zs).metric, before.metric)
    with pytest.raises(ValueError, match="replacements is empty"):
        metric_change(model, x, a, [])
    with pytest.raises(ValueError, match=r"replacements\[0\].index"):
        metric_change(model, x, a, [Replacement(9, x[0], a[0])])
