"""Regression tests on the assumptions: baselines in TOML, what the fixture does, the page of a test run. No torch here."""
