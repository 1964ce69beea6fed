"""Denoising autoencoder (DAE): remove coarse noise, without a bottleneck.

Paper:     Kascenas et al. 2022, "Denoising autoencoders for unsupervised anomaly
           detection in brain MRI" (MIDL)
Command:   python run.py train --config=configs/dae.py --config.data.store=STORE \
             --workdir=DIR
           Words: `paper` for the published settings (made for slices of 128x128 with
           four modalities), `cpu` for two cores, no word for an accelerator.
Hardware:  one accelerator; `cpu`: two cores
Time:      accelerator: not yet measured; `cpu`: 300 of its 600 steps took 5
           minutes on one core with other work
Expected:  `cpu`, 300 steps: docs/results_synthetic.md and docs/results_real.md
"""

from configs import _parts
from uad_jax import config as config_lib
from uad_jax import optim
from uad_jax.methods import base, dae

# 67,200 steps of 16: 2,100 epochs of 32 batches.
REFERENCE_SLICES = 1_075_200


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    words = _parts.parse(arg, ("paper", "cpu")).words
    if words >= {"paper", "cpu"}:
        raise ValueError("Config argument: use only one of 'paper' and 'cpu'.")
    if "paper" in words:
        return _paper()
    if "cpu" in words:
        return _cpu()
    return config_lib.ExperimentConfig(
        name="dae",
        method=dae.DaeConfig(
            precision=base.Precision.BFLOAT16,
            ema_decay=0.999,
            optimizer=optim.OptimizerConfig(
                learning_rate=5e-4,
                clip_norm=0.5,
                schedule=optim.Schedule.COSINE,
                warmup_steps=200,
            ),
        ),
        train=config_lib.TrainConfig(
            steps_per_call=10, log_every=100, eval_every=420, save_every=420
        ),
        evaluation=config_lib.EvaluationConfig(batch_size=8),
        batch_size=128,
        total_steps=8_400,
        reference_slices=REFERENCE_SLICES,
    )


def _paper() -> config_lib.ExperimentConfig:
    """The released settings: noise, Adam, batch and schedule as in the authors' code.

    They move the learning rate after every 32 steps; here it moves with each. The noise
    of a batch is shifted alike.
    """
    return config_lib.ExperimentConfig(
        name="dae_paper",
        method=dae.DaeConfig(
            shared_shift=True,
            optimizer=optim.OptimizerConfig(
                learning_rate=1e-4,
                l2=1e-5,
                clip_norm=0.5,
                amsgrad=True,
                schedule=optim.Schedule.COSINE_PERIODIC,
                half_period=3_200,
            ),
        ),
        train=config_lib.TrainConfig(eval_every=1_600, save_every=1_600),
        batch_size=16,
        total_steps=67_200,
        reference_slices=REFERENCE_SLICES,
    )


def _cpu() -> config_lib.ExperimentConfig:
    """Two cores, at most 5 minutes at 96x96: a quarter of the width."""
    return config_lib.ExperimentConfig(
        name="dae_cpu",
        method=dae.DaeConfig(
            width=16,
            ema_decay=0.99,
            optimizer=optim.OptimizerConfig(
                learning_rate=1e-3,
                clip_norm=0.5,
                schedule=optim.Schedule.COSINE,
                warmup_steps=50,
            ),
        ),
        train=config_lib.TrainConfig(log_every=50, eval_every=100, save_every=100),
        batch_size=16,
        total_steps=600,
        reference_slices=REFERENCE_SLICES,
    )
