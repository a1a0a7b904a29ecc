"""What a Woodbury step can be given: parameter groups, masses, damping, a trust region, diagnostics."""
