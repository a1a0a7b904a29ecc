"""``record``: a context manager that keeps what a training loop did, so that two runs can be certified against each other."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import as_inputs, batch_size
from nt_kernel.kernels.memory import parse_bytes
from stability.recording.batches import RowFinder, Rows, RowWatch
from stability.recording.force import Reader
from stability.recording.loss import output_loss
from stability.recording.own_rules import read_rule
from stability.recording.snapshots import FEWEST, Snapshot, Snapshots
from stability.recording.step_rule import Held, StepRule, number


def record(
    model: nn.Module,
    x,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    targets: Tensor | None = None,
    loss="squared",
    memory: "int | str" = "512 MiB",
    output: Callable | None = None,
) -> "RunRecord":
    """Record a training loop of your own: a context manager that gives the :class:`RunRecord` it fills.

    Parameters
    ----------
    model: what is trained. x: the training inputs S, all of them, a tensor [N, …] or a tuple of such, as the loop's batches
        are rows of them. optimizer: any torch.optim.Optimizer or one of this project's; its steps are recorded as they
        come, with their hyperparameters and state. None: call :meth:`RunRecord.mark` after every step.
    targets [N, p] (class indices [N] for "cross_entropy"): needed for the bounds T0 to T3 and where ∇²ℓ depends on them; a
        function takes them as its second argument.
    loss: of one sample, a name or a :class:`stability.Loss` ("squared", ½‖y − a‖²; "mse", "cross_entropy", "logistic",
        "huber"), or a function from the outputs on x [N, p] (and the targets, where given) to the losses of the samples [N].
        The loop must train on their mean over the batch: a factor belongs into the loss (``MSELoss()`` is "mse"). The first
        step's gradient is compared with it (``gradient_defect``).
    memory: the budget of the snapshots. Where they outgrow it every other one is dropped, again and again: all statements
        then hold at the times that are left, ``RunRecord.times``, and suprema are taken over these.
    output: selects the tensor where the model returns a tuple or dict.

    Which rows of x a step trained on is read off the forward passes whose output received a gradient, row by row (call
    :meth:`RunRecord.batch` where the loop feeds anything but rows of x). A step costs a copy of the
    parameters (and of a diagonal of their size for adaptive optimizers) and a hash of the batch; the first, one forward and
    backward pass on the batch. Nothing of the model, the optimizer or their gradients is changed.

    Raises ValueError/TypeError for bad arguments and a budget that does not hold six copies of the parameters.

    >>> model, x, a = nn.Linear(2, 1).double(), torch.eye(2).double(), torch.ones(2, 1).double()
    >>> opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> with record(model, x, opt, targets=a) as run:
    ...     for rows in ([0], [1], [0, 1]):
    ...         opt.zero_grad()
    ...         (0.5 * (model(x[rows]) - a[rows]).square().sum(1).mean()).backward()
    ...         opt.step()
    >>> len(run), run.rows, run.gradient_defect < 1e-12
    (3, [tensor([0]), tensor([1]), None], True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"record takes the model, an nn.Module; got {type(model).__name__}")
    hooks = ("register_step_pre_hook", "register_step_post_hook")
    if optimizer is not None and not all(hasattr(optimizer, hook) for hook in hooks):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if targets is not None and (not isinstance(targets, Tensor) or len(targets) != batch_size(x)):
        got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be a tensor with one row for each of the {batch_size(x)} samples, got {got}")
    return RunRecord(model, x, optimizer, targets, loss, parse_bytes(memory), output)


