"""kronfluence (Grosse et al., arXiv 2308.03296; pomonam/kronfluence) asked for effects on outputs instead of losses."""

from copy import deepcopy
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn


def output_effects(model: nn.Module, x: Tensor, inputs: Tensor, targets: Tensor, *, damping: float) -> Tensor:
    """∇y_c(x_i)ᵀ(F + λI)⁻¹∇ℓ_j by EK-FAC for every sample j and every output c of every x_i, [samples, n, p].

    F is fitted on the first n samples, S, with targets drawn from the model (ℓ = ½‖y − a‖²: y plus a standard normal
    vector), which is the Gauss–Newton matrix. Runs in the model's type. Raises ImportError where kronfluence is not installed.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Outputs(Task):
        def compute_train_loss(self, batch, model, sample=False):
            y = model(batch[0])
            a = y.detach() + torch.randn_like(y) if sample else batch[1]
            return 0.5 * (y - a).square().sum()

        def compute_measurement(self, batch, model):
            return (model(batch[0]) * batch[1]).sum()  # batch[1] picks an output

    n, p = len(x), targets.shape[1]
    picks = torch.eye(p, dtype=x.dtype).repeat(n, 1)
    queries = TensorDataset(x.repeat_interleave(p, 0), picks)
    dtype = x.dtype
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), TemporaryDirectory() as folder:
        torch.manual_seed(0)
        task = Outputs()
        analyzer = Analyzer(
            "outputs",
            prepare_model(deepcopy(model), task),
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=folder,
            log_level=40,
        )
        factors = FactorArguments(
            strategy="ekfac", use_empirical_fisher=False, activation_covariance_dtype=dtype,
            gradient_covariance_dtype=dtype, per_sample_gradient_dtype=dtype, lambda_dtype=dtype,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "factors", TensorDataset(inputs[:n], targets[:n]), per_device_batch_size=n, factor_args=factors
        )
        scores = ScoreArguments(
            damping_factor=damping, score_dtype=dtype, per_sample_gradient_dtype=dtype, precondition_dtype=dtype
        )
        analyzer.compute_pairwise_scores(
            "scores", "factors", queries, TensorDataset(inputs, targets), per_device_query_batch_size=n * p,
            per_device_train_batch_size=len(inputs), score_args=scores,
        )  # fmt: skip
        found = analyzer.load_pairwise_scores("scores")["all_modules"]  # [n·p, samples]
    return found.T.unflatten(1, (n, p)).to(dtype)
