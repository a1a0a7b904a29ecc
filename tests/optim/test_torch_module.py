"""Between torch.nn and Riemannian modules: splitting, names, and the optimizer's steps against the pure direction."""

import copy

import pytest
import torch
from torch import nn

from nt_kernel import layer_factors
from nt_kernel.mass import RowColumnMass
from nt_kernel.metric.output_metric import resolve_output_metric
from optim import Woodbury
from optim.riemannian.manifold import Chart, Manifold, positive
from optim.riemannian.module_step import metric_factors, riemannian_direction, riemannian_step
from optim.riemannian.riemannian_module import RiemannianModule, SequentialModule
from tests.optim.modules import drawn_point, generator, normal, smooth, stiffness
from tests.reference import F64, SCALE, definite_metric, distance, trainable


def network():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 3), nn.Softplus())
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), inner, nn.Linear(3, 2, bias=False)).double()


def hybrid(metric="identity", mass=0.3):
    """A network, then a system that is none, beside another one; all kinds of constant masses."""
    draw = generator(4)
    net = RiemannianModule.from_torch(network(), normal(draw, 4, 3), name="net", mass=mass)
    other = smooth("other", 1, 1, mass=torch.tensor([[2.0]], dtype=F64))
    module = net.parallel(other).sequential(smooth("last", 3, 2, metric, mass=0.5))
    point = drawn_point(module, draw)
    return module, normal(draw, 5, 4), point


@pytest.mark.parametrize("option", ["mean", "sum", "none"])
@pytest.mark.parametrize("metric", ["identity", "cross_entropy", definite_metric, 2.0])
def test_the_optimizer_takes_the_steps_of_the_pure_direction(metric, option):
    """optim.Woodbury on ``as_torch`` (autograd, nt_kernel's factors, coordinates) = recursion, points, retraction."""
    module, x, point = hybrid(metric)
    model, lr, target = module.as_torch(point), 0.4, normal(generator(9), 5, 2)
    opt = Woodbury(
        model, lr, mass=model.mass, output_metric=model.output_metric, scale=option, solver="cholesky", check_step=False
    )
    for _ in range(3):
        y = module(x, point)
        direction = riemannian_direction(module, x, point, (y - target) / 5, scale=option)
        slack = 1e-12 * stiffness(module, x, point, module.outputs.matrix(y), SCALE[option](5))
        point = riemannian_step(module, point, direction, lr)
        opt.zero_grad()
        (0.5 * (model(x) - target).square().sum() / 5).backward()
        opt.step()
        assert distance(model.point(), point) <= 10 * slack
        point = model.point()


def test_layers_of_the_torch_module_are_the_blocks():
    module, x, point = hybrid("cross_entropy")
    model = module.as_torch(point)
    y, factors = layer_factors(model, x)
    assert list(factors) == list(module.blocks) == ["net.0", "net.2.0", "net.3", "other", "last"]
    assert factors["net.0"].kinds == {"net.0.weight": "linear", "net.0.bias": "linear"}  # the structure shows through
    assert torch.equal(y, module(x, model.point()).flatten(1))
    L, K = resolve_output_metric("cross_entropy").factor(y), metric_factors(module, x, point)
    for block in ("net.0", "net.2.0", "net.3"):
        assert torch.allclose(K[block], L @ factors[block].dense(), rtol=1e-12, atol=1e-13)


def test_coordinates_and_points_of_the_torch_module():
    module, _, point = hybrid()
    model = module.as_torch(point)
    own = dict(model.named_parameters())
    assert torch.allclose(own["last.b"], point["last.b"].log())
    assert torch.equal(own["net.0.weight"], point["net.0.weight"])
    assert distance(model.point(), point) < 1e-15
    assert model.mass["last.b"] == 2.0
    assert model.mass["other.W"].tolist() == [[2.0]]
    assert model.mass["net.2.0.bias"] == 0.3
    copied = copy.deepcopy(model)
    with torch.no_grad():
        own["last.b"].add_(1)
    assert torch.allclose(model.point()["last.b"], point["last.b"] * torch.e)
    assert distance(copied.point(), point) < 1e-15
    model.load_state_dict(copied.state_dict())
    assert distance(model.point(), point) < 1e-15


def test_a_network_is_taken_apart_layer_by_layer():
    net, x = network(), normal(generator(0), 4, 3)
    module = RiemannianModule.from_torch(net, x, mass={"2.0": 0.5, "3.weight": 2.0})
    assert isinstance(module, SequentialModule)
    assert [stage.name for stage in module.stages] == ["0", "1", "2.0", "2.1", "3"]
    assert {n: m.mass for n, m in module.parameters.items()} == {
        "0.weight": 1.0, "0.bias": 1.0, "2.0.weight": 0.5, "2.0.bias": 0.5, "3.weight": 2.0
    }  # fmt: skip
    assert list(module.parameters) == [n for n, _ in net.named_parameters()]
    assert torch.equal(module(x, dict(net.named_parameters())), net(x))


def test_a_network_whose_children_share_stays_in_one_piece():
    layer = nn.Linear(3, 3).double()
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    tied[1].weight = tied[0].weight
    hooked = network()
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    for net in (twice, tied, hooked):
        x = normal(generator(0), 4, 3)
        module = RiemannianModule.from_torch(net, x)
        assert not isinstance(module, SequentialModule)
        assert list(module.parameters) == list(trainable(net))
        assert torch.equal(module(x, trainable(net)), net(x))


