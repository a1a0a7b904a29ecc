"""C¹ activations: kinks by module, and by the operations that a forward of the user's own actually runs."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stability.assumptions.catalogue import CATALOGUE
from stability.assumptions.verdict import Assumption

_SMOOTH = (
    nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.Mish, nn.LogSigmoid, nn.Tanhshrink, nn.Softmax, nn.LogSoftmax,
    nn.Softsign, nn.CELU,
)  # fmt: skip
_KINKED = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink,
    nn.Softshrink, nn.Threshold, nn.SELU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
)  # fmt: skip
_AFFINE = (nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten, nn.Sequential, nn.ModuleList)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations of torch (names without overload) that have a kink or a jump somewhere.
_KINKED_OPERATIONS = _names("""
    relu relu_ leaky_relu leaky_relu_ prelu _prelu_kernel rrelu_with_noise threshold threshold_ hardtanh hardtanh_
    hardsigmoid hardswish hardshrink softshrink abs abs_ sign sgn sign_ clamp clamp_ clamp_min clamp_min_ clamp_max
    clamp_max_ maximum minimum max min amax amin max_pool1d max_pool2d max_pool3d max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool2d round floor ceil trunc frac fmod remainder argmax argmin topk sort
    heaviside
""")
# Those that are C¹ wherever they are finite, linear algebra and rearrangement included.
_SMOOTH_OPERATIONS = _names("""
    mm addmm bmm baddbmm mv addmv matmul linear dot add add_ sub sub_ rsub mul mul_ div div_ neg neg_ pow tanh tanh_
    sigmoid sigmoid_ gelu gelu_ silu silu_ softplus mish mish_ log_sigmoid_forward exp exp_ expm1 log log1p sin cos tan
    atan sinh cosh erf square sqrt rsqrt reciprocal _softmax _log_softmax softmax log_softmax logsumexp sum mean t
    transpose permute view _unsafe_view reshape expand unsqueeze unsqueeze_ squeeze squeeze_ select slice cat stack split
    split_with_sizes chunk unbind clone detach alias _to_copy convolution native_layer_norm native_group_norm
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training avg_pool1d avg_pool2d avg_pool3d
    _adaptive_avg_pool2d embedding as_strided contiguous var var_mean std zeros ones zeros_like ones_like empty full
    scalar_tensor lift_fresh copy_ constant_pad_nd index_select gather cumsum addcmul addcdiv lerp outer diagonal tril
    triu einsum squeeze_copy roll flip _reshape_alias unfold im2col _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention
""")


def smooth_activations(model: nn.Module, x: Tensor | None = None) -> Assumption:
    """C¹ activations: known kinks by module; undecided where a forward is the user's own code.

    With inputs ``x`` the operations of one forward pass are read too: they find a kink in a forward of the user's own, and
    where all of them are known to be C¹ there is none on that path. Of ``where``, norms and whatever is not listed nothing
    is known: they can be smooth or not.

    >>> smooth_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).reason
    "layer '1' (ReLU) is only piecewise smooth"
    """
    kinks, unknown = [], []
    for name, module in model.named_modules():
        if isinstance(module, _KINKED) or (type(module) is nn.ELU and module.alpha != 1):
            kinks.append((name, type(module).__name__))
        elif type(module) not in (*_SMOOTH, *_AFFINE, nn.ELU):  # a subclass may do anything
            unknown.append((name, type(module).__name__))
    if kinks:
        name, kind = kinks[-1]
        return _found(len(kinks), "violated", f"layer {name!r} ({kind}) is only piecewise smooth", name)
    if not unknown:
        return _found(0, "holds", "all modules are C¹")
    name, kind = unknown[0]
    if x is None:
        return _found(0, "undecided", f"the forward of {name or 'the model'!r} ({kind}) is not known", name)
    by_operation = _operations(model, x)
    for operation, layer in by_operation.items():
        if operation in _KINKED_OPERATIONS:
            return _found(1, "violated", f"{layer or 'the model'!r} calls {operation}, which has a kink", layer)
    for operation, layer in by_operation.items():
        if operation not in _SMOOTH_OPERATIONS:
            return _found(
                0, "undecided", f"{layer or 'the model'!r} calls {operation}, of which nothing is known", layer
            )
    return _found(0, "holds", f"every operation of the forward pass is C¹ ({len(by_operation)} kinds)")


def _found(kinks: int, verdict: str, reason: str, layer: str = "") -> Assumption:
    spec = CATALOGUE["smooth_activations"]
    return Assumption(
        spec.name, spec.quantity, float(kinks), spec.limit, 0.0 - kinks, verdict, reason, spec.equation, layer=layer
    )


class _Reader(TorchDispatchMode):
    """The operations that run, each with the innermost module at work when it first ran."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, str] = {}
        self.inside: list[str] = [""]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.setdefault(func._schema.name.partition("::")[2], self.inside[-1])
        return func(*args, **(kwargs or {}))


def _operations(model: nn.Module, x: Tensor) -> dict[str, str]:
    reader, hooks = _Reader(), []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: reader.inside.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: reader.inside.pop() and None))
    try:
        with torch.no_grad(), reader:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return reader.seen
