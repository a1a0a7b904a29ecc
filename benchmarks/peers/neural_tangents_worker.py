"""neural-tangents in its own environment: its empirical NTK of a network built from npz, timed on request.

Started as a script by that environment's Python, which holds JAX 0.4.30 and no torch; what it may be asked is in
``protocol.py`` beside it. ``prepare`` takes ``npz``, ``network``, ``activation``, ``implementation``.
"""

import os
import sys
import types

import protocol


def load():
    """(jax, neural_tangents). The package asks for names that JAX has since moved, and for TensorFlow, which only its
    ``experimental`` part uses."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    from jax._src import source_info_util
    from jax.interpreters import ad

    jax.config.update("jax_enable_x64", True)  # float32 stays float32: every array has its dtype
    ad.source_info_util, ad.config = source_info_util, jax.config
    sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")
    import neural_tangents

    return jax, neural_tangents


def prepare(loaded, request):
    """A function of no arguments that computes the kernel [N, N, C, C] and waits for it; compiled, and run once."""
    import numpy as np
    from jax_networks import build

    jax, nt = loaded
    with np.load(request["npz"]) as stored:
        arrays = {name.removeprefix("parameters/"): stored[name] for name in stored.files if name != "x"}
        f, parameters, x = build(request["network"], request["activation"], arrays, stored["x"])
    implementation = getattr(nt.NtkImplementation, request["implementation"])
    kernel = jax.jit(nt.empirical_ntk_fn(f, trace_axes=(), vmap_axes=0, implementation=implementation))

    def run():
        return kernel(x, None, parameters).block_until_ready()

    run()
    return run


def save(kernel, path):
    """The kernel as npy, [N, C, N, C]."""
    import numpy as np

    np.save(path, np.asarray(kernel).transpose(0, 2, 1, 3))
    return path


if __name__ == "__main__":
    protocol.serve(load, prepare, save)
