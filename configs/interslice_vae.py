"""Inter-slice VAE: slices know their neighbours; after Behrendt et al. 2022.

Paper:     Behrendt et al. 2022, "Capturing inter-slice dependencies of 3D brain
           MRI-scans for unsupervised anomaly detection" (MIDL short paper). No code was
           published, and only the idea is known: a VAE per slice, with recurrent
           networks or attention between slices, about as large as without. Every
           number here is our proposal, in `paper` too (docs/interslice.md).
Command:   python run.py train --config=configs/interslice_vae.py:mixer=gru \
             --config.data.store=STORE --workdir=DIR
           mixer = none | gru | lstm | convgru | transformer; layers = 1 | 2 | ...;
           words: `paper` for whole volumes (of 50 slices, the recipe "behrendt"),
           `cpu` for two cores, no word for an accelerator. `mixer=none` is the VAE of
           configs/autoencoder.py on the same slabs: the control. Other scores:
           docs/scores.md.
Hardware:  one accelerator; `cpu`: two cores
Time:      accelerator: not yet measured; `cpu`: 300 of its 1,600 steps took 2 to 3
           minutes on one core with other work
Expected:  `cpu`, 300 steps: docs/results_synthetic.md and docs/results_real.md
"""

from configs import _parts
from uad_jax import config as config_lib
from uad_jax import interslice_config, optim
from uad_jax.methods import base, interslice
from uad_jax.nn.sequence import Mixer
from uad_jax.ops import losses

# 1600 epochs of 12 batches of 32, the budget Behrendt et al. 2023 give their VAE.
REFERENCE_SLICES = 614_400


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    given = _parts.parse(arg, ("paper", "cpu"), {"mixer": Mixer, "layers": int})
    if given.words >= {"paper", "cpu"}:
        raise ValueError("Config argument: use only one of 'paper' and 'cpu'.")
    mixer = interslice_config.MixerConfig(
        kind=given.values.get("mixer", Mixer.GRU),
        num_layers=given.values.get("layers", 1),
    )
    if "paper" in given.words:
        return _paper(mixer)
    if "cpu" in given.words:
        return _cpu(mixer)
    return config_lib.ExperimentConfig(
        name=f"interslice_{mixer.kind.value}",
        method=interslice.InterSliceConfig(
            slabs=interslice_config.SlabConfig(num_slices=32, overlap=16),
            mixer=mixer,
            precision=base.Precision.BFLOAT16,
            ema_decay=0.999,
            optimizer=optim.OptimizerConfig(
                learning_rate=5e-4,
                schedule=optim.Schedule.COSINE,
                warmup_steps=200,
            ),
        ),
        train=config_lib.TrainConfig(
            steps_per_call=10, log_every=100, eval_every=1000, save_every=1000
        ),
        evaluation=config_lib.EvaluationConfig(batch_size=8),
        batch_size=8,  # slabs: 256 slices
        total_steps=20_000,
        reference_slices=REFERENCE_SLICES,
    )


def _paper(mixer: interslice_config.MixerConfig) -> config_lib.ExperimentConfig:
    """Whole volumes, mean errors, and the KL weight of the later pDDPM paper's VAE."""
    return config_lib.ExperimentConfig(
        name=f"interslice_{mixer.kind.value}_paper",
        method=interslice.InterSliceConfig(
            slabs=interslice_config.SlabConfig(num_slices=50),
            mixer=mixer,
            dropout=0.0,
            reduction=losses.Reduction.MEAN,
            kl_weight=1e-3,
            optimizer=optim.OptimizerConfig(learning_rate=1e-4),
        ),
        train=config_lib.TrainConfig(
            steps_per_call=10, log_every=100, eval_every=500, save_every=500
        ),
        evaluation=config_lib.EvaluationConfig(batch_size=8),
        batch_size=4,  # volumes: 200 slices
        total_steps=20_000,
        reference_slices=REFERENCE_SLICES,
    )


def _cpu(mixer: interslice_config.MixerConfig) -> config_lib.ExperimentConfig:
    """Two cores, at most 5 minutes at 96x96: 16 slices per step like all methods."""
    return config_lib.ExperimentConfig(
        name=f"interslice_{mixer.kind.value}_cpu",
        method=interslice.InterSliceConfig(
            slabs=interslice_config.SlabConfig(num_slices=8, overlap=4),
            mixer=mixer,
            ema_decay=0.99,
            optimizer=optim.OptimizerConfig(
                learning_rate=1e-3,
                schedule=optim.Schedule.COSINE,
                warmup_steps=50,
            ),
        ),
        train=config_lib.TrainConfig(log_every=50, eval_every=160, save_every=160),
        batch_size=2,  # slabs: 16 slices
        total_steps=1600,
        reference_slices=REFERENCE_SLICES,
    )
