"""Contraction metrics by semidefinite programs, certified apart from the solver; composition; bound-optimal masses."""
