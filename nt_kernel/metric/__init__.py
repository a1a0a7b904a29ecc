"""The layer metric G = D + c·JᵀMJ: masses D, output metrics M, scales c, and the solvers of its inner systems."""
