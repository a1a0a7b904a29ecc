"""Extremal eigenvalues with intervals, bounds that hold in floating point, condition and effective rank."""
