"""Context encoder (CE) and context-encoding VAE (ceVAE).

Paper:     Zimmerer et al. 2018, "Context-encoding variational autoencoder for
           unsupervised anomaly detection" (arXiv 1812.05941); Baur et al. 2021,
           "Autoencoders for unsupervised anomaly segmentation in brain MR images: a
           comparative study" (arXiv 2004.03271)
Command:   python run.py train --config=configs/context.py:variant=cevae \
             --config.data.store=STORE --workdir=DIR
           variant = ce | cevae. Words: `paper` for the settings of the comparative
           study's code, its faults included (needs slices of 128x128), `cpu` for two
           cores, no word for an accelerator.
Hardware:  one accelerator; `cpu`: two cores
Time:      accelerator: not yet measured; `cpu`: 300 steps took 2 minutes (ce, of 1,600)
           and 7 (cevae, of 800) on one core with other work
Expected:  `cpu`, 300 steps: docs/results_synthetic.md
"""

from configs import _parts
from uad_jax import config as config_lib
from uad_jax import optim
from uad_jax.anomaly_score_config import (
    Gradient,
    GradientConfig,
    GradientScale,
    Score,
    ScoreConfig,
)
from uad_jax.compat import Compat
from uad_jax.methods import base, context
from uad_jax.methods.context import Variant
from uad_jax.ops import residuals

# As many as the autoencoders see, see configs/autoencoder.py.
REFERENCE_SLICES = 614_400


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    given = _parts.parse(arg, ("paper", "cpu"), {"variant": Variant})
    variant = given.values.get("variant", Variant.CEVAE)
    if given.words >= {"paper", "cpu"}:
        raise ValueError("Config argument: use only one of 'paper' and 'cpu'.")
    if "paper" in given.words:
        return _paper(variant)
    if "cpu" in given.words:
        return _cpu(variant)
    return config_lib.ExperimentConfig(
        name=variant.value,
        method=context.ContextConfig(
            variant=variant,
            score=_score(variant),
            precision=base.Precision.BFLOAT16,
            ema_decay=0.999,
            optimizer=optim.OptimizerConfig(
                learning_rate=5e-4,
                schedule=optim.Schedule.COSINE,
                warmup_steps=200,
            ),
        ),
        train=config_lib.TrainConfig(
            steps_per_call=10, log_every=100, eval_every=240, save_every=240
        ),
        evaluation=config_lib.EvaluationConfig(batch_size=8),
        batch_size=256,
        total_steps=2_400,
        reference_slices=REFERENCE_SLICES,
    )


def _score(variant: Variant) -> ScoreConfig:
    """The residual for a CE; for a ceVAE times the gradient of its KL divergence."""
    return ScoreConfig() if variant is Variant.CE else context.combined_score()


def _paper(variant: Variant) -> config_lib.ExperimentConfig:
    """The settings of the comparative study's code, faults included.

    Its score differentiates the whole loss of the VAE, of one sample, and neither
    scales nor blurs the gradient. It stops after 5 epochs without a better validation
    loss; here the run has a fixed length with the patience in validations.
    """
    score = ScoreConfig()
    if variant is Variant.CEVAE:
        gradient = GradientConfig(
            of=Gradient.ELBO,
            times_residual=True,
            scale=GradientScale.NONE,
            smoothing=0,
            samples=1,
        )
        score = ScoreConfig(kind=Score.GRADIENT, gradient=gradient)
    # Its map of a ceVAE is never negative.
    absolute = variant is Variant.CEVAE
    residual = residuals.Residual.ABS if absolute else residuals.Residual.POSITIVE
    rate = 1e-3 if variant is Variant.CE else 1e-4
    return config_lib.ExperimentConfig(
        name=f"{variant.value}_paper",
        method=context.ContextConfig(
            variant=variant,
            intermediate_resolution=8,
            compat=Compat.DENNER,
            score=score,
            residual=residual,
            sample_at_test=variant is Variant.CEVAE,
            optimizer=optim.OptimizerConfig(learning_rate=rate, b1=0.5),
        ),
        train=config_lib.TrainConfig(eval_every=1000, save_every=1000, patience=5),
        batch_size=8,
        total_steps=100_000,
    )


def _cpu(variant: Variant) -> config_lib.ExperimentConfig:
    """Two cores, at most 5 minutes at 96x96: a ceVAE computes every slice twice."""
    steps = 1600 if variant is Variant.CE else 800
    return config_lib.ExperimentConfig(
        name=f"{variant.value}_cpu",
        method=context.ContextConfig(
            variant=variant,
            score=_score(variant),
            ema_decay=0.99,
            optimizer=optim.OptimizerConfig(
                learning_rate=1e-3,
                schedule=optim.Schedule.COSINE,
                warmup_steps=50,
            ),
        ),
        train=config_lib.TrainConfig(log_every=50, eval_every=160, save_every=160),
        batch_size=16,
        total_steps=steps,
        reference_slices=REFERENCE_SLICES,
    )
