"""A few steps on tiny slices: for tests only.

Paper:     none
Command:   used by the tests; the store comes from the caller
Hardware:  any, seconds
Expected:  nothing; the model is far too small
"""

from configs import _parts
from uad_jax import config as config_lib
from uad_jax import optim
from uad_jax.methods import autoencoder


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` may be "variant=ae|ae_spatial|vae|vae_spatial"."""
    given = _parts.parse(arg, keys={"variant": autoencoder.Variant}).values
    return config_lib.ExperimentConfig(
        name="smoke",
        method=autoencoder.AutoencoderConfig(
            variant=given.get("variant", autoencoder.Variant.VAE),
            latent_size=8,
            width=8,
            max_width=16,
            ema_decay=0.9,
            optimizer=optim.OptimizerConfig(learning_rate=1e-3, clip_norm=100.0),
        ),
        train=config_lib.TrainConfig(
            log_every=2, eval_every=4, save_every=4, validation_slices=16
        ),
        evaluation=config_lib.EvaluationConfig(bootstrap_samples=20),
        batch_size=8,
        total_steps=8,
    )
