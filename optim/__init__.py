"""Steps and flows: the Woodbury optimizer, stacked networks, Riemannian modules, gradient flow in continuous time."""

from nt_kernel.house import check_not_shadowed, lazy_names

check_not_shadowed(__file__, ["nt_kernel"])

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Woodbury": "optim.woodbury",
        "woodbury_direction": "optim.direction",
        "woodbury_step": "optim.direction",
        "SecondMomentMass": "optim.second_moment",
        "LevenbergMarquardt": "optim.damping",
        "StepDiagnostics": "optim.diagnostics",
        "Update": "optim.update",
        "StepTooLargeError": "optim.step_limit",
        # Riemannian Lyapunov optimizers
        "NaimMonitor": "optim.naim",
        "RLO": "optim.rlo",
        "RLOLambda": "optim.rlo",
        "RLOLifted": "optim.rlo",
        # minimizing movements
        "ConvexEnergy": "optim.movements.energy",
        "FirstOrder": "optim.movements.first_order",
        "GaussNewton": "optim.movements.gauss_newton",
        "QuadraticEnergy": "optim.movements.energy",
        "SquaredEnergy": "optim.movements.energy",
        "chain_weights": "optim.movements.energy",
        "dirichlet_energy": "optim.movements.energy",
        "minimizing_movements": "optim.minimizing_movement",
        # stacked networks
        "StackedState": "optim.stacked",
        "WoodburyStep": "optim.stacked_woodbury",
        "adam": "optim.first_order",
        "gradient_descent": "optim.first_order",
        "index_stream": "optim.mini_batches",
        "stack_parameters": "optim.stacked",
        "stacked_gradients": "optim.stacked",
        "stacked_step": "optim.stacked",
        "twin_batch": "optim.mini_batches",
        # Riemannian modules
        "Manifold": "optim.manifold",
        "RiemannianModule": "optim.riemannian_module",
        "metric_factors": "optim.module_step",
        "ode_module": "optim.ode",
        "positive": "optim.manifold",
        "product": "optim.manifold",
        "riemannian_direction": "optim.module_step",
        "riemannian_step": "optim.module_step",
        # continuous time
        "MetricFlow": "optim.flow",
        "gradient_flow": "optim.flow",
        "metric_flow": "optim.flow",
        "solve_flow": "optim.flow",
    },
)
