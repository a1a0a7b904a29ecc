"""Predictions of every twin from one run: kernel and parameter path, conformal coverage, the uniform estimate."""
