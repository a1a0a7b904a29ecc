"""Recurrent cells and layers as the linear maps and nonlinearities they are made of, so that their weights are seen.

Every function has the arguments of the torch function it stands for, and its result up to rounding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable  # (input share of the gates, state, w_hh, b_hh) → (state, output)


def _plain_step(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(gates: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None):
        h = activation(gates + F.linear(h, w_hh, b_hh))
        return h, h

    return step


def _gru_step(gates: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None):
    r_x, z_x, n_x = gates.chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_hh, b_hh).chunk(3, -1)
    z = torch.sigmoid(z_x + z_h)
    h = (1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * h
    return h, h


def _lstm_step(gates: Tensor, state: tuple[Tensor, Tensor], w_hh: Tensor, b_hh: Tensor | None):
    h, c = state
    i, f, g, o = (gates + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h, c), h


STEPS = {"rnn_tanh": _plain_step(torch.tanh), "rnn_relu": _plain_step(torch.relu), "gru": _gru_step, "lstm": _lstm_step}


def cell(step: Step) -> Callable:
    """One step: (x, state, w_ih, w_hh, b_ih, b_hh) → new state."""

    def run(x, state, w_ih, w_hh, b_ih=None, b_hh=None):
        return step(F.linear(x, w_ih, b_ih), state, w_hh, b_hh)[0]

    return run


def layers(step: Step) -> Callable:
    """A stack of recurrent layers over a sequence; NotImplemented for packed sequences."""
    lstm = step is _lstm_step

    def run(*args):
        if len(args) != 9 or isinstance(args[3], Tensor | list | tuple):
            return NotImplemented  # a packed sequence
        x, initial, weights, biases, depth, dropout, train, both, batch_first = args
        ways, count = (2 if both else 1), 4 if biases else 2
        projects = len(weights) == depth * ways * (count + 1)  # an LSTM whose output and h are projected
        count += projects
        x = x.transpose(0, 1) if batch_first else x
        final = []
        for layer in range(depth):
            outs = []
            for way in range(ways):
                k = layer * ways + way
                w_ih, w_hh, *rest = weights[k * count : (k + 1) * count]
                b_ih, b_hh = rest[:2] if biases else (None, None)
                state = tuple(s[k] for s in initial) if lstm else initial[k]
                one = _projected(step, rest[-1]) if projects else step
                state, out = _over_time(one, F.linear(x, w_ih, b_ih), state, w_hh, b_hh, backwards=way == 1)
                final.append(state)
                outs.append(out)
            x = torch.cat(outs, -1) if both else outs[0]
            if dropout and train and layer < depth - 1:
                x = F.dropout(x, dropout)
        x = x.transpose(0, 1) if batch_first else x
        if lstm:
            return x, torch.stack([h for h, _ in final]), torch.stack([c for _, c in final])
        return x, torch.stack(final)

    return run


def _projected(step: Step, w_hr: Tensor) -> Step:
    def projected(gates: Tensor, state: tuple[Tensor, Tensor], w_hh: Tensor, b_hh: Tensor | None):
        (h, c), _ = step(gates, state, w_hh, b_hh)
        h = F.linear(h, w_hr)
        return (h, c), h

    return projected


def _over_time(step: Step, gates: Tensor, state, w_hh: Tensor, b_hh: Tensor | None, backwards: bool):
    times = range(len(gates))
    outs = []
    for t in reversed(times) if backwards else times:
        state, out = step(gates[t], state, w_hh, b_hh)
        outs.append(out)
    return state, torch.stack(outs[::-1] if backwards else outs)
