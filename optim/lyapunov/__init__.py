"""Parts of the Riemannian Lyapunov optimizers: memories and directions, retractions and transport."""
