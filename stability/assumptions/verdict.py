"""``Assumption``: what was measured, against what, where, and with what verdict. No torch here: test collection reads it."""

from dataclasses import asdict, dataclass

VERDICTS = ("violated", "undecided", "holds")  # worst first


@dataclass(frozen=True)
class Assumption:
    """One assumption of theorem 3: what was measured, against what, where, with what verdict.

    ``replaced`` is the sample that the twin had replaced (−1: the S run). ``layer``, ``sample`` and ``step`` say where the
    value was taken ("" and −1: it belongs to no one place). Samples count as rows of S; a replacement z' has its k.
    """

    assumption: str
    quantity: str
    value: float
    threshold: float
    margin: float  # signed: how far on the good side of the threshold
    verdict: str  # holds | violated | undecided
    reason: str
    equation: str
    replaced: int = -1
    layer: str = ""
    sample: int = -1
    step: int = -1

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def place(self) -> str:
        """Where, in words.

        >>> Assumption("a", "q", 1.0, 2.0, 1.0, "holds", "", "P5", layer="0", step=3).place
        "layer '0', step 3"
        """
        return place_of(self.layer, self.sample, self.step, self.replaced)


def place_of(layer: str = "", sample: int = -1, step: int = -1, replaced: int = -1) -> str:
    """ "layer '0', sample 2, step 3", as far as known; "" where nothing is."""
    parts = [f"layer {layer!r}"] if layer else []
    parts += [f"sample {sample}"] if sample >= 0 else []
    parts += [f"step {step}"] if step >= 0 else []
    parts += [f"twin of sample {replaced}"] if replaced >= 0 else []
    return ", ".join(parts)


def worst_first(found: Assumption) -> tuple:
    """Sort key: violated before undecided before holds, then the smallest margin (NaN last)."""
    nan = found.margin != found.margin
    return VERDICTS.index(found.verdict), nan, 0.0 if nan else found.margin
