"""A twin study done the slow way: dense Jacobians, dense metrics, one run at a time, straight from the definitions."""

import torch
from torch import nn

from stability import Replacement

F64 = torch.float64


def small_problem(seed=0, n=4, p=2, d=3, width=5, twins=2, activation=nn.Tanh):
    """(model, x, targets, replacements, held_out) drawn from a seed, float64."""
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64)  # noqa: E731
    model = nn.Sequential(
        nn.Linear(d, width), activation(), nn.Linear(width, width, bias=False), activation(), nn.Linear(width, p)
    )
    model = model.to(F64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(randn(*parameter.shape) / parameter.shape[-1] ** 0.5)
    replacements = [Replacement(j % n, randn(d), randn(p)) for j in range(twins)]
    return model, randn(n, d), randn(n, p), replacements, randn(3, d)


def half_square(y, a):
    """The losses of the samples, [N]."""
    return 0.5 * (y - a).square().sum(-1)


class DenseRun:
    """One training run on (x, a): parameters as a flat dict, everything else recomputed densely when asked for."""

    def __init__(self, model, x, a, *, mass, c, M=None, loss=half_square):
        self.model, self.x, self.a, self.c, self.loss = model, x, a, c, loss
        self.params = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.layers = {}
        for name in self.params:
            self.layers.setdefault(name.rpartition(".")[0], []).append(name)
        masses = mass if isinstance(mass, list) else [mass] * len(self.layers)
        self.mass = dict(zip(self.layers, masses, strict=True))
        self.M = M or (lambda y: torch.eye(y.shape[-1], dtype=F64).expand(len(y), -1, -1))

    def outputs(self, x):
        return torch.func.functional_call(self.model, self.params, (x,))

    def jacobian(self, x):
        """{layer: J [N·C, P]}."""
        J = torch.func.jacrev(lambda params: torch.func.functional_call(self.model, params, (x,)))(self.params)
        rows = len(x) * self.outputs(x).shape[1]
        return {layer: torch.cat([J[n].reshape(rows, -1) for n in names], 1) for layer, names in self.layers.items()}

    def metric(self):
        """{layer: G [P, P]} built on this run's own data."""
        M = torch.block_diag(*self.M(self.outputs(self.x)))
        return {
            layer: self.mass[layer] * torch.eye(J.shape[1], dtype=F64) + self.c * J.T @ M @ J
            for layer, J in self.jacobian(self.x).items()
        }

    def kernel(self, A, B):
        """J_A G⁻¹J_Bᵀ."""
        G, JA, JB = self.metric(), self.jacobian(A), self.jacobian(B)
        return sum(JA[layer] @ torch.linalg.solve(G[layer], JB[layer].T) for layer in G)

    def norms(self, x):
        """‖J_i‖₂ for every row of x, mass not involved."""
        J = torch.cat(list(self.jacobian(x).values()), 1).reshape(
            len(x), -1, sum(p.numel() for p in self.params.values())
        )
        return torch.linalg.matrix_norm(J, 2)

    def gradient(self, y, a):
        """∇_y ℓ, [N, C]."""
        return torch.func.grad(lambda y: self.loss(y, a).sum())(y)

    def step(self, lr):
        r = self.gradient(self.outputs(self.x), self.a).flatten() / len(self.x)
        G, J = self.metric(), self.jacobian(self.x)
        for layer, names in self.layers.items():
            move = torch.linalg.solve(G[layer], J[layer].T @ r)
            for name, piece in zip(names, move.split([self.params[n].numel() for n in names]), strict=True):
                self.params[name] = self.params[name] - lr * piece.reshape(self.params[name].shape)


def twin_data(x, a, z):
    x2, a2 = x.clone(), a.clone()
    x2[z.index], a2[z.index] = z.x, z.target
    return x2, a2


def dense_study(model, x, a, z, held_out, *, steps, lr, mass=1.0, c=None, M=None, loss=half_square):
    """All series of one pair, {name: [T + 1]}, from the definitions of the theory (T5 by its matrix recursion)."""
    n, p = a.shape
    c = 1 / n if c is None else c
    S = DenseRun(model, x, a, mass=mass, c=c, M=M, loss=loss)
    x2, a2 = twin_data(x, a, z)
    T = DenseRun(model, x2, a2, mass=mass, c=c, M=M, loss=loss)
    union = torch.cat([x, z.x[None]])
    targets = torch.cat([a, z.target[None]])
    out: dict[str, list] = {}
    put = lambda name, value: out.setdefault(name, []).append(float(value))  # noqa: E731
    last = None
    for t in range(steps + 1):
        yS, yT = S.outputs(x), T.outputs(x)
        e = yT - yS
        H = S.kernel(x, x) / n
        eig = torch.linalg.eigvalsh((H + H.T) / 2)
        rT = T.gradient(T.outputs(union), targets)
        curvature = torch.func.hessian(lambda y: loss(y.reshape(n, p), a).sum())(yS.flatten())
        to_k, to_k2 = T.kernel(x, x[z.index][None]) / n, T.kernel(x, z.x[None]) / n
        d = to_k @ rT[z.index] - to_k2 @ rT[n]
        HT = T.kernel(x, x) / n
        rT_S = rT[:n].flatten()
        R = T.kernel(union, union)
        put("xi", eig[0]), put("lambda_max", eig[-1])
        put("measured_sup", e.norm(dim=1).max()), put("measured_l2", e.norm())
        put("measured_replaced", e[z.index].norm())
        put("measured_others", max([e[i].norm() for i in range(n) if i != z.index], default=torch.tensor(0.0)))
        put("measured_heldout", (T.outputs(held_out) - S.outputs(held_out)).norm(dim=1).max())
        put("kappa", max(S.norms(union).max(), T.norms(union).max()))
        put("L", max(S.gradient(S.outputs(union), targets).norm(dim=1).max(), rT.norm(dim=1).max()))
        put("h", max(torch.linalg.eigvalsh(R[i * p : (i + 1) * p, i * p : (i + 1) * p])[-1] for i in range(n + 1)))
        put("column", max(torch.linalg.matrix_norm(to_k, 2), torch.linalg.matrix_norm(to_k2, 2)))
        put("disturbance", d.norm()), put("drift", ((HT - H) @ rT_S).norm())
        put("train_loss", loss(yS, a).mean()), put("twin_train_loss", loss(T.outputs(x2), a2).mean())
        put("rate", torch.linalg.eigvals(H @ curvature).real.max())
        e = e.flatten()
        if last is None:
            E, P, G3, path, paths = e.norm(), torch.outer(e, e), e.norm(), e.norm(), e.reshape(n, p).norm(dim=1)
        else:
            A = torch.eye(n * p, dtype=F64) - lr * last["H"] @ last["curvature"]
            w = e - A @ last["e"]
            E = torch.linalg.matrix_norm(A, 2) * E + w.norm()
            APA = A @ P @ A.T
            alpha, omega = APA.trace().clamp_min(0).sqrt(), w.norm()
            if alpha == 0 or omega == 0:
                P = APA + torch.outer(w, w)
            else:
                P = (1 + omega / alpha) * APA + (1 + alpha / omega) * torch.outer(w, w)
            x_ = last["xi"] * lr
            G3 = torch.exp(-x_) * G3 + (1 - torch.exp(-x_)) / last["xi"] * last["d"]
            path = path + (e - last["e"]).norm()
            paths = paths + (e - last["e"]).reshape(n, p).norm(dim=1)
        radii = torch.stack(
            [
                torch.linalg.eigvalsh(P[i * p : (i + 1) * p, i * p : (i + 1) * p])[-1].clamp_min(0).sqrt()
                for i in range(n)
            ]
        )
        put("T3", G3), put("T4", E), put("T5", radii.max()), put("path_l2", path), put("path_sup", paths.max())
        put("T5_l2", torch.linalg.eigvalsh(P)[-1].clamp_min(0).sqrt())
        put("T5_others", max([radii[i] for i in range(n) if i != z.index], default=torch.tensor(0.0)))
        last = {"e": e, "H": H, "curvature": curvature, "xi": eig[0], "d": d.norm()}
        if t < steps:
            S.step(lr), T.step(lr)
    return out
