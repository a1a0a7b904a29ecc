"""The output metric of a study of loops: one of the kernel's by name, or the user's own by the place where it is."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from studies.definition.imported import imported

if TYPE_CHECKING:
    from nt_kernel.metric.output_metric import OutputMetric


def own_metric(name: str) -> "str | OutputMetric | Callable":
    """What "package.module:NAME" names; any other name as it is, for ``nt_kernel`` to know.

    Raises ValueError when there is no such thing.

    >>> own_metric("identity"), own_metric("nt_kernel.metric.output_metric:softmax_factor").__name__
    ('identity', 'softmax_factor')
    """
    return imported(name, "output_metric") if ":" in name else name