def test_the_module_keeps_its_own_copy():
    net, x = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval(), normal(generator(0), 4, 3)
    net[0].bias.requires_grad_(False)
    module, point = RiemannianModule.from_torch(net, x), trainable(net)
    before = module(x, point)
    with torch.no_grad():
        net[0].bias.add_(1)
        net[1].running_mean.add_(1)
    net.train()
    assert torch.equal(module(x, point), before)
    assert list(module.parameters) == ["0.weight", "1.weight", "1.bias"]


def test_in_place_activations_do_not_reach_the_recursion():
    """ELU in place overwrites the point at which its own derivative is taken."""
    x = normal(generator(0), 4, 3)
    nets = [nn.Sequential(nn.Linear(3, 5), nn.ELU(inplace=i), nn.Linear(5, 2)).double() for i in (True, False)]
    point = trainable(nets[0])
    K, expected = (metric_factors(RiemannianModule.from_torch(net, x, output_metric=1.0), x, point) for net in nets)
    assert all(torch.allclose(K[b], expected[b], rtol=1e-13, atol=1e-14) for b in K)


def test_names_get_a_prefix():
    module = RiemannianModule.from_torch(nn.Linear(3, 2), torch.ones(1, 3), name="readout", output_metric=2.0)
    assert module.blocks == {"readout": ("readout.weight", "readout.bias")}
    assert RiemannianModule.from_torch(nn.Linear(3, 2), torch.ones(1, 3)).blocks == {".": ("weight", "bias")}
    assert module.outputs.mass == 2.0


def test_a_row_and_column_mass_is_a_diagonal():
    mass = {"weight": RowColumnMass(torch.tensor([1.0, 2]), torch.tensor([1.0, 3, 5]))}
    module = RiemannianModule.from_torch(nn.Linear(3, 2), torch.ones(1, 3), mass=mass)
    assert module.parameters["weight"].mass.tolist() == [[1, 3, 5], [2, 6, 10]]


def test_what_is_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="draws random masks in training mode"):
        RiemannianModule.from_torch(nn.Sequential(nn.Linear(3, 2), nn.Dropout()), x)
    with pytest.raises(ValueError, match="did you mean '0'"):
        RiemannianModule.from_torch(nn.Sequential(nn.Linear(3, 2)), x, mass={"0.": 1.0})
    for bad in ((nn.Linear(3, 2), (x, x)), (nn.Linear(3, 2), torch.tensor(1.0)), (lambda z: z, x)):
        with pytest.raises(TypeError, match=r"needs an nn\.Module and inputs as one tensor"):
            RiemannianModule.from_torch(*bad)
    line = Manifold((1,))
    taken = RiemannianModule(line, {"mass": Manifold((), 1.0)}, line, lambda z, p: p["mass"] * z)
    with pytest.raises(ValueError, match="cannot have a parameter called 'mass'"):
        taken.as_torch({"mass": torch.tensor(1.0)})
    module, _, point = hybrid()
    with pytest.raises(ValueError, match="not on the manifold"):
        module.as_torch(point | {"last.b": -point["last.b"]})
    with pytest.raises(ValueError, match="the point has"):
        module.as_torch({"last.b": point["last.b"]})
    with pytest.raises(ValueError, match="the point has"):
        module.as_torch(point | {"more": point["last.b"]})
    space = Manifold((1,))
    for curved in (Manifold((2,), lambda u: torch.diag_embed(1 + u**2)), Manifold((2,), torch.eye(2))):
        model = RiemannianModule(space, {"w": curved}, space, lambda z, p: z, "f").as_torch({"f.w": torch.ones(2)})
        with pytest.raises(ValueError, match=r"metric of f\.w is no constant diagonal"):
            model.mass  # noqa: B018
    with pytest.raises(ValueError, match="has no metric"):
        model.output_metric  # noqa: B018


def test_a_chart_of_the_users_own_trains():
    """Angles on the circle in the chart of the tangent's half: the optimizer moves coordinates, the loss falls."""
    half = Chart(lambda u: 2 * u.atan(), lambda a: (a / 2).tan(), elementwise=True)
    turn = RiemannianModule(
        Manifold((2,)),
        {"angle": Manifold((), 1.0, half)},
        Manifold((2,), 1.0),
        lambda z, p: torch.stack([p["angle"].cos() * z[:, 0] - p["angle"].sin() * z[:, 1],
                                  p["angle"].sin() * z[:, 0] + p["angle"].cos() * z[:, 1]], 1),
        "turn",
    )  # fmt: skip
    x = normal(generator(0), 20, 2)
    angle = lambda a: {"turn.angle": torch.tensor(a, dtype=F64)}  # noqa: E731
    target, model = turn(x, angle(1.0)), turn.as_torch(angle(-0.5))
    opt = Woodbury(model, 0.5, mass={"turn.angle": 1e-3}, output_metric=model.output_metric)
    for _ in range(40):
        opt.zero_grad()
        (0.5 * (model(x) - target).square().sum() / 20).backward()
        opt.step()
    assert model.point()["turn.angle"].item() == pytest.approx(1.0, abs=1e-6)
    assert positive(()).chart.elementwise
