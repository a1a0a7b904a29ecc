"""How a regression test fails: the assumption is violated, the constant has moved, or there is nothing to compare it with."""


class AssumptionViolated(AssertionError):
    """An assumption of the theorem does not hold (or cannot be decided, where that was asked for)."""


class ConstantMoved(AssertionError):
    """The assumption holds, but its constant is no longer what the baseline says."""


class BaselineMissing(AssertionError):
    """There is no baseline to hold the constant against."""
