"""The types of config keys that several kinds of study share."""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

# A module of the user's own and a name in it: "package.module:factory".
IMPORTABLE = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"


def distinct(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("should not name a value twice")
    return values


def positive_or_auto(value: Any) -> float | str:
    if value == "auto" or (isinstance(value, int | float) and 0 < value < math.inf):
        return value if value == "auto" else float(value)
    raise ValueError('should be a positive number or "auto"')


def count_or_auto(value: Any) -> int | str:
    if value == "auto" or (isinstance(value, int) and value >= 1):
        return value
    raise ValueError('should be a whole number, at least 1, or "auto"')


# A whole number from 1 to a million.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
# A number above 0, finite.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# A list of distinct values; `n = 6` means `n = [6]`.
one_or_more = (
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    Field(min_length=1),
    AfterValidator(distinct),
)


class Table(BaseModel):
    """A table of a study file: no keys that nobody knows, and no true or false where a number is meant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        if cls.model_fields[info.field_name].annotation is bool:
            return value
        if any(isinstance(item, bool) for item in (value if isinstance(value, list) else [value])):
            raise ValueError("should not be true or false")  # Python would read them as 1 and 0
        return value
