"""Between ``torch.nn`` and Riemannian modules: a network as a module, a module as a network whose layers are its parameter
manifolds, so that :class:`optim.Woodbury` (and every torch optimizer) runs on it."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from nt_kernel.capture.probe import refuse_modules, refuse_parameters
from nt_kernel.mass import Mass, ParameterMass, RowColumnMass, resolve_mass
from nt_kernel.metric.output_factor import OutputMetric
from optim.riemannian.manifold import Manifold, Metric, output_metric
from optim.riemannian.riemannian_module import RiemannianModule


def from_torch(
    model: nn.Module, x: Tensor, *, mass: Mass = 1.0, output_metric: Metric = None, name: str = ""
) -> RiemannianModule:
    """A network as a Riemannian module: layer by layer where it is an ``nn.Sequential``, in one piece otherwise.

    Parameters
    ----------
    model: copied; frozen parameters and buffers are part of the map. x: inputs like those to come, [N, …].
    mass: of the trainable parameters, as for :class:`optim.Woodbury`. output_metric: of the outputs, flattened
        (:class:`optim.riemannian.manifold.Manifold`); None leaves it to what is composed behind.
    name: prefix of the parameters' names, which are otherwise the network's: θ is ``dict(model.named_parameters())``.

    Raises ValueError for dropout or BatchNorm in training mode, for parameters that are not real, for an unknown name in
    ``mass``; TypeError for several inputs at once.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> module = from_torch(net, torch.zeros(1, 3), output_metric="identity")
    >>> module
    SequentialModule((3,) -> (2,), ['0.weight', '0.bias', '2.weight', '2.bias'])
    >>> x = torch.randn(5, 3)
    >>> torch.equal(module(x, dict(net.named_parameters())), net(x))
    True
    """
    if not isinstance(model, nn.Module) or not isinstance(x, Tensor) or x.dim() == 0 or len(x) == 0:
        raise TypeError(
            f"from_torch needs an nn.Module and inputs as one tensor [N, …]; got {type(model).__name__}, {type(x).__name__}"
        )
    refuse_parameters(model)
    refuse_modules(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    layers: dict[str, list[str]] = {}
    for full in trained:
        layers.setdefault(full.rpartition(".")[0] or ".", []).append(full)
    masses = resolve_mass(mass, layers, {n: p.shape for n, p in trained.items()})
    stages = []
    with torch.no_grad():
        for prefix, part in _stages(model):
            own = [n for n, p in part.named_parameters() if p.requires_grad]
            map = _functional(part)
            y = map(x, {n: trained[prefix + n] for n in own})
            parameters = {n: _euclidean(trained[prefix + n], masses[prefix + n]) for n in own}
            called = (f"{name}." if name else "") + prefix
            spaces = Manifold(tuple(x.shape[1:])), parameters, Manifold(tuple(y.shape[1:]))
            stages.append(RiemannianModule(*spaces, map, called.removesuffix(".")))
            x = y
    stages[-1] = stages[-1].with_metric(output_metric)
    module = stages[0]
    for stage in stages[1:]:
        module = module.sequential(stage)
    return module


def _euclidean(parameter: Tensor, mass: ParameterMass) -> Manifold:
    return Manifold(tuple(parameter.shape), mass.full(parameter.shape) if isinstance(mass, RowColumnMass) else mass)


def _functional(part: nn.Module):
    """(z, {name: parameter}) → the outputs of a copy of ``part``."""
    part = deepcopy(part).requires_grad_(False)
    writes = any(
        getattr(module, "inplace", False) for module in part.modules()
    )  # into z, which the recursion still needs

    def run(z: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return torch.func.functional_call(part, dict(parameters), (z.clone() if writes else z,))

    return run


def _stages(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """(prefix of the names, part) of every step of nested ``nn.Sequential``; one part where children share a parameter."""
    if type(model) is not nn.Sequential or not len(model) or model._forward_hooks or model._forward_pre_hooks:
        return [(prefix, model)]
    count = sum(len(list(child.parameters())) for child in model)
    if count != len(list(model.parameters())) or len(set(model)) != len(model):
        return [(prefix, model)]
    return [pair for name, child in model.named_children() for pair in _stages(child, f"{prefix}{name}.")]


def as_torch(module: RiemannianModule, point: Mapping[str, Tensor]) -> "ModuleNetwork":
    """The module as an ``nn.Module`` at θ = ``point``, its layers the metric blocks, its parameters the coordinates u of θ.

    Where the metric of every parameter manifold is a constant diagonal in its chart, a Euclidean step in u is the step along
    the exponential map, so

        model = module.as_torch(point); opt = Woodbury(model, lr, mass=model.mass, output_metric=model.output_metric)

    takes the steps of :func:`optim.riemannian.module_step.riemannian_step`.

    Raises ValueError for a point that is not on its manifold, or a name that torch keeps for itself; ``model.mass`` raises
    one where a metric is not such a diagonal.

    >>> from optim.riemannian.manifold import positive
    >>> decay = RiemannianModule(
    ...     Manifold((1,)), {"rate": positive(())}, Manifold((1,), 1.0), lambda t, p: torch.exp(-p["rate"] * t), "decay"
    ... )
    >>> model = as_torch(decay, {"decay.rate": torch.tensor(2.0)})
    >>> [(name, round(p.item(), 4)) for name, p in model.named_parameters()], model.mass  # log 2
    ([('decay.rate', 0.6931)], {'decay.rate': 1.0})
    >>> model.point()["decay.rate"].item()
    2.0
    """
    return ModuleNetwork(module, point)


class ModuleNetwork(nn.Module):
    """See :func:`as_torch`."""

    def __init__(self, module: RiemannianModule, point: Mapping[str, Tensor]):
        super().__init__()
        unknown = sorted(point.keys() - module.parameters.keys())
        if unknown or len(point) != len(module.parameters):
            raise ValueError(
                f"the point has {', '.join(point) or 'no parameters'}; the module {', '.join(module.parameters)}"
            )
        self.composed = module
        for name, manifold in module.parameters.items():
            *path, own = name.split(".")
            holder: nn.Module = self
            for step in path:
                if step not in holder._modules:
                    holder.add_module(step, nn.Module())
                holder = holder._modules[step]
            if hasattr(holder, own):
                raise ValueError(f"a torch module cannot have a parameter called {name!r}: give its module a name")
            holder.register_parameter(own, nn.Parameter(manifold.coordinates(point[name].detach()).clone()))

    def forward(self, x: Tensor) -> Tensor:
        return self.composed(x, self._points())

    def point(self) -> dict[str, Tensor]:
        """θ, the points of the parameter manifolds, detached."""
        return {name: p.detach().clone() for name, p in self._points().items()}

    @property
    def mass(self) -> dict[str, float | Tensor]:
        """D by parameter name, for ``Woodbury(mass=…)``."""
        masses = {name: manifold.mass for name, manifold in self.composed.parameters.items()}
        curved = [name for name, mass in masses.items() if mass is None]
        if curved:
            raise ValueError(
                f"the metric of {', '.join(curved)} is no constant diagonal in its chart, which is what a mass is; step with "
                "optim.riemannian.module_step.riemannian_direction, or give the manifold a chart in which it is"
            )
        return masses

    @property
    def output_metric(self) -> OutputMetric:
        """The metric of the outputs, for ``Woodbury(output_metric=…)``."""
        return output_metric(self.composed.outputs)

    def _points(self) -> dict[str, Tensor]:
        own = dict(self.named_parameters())
        return {name: manifold.point(own[name]) for name, manifold in self.composed.parameters.items()}