class RunRecord:
    """A recorded run; made by :func:`record`, compared with another by :func:`stability.certify`.

    ``rules`` and ``rows`` hold, for each of the T steps, what the optimizer did (:class:`StepRule`) and on which rows of x:
    indices, None for all, a text where they are not known. ``gradient_defect`` is ‖g − ∇h‖/‖∇h‖ of the first step, g what
    stood in p.grad, h the mean of the declared loss over its rows: far from 0, A_t is about another loss (None: not known).
    """

    def __init__(self, model, x, optimizer, targets, loss, budget: int, output):
        self.model, self.optimizer, self._handles = model, optimizer, []
        self.loss, self.targets = output_loss(loss, targets), targets
        double = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
        wide = tuple(map(double, as_inputs(x)))
        self.reader = Reader(_reading_copy(model), wide if isinstance(x, tuple) else wide[0], output)
        self._finder, self._watch = RowFinder(x), None
        self.snapshots = Snapshots(budget)
        self.rules: list[StepRule] = []
        self.rows: list[Rows | str] = []
        self.gradient_defect: float | None = None
        self._named: Rows | None = None
        self._is_named = False
        start = self._now()
        if FEWEST * start.nbytes > budget:
            raise ValueError(f"memory must hold {FEWEST} snapshots of {start.nbytes} bytes, got {budget} bytes")
        self.snapshots.add(0, start)
        self._trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self._earlier: dict[str, dict] = {}

    def __enter__(self) -> "RunRecord":
        last = self.snapshots.held[self.snapshots.last].state
        if any(
            not torch.equal(value, last[name]) for name, value in self._now().state.items() if name in self._trained
        ):
            raise ValueError("the parameters have moved since they were recorded last; make a new record(…)")
        if self.optimizer is not None:
            self._watch = RowWatch(self.model)
            self._handles = [
                self.optimizer.register_step_pre_hook(self._before),
                self.optimizer.register_step_post_hook(self._after),
            ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        if self._watch is not None:
            self._watch.close()
        self._handles, self._watch = [], None

    def __len__(self) -> int:
        """T, the number of recorded steps."""
        return len(self.rules)

    @property
    def times(self) -> list[int]:
        """The numbers of steps after which the parameters are still here: 0, s, 2s, … and T."""
        return self.snapshots.anchors

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshots."""
        return self.snapshots.nbytes

    def batch(self, rows) -> None:
        """The next step trains on these rows of x (indices or a mask [N]), whatever its forward passes say."""
        self._named, self._is_named = self._checked(rows), True

    def mark(self, rows=None, lr: float | None = None) -> None:
        """The parameters as they are now end a step, for a loop without an optimizer of torch's interface.

        With ``lr`` the step was θ ← θ − lr·∇h, h the mean loss over ``rows`` (None: all), and A_t = I − lr·H_B∇²ℓ. Without it
        nothing is known of the step, and A_t = I. Raises TypeError where an optimizer marks its steps itself.
        """
        if self.optimizer is not None:
            raise TypeError(
                "the optimizer's steps are recorded as they come; mark() is for record(model, x) without one"
            )
        rows = self._checked(rows)
        if lr is None:
            rule, masses = StepRule("mark", known=False, note="A_t = I (path length): mark() was given no lr"), {}
        else:
            lr = float(lr)
            if not 0 <= lr < float("inf"):
                raise ValueError(f"lr must be a number >= 0, got {lr!r}")
            names = (n for n, p in self.model.named_parameters() if p.requires_grad)
            rule, masses = StepRule("gradient step", lr, exact=True), dict.fromkeys(names, 1.0)
        self._add(rule, masses, rows)

    def outputs(self, t: int, x=None) -> Tensor:
        """y [N, C] in float64 after t steps (one of ``times``) on the training inputs or other ones."""
        return self.reader.outputs(self.snapshots.held[t].state, x)

    def load(self, t: int) -> None:
        """Put the parameters after t steps into the reading copy."""
        self.reader.load(self.snapshots.held[t].state)

    def masses(self, t: int) -> dict:
        """D of the step that starts at t."""
        return dict(self.snapshots.held[t].masses)

    def _before(self, optimizer, *_) -> None:
        self._earlier = {name: _scalars(optimizer.state.get(p)) for name, p in self._mine(optimizer)}

    def _after(self, optimizer, *_) -> None:
        held = [
            Held(name, p, group, optimizer.state.get(p, {}), self._earlier.get(name, {}))
            for group in optimizer.param_groups
            for name, p in self._mine(optimizer, group)
            if p.grad is not None
        ]
        rule, masses = read_rule(optimizer, held)
        rows = self._finder.rows(self._watch.take())
        if self._is_named:
            rows, self._named, self._is_named = self._named, None, False
        if not self.rules:
            self._compare_gradients(held, rows)
        self._add(rule, masses, rows)

    def _add(self, rule: StepRule, masses: dict, rows: "Rows | str") -> None:
        t = len(self.rules)
        self.snapshots.pairs = self.snapshots.pairs or (rule.known and rule.beta != 0)
        self.snapshots.keep_masses(t, masses)
        self.rules.append(rule)
        self.rows.append(rows)
        self.snapshots.add(t + 1, self._now())

    def _now(self) -> Snapshot:
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return Snapshot({n: t.detach().clone() for n, t in (trainable | dict(self.model.named_buffers())).items()})

    def _mine(self, optimizer, group: dict | None = None):
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = optimizer.param_groups if group is None else [group]
        return [(names[id(p)], p) for own in groups for p in own["params"] if id(p) in names]

    def _checked(self, rows) -> Rows:
        if rows is None:
            return None
        size, rows = self._finder.size, torch.as_tensor(rows)
        if rows.dtype == torch.bool and rows.shape == (size,):
            rows = rows.nonzero()[:, 0]
        if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool or not len(rows):
            raise ValueError(
                f"rows must be indices into the {size} rows of x, got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        rows = rows.long().cpu()
        if bool((rows < 0).any()) or bool((rows >= size).any()):
            raise ValueError(f"rows must lie in 0..{size - 1}, got {rows.min().item()}..{rows.max().item()}")
        return None if torch.equal(rows, torch.arange(size)) else rows

    def _compare_gradients(self, held: list[Held], rows: "Rows | str") -> None:
        if isinstance(rows, str) or self.loss.losses is None or not held:
            return
        self.load(0)
        own = dict(self.reader.model.named_parameters())
        with torch.enable_grad():
            y = self._outputs_with_gradient()
            losses = self.loss.values(y)
            h = (losses if rows is None else losses[rows.to(y.device)]).mean()
            wanted = torch.autograd.grad(h, [own[one.name] for one in held], allow_unused=True)
        gap = size = 0.0
        for one, g in zip(held, wanted, strict=True):
            g = torch.zeros_like(own[one.name]) if g is None else g
            gap += (one.p.grad.detach().double() - g).square().sum().item()
            size += g.square().sum().item()
        self.gradient_defect = (gap / size) ** 0.5 if size else (0.0 if gap == 0 else float("inf"))

    def _outputs_with_gradient(self) -> Tensor:
        from nt_kernel.capture.observe import run_model

        state = dict(self.reader.model.named_parameters()) | dict(self.reader.model.named_buffers())
        return run_model(self.reader.model, state, self.reader.x, self.reader.output)


def _scalars(state) -> dict:
    """What stands in an optimizer's state of a parameter, numbers as such, tensors and the lists of LBFGS as None; empty
    buffers left out."""
    values = {key: value for key, value in (state or {}).items() if value is not None}
    plain = {k: isinstance(v, int | float) or (isinstance(v, Tensor) and v.dim() == 0) for k, v in values.items()}
    return {k: number(v) if plain[k] else None for k, v in values.items()}


def _reading_copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).double().eval()
    except Exception as error:
        raise TypeError(
            f"record reads outputs from a copy of the model in float64, and it cannot be copied: {error}"
        ) from error
