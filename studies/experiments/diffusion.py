"""A small latent-diffusion testbed: an autoencoder on digits, and a noise-prediction network trained by movements in it.

Round by round N fresh triples (latent z₀, time t, noise ε) make a squared energy E(u) = ½‖u − ε‖² on the network's outputs at
z_t = cos(πt/2)z₀ + sin(πt/2)ε; one proximal step of size τ is taken, its inner problem solved by Gauss–Newton or a first-order
optimizer under one budget for all. Samples are drawn by the deterministic sampler of arXiv 2010.02502 (DDIM) and decoded.
"""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor, nn

RATES = {"SGD, momentum": (0.01, 0.03, 0.1), "Adam": (1e-3, 3e-3, 1e-2)}
FREQUENCIES = 4


def generator(*entropy: int) -> "torch.Generator":
    import numpy as np
    import torch

    state = np.random.SeedSequence(list(entropy)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def autoencoder(
    images: "Tensor", latent: int, seed: int, steps: int = 800
) -> "tuple[nn.Module, nn.Module, Tensor, Tensor]":
    """(encoder, decoder, latents standardised, [mean; deviation] of the raw ones) of 64-48-``latent``-48-64 tanh on ``images``
    [N, 64], trained on ½‖x − x̂‖² by Adam, batches of 64."""
    import numpy as np
    import torch
    from torch import nn

    from optim import index_stream
    from studies.data.models import fully_connected
    from studies.experiments.training import named_loss, training

    first, second, order = np.random.SeedSequence([seed, 1]).spawn(3)
    place = {"dtype": str(images.dtype).removeprefix("torch."), "device": str(images.device)}
    encoder = fully_connected([images.shape[1], 48, latent], "tanh", first, **place)
    decoder = fully_connected([latent, 48, images.shape[1]], "tanh", second, **place)
    whole = nn.Sequential(encoder, decoder)
    opt = torch.optim.Adam(whole.parameters(), 3e-3)
    batches = index_stream(len(images), min(64, len(images)), order, steps=steps)
    for _ in training(whole, opt, named_loss("squared"), images, images, batches):
        pass
    with torch.no_grad():
        raw = encoder(images)
    about = torch.stack([raw.mean(0), raw.std(0)])
    return encoder, decoder, (raw - about[0]) / about[1], about


def features(z: "Tensor", t: "Tensor") -> "Tensor":
    """[z, t, sin and cos of π·2^j·t], [N, d + 1 + 2·4]: what the noise network sees.

    >>> import torch
    >>> features(torch.zeros(2, 3), torch.zeros(2)).shape
    torch.Size([2, 12])
    """
    import torch

    angles = math.pi * t[:, None] * 2.0 ** torch.arange(FREQUENCIES, dtype=t.dtype, device=t.device)
    return torch.cat([z, t[:, None], angles.sin(), angles.cos()], 1)


def noised(z0: "Tensor", t: "Tensor", noise: "Tensor") -> "Tensor":
    """z_t = cos(πt/2)z₀ + sin(πt/2)ε: z₀ at t = 0, noise at t = 1."""
    angle = (math.pi / 2 * t)[:, None]
    return angle.cos() * z0 + angle.sin() * noise


def batch(latents: "Tensor", size: int, draw: "torch.Generator") -> "tuple[Tensor, Tensor]":
    """(network inputs [size, …], noise ε [size, d]), times stratified over (0, 1)."""
    import torch

    rows = torch.randint(len(latents), (size,), generator=draw)
    t = (torch.arange(size, dtype=torch.float64) + torch.rand(size, generator=draw, dtype=torch.float64)) / size
    noise = torch.randn(size, latents.shape[1], generator=draw, dtype=torch.float64)
    t, noise = t.to(latents), noise.to(latents)  # drawn alike for every device and type
    return features(noised(latents[rows], t, noise), t), noise


def sample(network: "nn.Module", like: "Tensor", count: int, draw: "torch.Generator", steps: int = 60) -> "Tensor":
    """Latents [count, d] of the type and width of ``like`` [N, d], by the deterministic sampler: ẑ₀ = (z − sin·ε̂)/cos, then
    noised to the next, smaller time with ε̂."""
    import torch

    z = torch.randn(count, like.shape[1], generator=draw, dtype=torch.float64).to(like)
    times = torch.linspace(0.98, 0.0, steps + 1, dtype=torch.float64).to(like)
    with torch.no_grad():
        for now, after in pairwise(times):
            t = now.expand(count)
            noise = network(features(z, t))
            angle = math.pi / 2 * now
            clean = ((z - angle.sin() * noise) / angle.cos()).clamp(-4, 4)
            z = noised(clean, after.expand(count), noise)
    return z


def energy_distance(a: "Tensor", b: "Tensor") -> float:
    """2E‖A − B‖ − E‖A − A'‖ − E‖B − B'‖ ≥ 0 (Székely & Rizzo 2013), 0 for equal distributions; biased up by 1/n.

    >>> import torch
    >>> energy_distance(torch.zeros(4, 1), torch.ones(4, 1))
    2.0
    """
    import torch

    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def movement_tables(
    which: str,
    seed: int,
    *,
    budget: str,
    per_step: float,
    rounds: int,
    size: int,
    latent: int,
    width: int,
    tau: float,
    images: int,
    dtype: str = "float64",
    device: str = "cpu",
) -> "dict[str, pd.DataFrame]":
    """``summary``: a row for each learning rate, with the held-out noise-prediction loss at the end, ``inexactness`` (mean
    over rounds of δ_k as a share of the exact step), the energy distance of 200 samples to held-out latents, iterations and
    seconds; ``rounds``: loss and inexactness along; ``samples``: decoded pixels of 8 samples, 8 real images and their
    reconstructions (source "sample", "real", "reconstructed")."""
    import numpy as np
    import pandas as pd
    import torch

    from studies.data.datasets import dataset
    from studies.data.models import fully_connected

    pixels, _ = dataset("digits")
    order = np.random.default_rng(np.random.SeedSequence([seed, 0])).permutation(len(pixels))[:images]
    pixels = torch.from_numpy(pixels[order].copy()).to(device, getattr(torch, dtype))
    train, held_out = pixels[: 4 * images // 5], pixels[4 * images // 5 :]
    encoder, decoder, latents, about = autoencoder(train, latent, seed)
    with torch.no_grad():
        other = (encoder(held_out) - about[0]) / about[1]
    test_x, test_noise = batch(other, 2000, generator(seed, 2))
    summary, along, samples = [], [], []
    for lr in RATES.get(which, (0.0,)):
        network = fully_connected(
            [latent + 1 + 2 * FREQUENCIES, width, width, latent],
            "tanh",
            np.random.SeedSequence([seed, 3]),
            dtype=dtype,
            device=device,
        )
        rows = _rounds(network, which, lr, latents, (test_x, test_noise), seed, budget, per_step, rounds, size, tau)
        drawn = sample(network, latents, 200, generator(seed, 5))
        summary.append(
            {
                "lr": lr,
                "loss": rows[-1]["loss"],
                "inexactness": float(np.mean([row["inexactness"] for row in rows])),
                "energy_distance": energy_distance(drawn, other),
                "floor": energy_distance(latents[:200], other),
                "iterations": sum(row["iterations"] for row in rows),
                "seconds": sum(row["seconds"] for row in rows),
            }
        )
        along.append(pd.DataFrame(rows).assign(lr=lr))
        with torch.no_grad():
            pictures = {
                "sample": decoder(drawn[:8] * about[1] + about[0]),
                "real": held_out[:8],
                "reconstructed": decoder(other[:8] * about[1] + about[0]),
            }
        for source, images_of in pictures.items():
            table = pd.DataFrame(images_of.numpy(force=True), columns=[f"pixel_{i}" for i in range(images_of.shape[1])])
            samples.append(table.assign(lr=lr, source=source, image=range(len(table))))
    return {
        "summary": pd.DataFrame(summary),
        "rounds": pd.concat(along, ignore_index=True),
        "samples": pd.concat(samples, ignore_index=True),
    }


def _rounds(network, which, lr, latents, test, seed, budget, per_step, rounds, size, tau) -> list[dict]:
    import torch

    from optim import FirstOrder, GaussNewton, SquaredEnergy, minimizing_movements
    from optim.movements.space import norm
    from studies.experiments.clock import clock_of

    if which == "Gauss–Newton":
        solver = GaussNewton()
    else:
        make = torch.optim.Adam if which == "Adam" else (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9))
        optimizer = make([p for p in network.parameters()], lr)  # one for all rounds: it keeps its moments
        solver = FirstOrder(lambda params: optimizer, keep=True)
    limits = (
        {"inner_steps": int(per_step)} if budget == "iterations" else {"inner_steps": 10**6, "inner_seconds": per_step}
    )
    draw, rows, clock = generator(seed, 4), [], clock_of(str(latents.device))
    for number in range(1, rounds + 1):
        x, noise = batch(latents, size, draw)
        run = minimizing_movements(
            network, x, SquaredEnergy(noise), tau=tau, steps=1, delta=1e-10, solver=solver, clock=clock, **limits
        )
        step = norm(run.trajectory.proximal[0] - run.trajectory.outputs[0]).item()
        with torch.no_grad():
            loss = (network(test[0]) - test[1]).square().mean().item()
        rows.append(
            {
                "round": number,
                "loss": loss,
                "inexactness": run.columns()["delta"][0] / step,
                "iterations": run.iterations,
                "seconds": run.inner[0].seconds,
            }
        )
    return rows
