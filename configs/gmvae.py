"""Gaussian-mixture VAE, dense or spatial.

Paper:     You et al. 2019, "Unsupervised lesion detection via image restoration with a
           normative prior" (MIDL); Baur et al. 2021, "Autoencoders for unsupervised
           anomaly segmentation in brain MR images: a comparative study"
           (arXiv 2004.03271), whose network and settings these are
Command:   python run.py train --config=configs/gmvae.py --workdir=DIR \
             --config.data.store=STORE
           Words: `spatial` for a code at every site of the feature map; `paper` for
           the settings of the study's released code, its faults included (slices of
           128x128; scored by its restoration of 3 steps, spatial 150), `cpu` for two
           cores, neither for an accelerator. Other scores: docs/scores.md.
Hardware:  one accelerator; `cpu`: two cores
Time:      accelerator: not yet measured; `cpu`: 300 of its 1,600 steps took 2 minutes
           on one core with other work
Expected:  `cpu`, 300 steps: docs/results_synthetic.md
"""

from typing import Any

from configs import _parts
from uad_jax import anomaly_score_config, optim
from uad_jax import config as config_lib
from uad_jax.compat import Compat
from uad_jax.methods import base, gmvae
from uad_jax.ops import residuals

# As many as the autoencoders see, see configs/autoencoder.py.
REFERENCE_SLICES = 614_400


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    words = _parts.parse(arg, ("paper", "cpu", "spatial")).words
    if words >= {"paper", "cpu"}:
        raise ValueError("Config argument: use only one of 'paper' and 'cpu'.")
    form: dict[str, Any] = {}
    name = "gmvae"
    if "spatial" in words:
        form = {"spatial": True, "latent_size": 1, "prior_width": 64}
        name = "gmvae_spatial"
    if "paper" in words:
        return _paper(name, form)
    if "cpu" in words:
        return _cpu(name, form)
    return config_lib.ExperimentConfig(
        name=name,
        method=gmvae.GmvaeConfig(
            precision=base.Precision.BFLOAT16,
            ema_decay=0.999,
            optimizer=optim.OptimizerConfig(
                learning_rate=5e-4,
                schedule=optim.Schedule.COSINE,
                warmup_steps=200,
            ),
            **form,
        ),
        train=config_lib.TrainConfig(
            steps_per_call=10, log_every=100, eval_every=1000, save_every=1000
        ),
        evaluation=config_lib.EvaluationConfig(batch_size=8),
        batch_size=256,
        total_steps=20_000,
        reference_slices=REFERENCE_SLICES,
    )


def _paper(name: str, form: dict[str, Any]) -> config_lib.ExperimentConfig:
    """The released settings; the restoration draws the code anew at every step.

    They stop after 5 epochs without a better validation loss; here the run has a fixed
    length with the patience in validations. The weight of the total variation, which
    that code searches on healthy scans, is the one it names.
    """
    restoration = anomaly_score_config.denner()
    restoration.num_steps = 150 if form else 3
    return config_lib.ExperimentConfig(
        name=f"{name}_paper",
        method=gmvae.GmvaeConfig(
            intermediate_resolution=8,
            compat=Compat.DENNER,
            residual=residuals.Residual.POSITIVE,
            sample_at_test=True,
            score=anomaly_score_config.ScoreConfig(
                kind=anomaly_score_config.Score.RESTORATION, restoration=restoration
            ),
            optimizer=optim.OptimizerConfig(learning_rate=5e-5, b1=0.5),
            **form,
        ),
        train=config_lib.TrainConfig(eval_every=1000, save_every=1000, patience=5),
        batch_size=8,
        total_steps=100_000,
    )


def _cpu(name: str, form: dict[str, Any]) -> config_lib.ExperimentConfig:
    """Two cores, at most 5 minutes at 96x96."""
    return config_lib.ExperimentConfig(
        name=f"{name}_cpu",
        method=gmvae.GmvaeConfig(
            ema_decay=0.99,
            optimizer=optim.OptimizerConfig(
                learning_rate=1e-3, schedule=optim.Schedule.COSINE, warmup_steps=50
            ),
            **form,
        ),
        train=config_lib.TrainConfig(log_every=50, eval_every=160, save_every=160),
        batch_size=16,
        total_steps=1600,
        reference_slices=REFERENCE_SLICES,
    )
