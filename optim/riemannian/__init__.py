"""Riemannian modules: manifolds, the matching rule, the metric recursion, layers of torch, differential equations."""
