"""The empirical and the generalized neural tangent kernel: matrices, operators, and the memory they take."""
