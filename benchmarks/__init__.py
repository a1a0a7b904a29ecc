"""Speed against peers, as ratios within one interleaved run: ``python -m benchmarks`` (or ``make bench``)."""
