"""Steps and flows: the Woodbury optimizer, stacked networks, Riemannian modules, gradient flow in continuous time."""

from nt_kernel.house import check_not_shadowed, lazy_names

check_not_shadowed(__file__, ["nt_kernel"])

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Woodbury": "optim.woodbury",
        "woodbury_direction": "optim.steps.direction",
        "woodbury_step": "optim.steps.direction",
        "SecondMomentMass": "optim.options.second_moment",
        "LevenbergMarquardt": "optim.options.damping",
        "StepDiagnostics": "optim.options.diagnostics",
        "Update": "optim.steps.update",
        "StepTooLargeError": "optim.steps.step_limit",
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
        "StackedState": "optim.stacks.stacked",
        "WoodburyStep": "optim.stacks.stacked_woodbury",
        "adam": "optim.stacks.first_order",
        "gradient_descent": "optim.stacks.first_order",
        "index_stream": "optim.stacks.mini_batches",
        "stack_parameters": "optim.stacks.stacked",
        "stacked_gradients": "optim.stacks.stacked",
        "stacked_step": "optim.stacks.stacked",
        "twin_batch": "optim.stacks.mini_batches",
        # Riemannian modules
        "Manifold": "optim.riemannian.manifold",
        "RiemannianModule": "optim.riemannian.riemannian_module",
        "metric_factors": "optim.riemannian.module_step",
        "ode_module": "optim.riemannian.ode",
        "positive": "optim.riemannian.manifold",
        "product": "optim.riemannian.manifold",
        "riemannian_direction": "optim.riemannian.module_step",
        "riemannian_step": "optim.riemannian.module_step",
        # continuous time
        "MetricFlow": "optim.flow",
        "gradient_flow": "optim.flow",
        "metric_flow": "optim.flow",
        "solve_flow": "optim.flow",
    },
)
