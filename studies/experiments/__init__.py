"""Experiments as pure functions from settings to data frames: what the kinds of study compute, and their figures."""
