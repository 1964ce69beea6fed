"""VAE for the embedded synthetic cohort: what `run.py demo` trains.

Paper:     Baur et al. 2021 (the network); the settings are ours
Command:   python run.py demo [--quick]
Hardware:  two CPU cores
Time:      193 s in all with a cold cache, of which 110 s of training
Expected:  AP pooled .227 on the demo's 21 synthetic lesion volumes (raw intensity .200,
           equalised intensity .347), seed 0
"""

from configs import _parts
from configs import autoencoder as published
from uad_jax import config as config_lib
from uad_jax import optim
from uad_jax.methods import autoencoder


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` may be "quick". The demo fills in the store."""
    quick = "quick" in _parts.parse(arg, ("quick",)).words
    steps = 100 if quick else 720
    return config_lib.ExperimentConfig(
        name="demo_quick" if quick else "demo",
        method=autoencoder.AutoencoderConfig(
            variant=autoencoder.Variant.VAE,
            dropout=0.0,
            ema_decay=0.98,
            optimizer=optim.OptimizerConfig(
                learning_rate=1e-3,
                schedule=optim.Schedule.COSINE,
                warmup_steps=20,
            ),
        ),
        train=config_lib.TrainConfig(
            log_every=20,
            eval_every=steps // 5,
            save_every=steps // 5,
            validation_slices=128,
        ),
        batch_size=16,
        total_steps=steps,
        reference_slices=published.REFERENCE_SLICES,
    )
