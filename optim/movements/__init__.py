"""The parts of a minimizing movement: energies, exact proximal points, inner solvers, bounds, the result."""
