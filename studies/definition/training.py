"""What the kinds of study that train networks have in common: grid of n, mass and width, data set, network, step."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, field_validator

from studies.definition.config import Grid, Study
from studies.definition.config_text import nearest
from studies.definition.fields import IMPORTABLE, Count, Positive, Table, one_or_more, positive_or_auto

Rate = Annotated[float | str, PlainValidator(positive_or_auto)]

EMBEDDED = ("digits", "wine", "breast_cancer", "diabetes", "iris", "linnerud")
DOWNLOADED = ("mnist", "cifar10", "california_housing", "covtype", "olivetti_faces")
FILES = (".npz", ".csv", ".parquet")
ACTIVATIONS = ("tanh", "softplus", "gelu", "silu", "sigmoid", "relu")
ARCHITECTURES = ("mlp", "cnn")


class TrainingGrid(Grid):
    """Every combination of ``n``, ``mass``, ``width`` and seed is a point; a point has ``replacements`` twin pairs."""

    n: Annotated[list[Count], *one_or_more]
    mass: Annotated[list[Positive], *one_or_more] = Field([1.0])
    width: Annotated[list[Count], *one_or_more] = Field([128])
    seeds: Count = 3
    replacements: Count = 4


class Data(Table):
    """Which data set, and how many of its rows are never trained on (the same rows for every point).

    ``name``: one of scikit-learn's (embedded, or downloaded where ``download`` allows it), a file (.npz with arrays x and y,
    .csv, .parquet with the ``target`` columns named), or "package.module:function" that returns (x, y) or a torch Dataset.
    """

    name: str = "digits"
    held_out: Count = 200
    target: str = ""
    inputs: Literal["auto", "standardised", "norm", "raw"] = "auto"
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    download: bool = False
    arguments: dict[str, Any] = Field({})

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in EMBEDDED + DOWNLOADED or name.endswith(FILES) or re.fullmatch(IMPORTABLE, name):
            return name
        if re.fullmatch(
            r"(load|fetch)_\w+", name
        ):  # any other of sklearn.datasets; looked up before anything is trained
            return name
        guess = nearest(name, EMBEDDED + DOWNLOADED)
        raise ValueError(
            f"should be one of {', '.join(EMBEDDED + DOWNLOADED)}, a loader or fetcher of sklearn.datasets by its name, a "
            f"file ({', '.join(FILES)}), or package.module:function" + (f", did you mean {guess}?" if guess else "")
        )


class Model(Table):
    """``architecture``: "mlp", fully connected, inputs - width - … - width - outputs with ``hidden`` layers of that width;
    "cnn", ``hidden`` convolutions of ``width`` channels; or "package.module:factory", called with what it asks for."""

    architecture: str = "mlp"
    hidden: Annotated[int, Field(ge=0, le=100)] = 2
    activation: Literal["tanh", "softplus", "gelu", "silu", "sigmoid", "relu"] = "tanh"
    arguments: dict[str, Any] = Field({})

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in ARCHITECTURES or re.fullmatch(IMPORTABLE, name):
            return name
        guess = nearest(name, ARCHITECTURES)
        raise ValueError(
            f"should be one of {', '.join(ARCHITECTURES)}, or package.module:factory"
            + (f", did you mean {guess}?" if guess else "")
        )


class TrainingStudy(Study):
    """A study whose points train networks on n samples; see ``digits.toml`` for what each key means."""

    AXES: ClassVar[tuple[str, ...]] = ("n", "width", "mass")

    grid: TrainingGrid
    data: Data = Data()
    model: Model = Model()

    def fixed(self) -> dict[str, Any]:
        """The replaced samples are drawn below the smallest n; a file's content counts, whatever it is called."""
        more = {"replacements": self.grid.replacements, "replaced below": min(self.grid.n)}
        if self.data.name.endswith(FILES):
            from studies.definition.digest import digest

            more["file"] = digest(self.data.name)
        return super().fixed() | more

    def describe_size(self) -> str:
        points = len(self.points())
        return f"{points} points, {points * self.grid.replacements} twin pairs"
