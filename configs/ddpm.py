"""Denoising diffusion models: DDPM in one step, and AnoDDPM.

Paper:     Behrendt et al. 2023, "Patched diffusion models for unsupervised anomaly
           detection in brain MRI" (arXiv 2303.03758), whose baseline "DDPM" this is;
           with `anoddpm` Wyatt et al. 2022, "AnoDDPM" (CVPR Workshops)
Command:   python run.py train --config=configs/ddpm.py:WORDS \
             --config.data.store=STORE --workdir=DIR
           Words, separated by commas: `anoddpm`; `paper` for the published settings
           or `cpu` for two cores, neither for an accelerator.
           An ensemble: --config.method.scoring.test_steps="(249, 499, 749)"
Hardware:  one accelerator (its memory not yet measured); `cpu`: two cores
Time:      accelerator: not yet measured; `cpu`: 6,400 slices at 28 slices/s on two free
           cores, four minutes, and the evaluation (docs/benchmarks.md)
Expected:  `cpu`, 300 steps: docs/results_synthetic.md; docs/diffusion.md has what is
           published
"""

from configs import _diffusion, _parts
from configs._diffusion import Size
from uad_jax import config as config_lib
from uad_jax import denoising_config, optim
from uad_jax.methods import ddpm
from uad_jax.ops import diffusion, losses, noise, residuals

ANODDPM_SLICES = 300_000  # 3000 epochs of 100 slices


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    words = _parts.parse(arg, ("anoddpm", "paper", "cpu")).words
    size = _diffusion.size(words)
    if "anoddpm" in words:
        return _anoddpm(size)
    method = ddpm.DdpmConfig(
        process=denoising_config.ProcessConfig(shared_noise=size is Size.PAPER),
        scoring=_diffusion.scoring(size),
        **_diffusion.training(size),
    )
    if size is Size.PAPER:
        method.unet.film = False  # the baseline's network; that of pDDPM has it
    return _diffusion.experiment("ddpm", method, size, volumes=8)


def _anoddpm(size: Size) -> config_lib.ExperimentConfig:
    """Noise to t = 249 and the whole way back with 3-D simplex noise.

    On two cores 10 deterministic steps replace the 250 random ones.
    """
    method = ddpm.DdpmConfig(
        process=denoising_config.ProcessConfig(
            schedule=denoising_config.NoiseSchedule.LINEAR,
            prediction=diffusion.Prediction.EPS,
            pixel_loss=losses.PixelLoss.L2,
            noise=noise.Noise.SIMPLEX_3D,
            train_steps=800,
        ),
        scoring=_diffusion.scoring(
            size, test_steps=(249,), residual=residuals.Residual.SQUARED
        ),
        way=ddpm.Way.CHAIN,
        sampler=diffusion.Sampler.DDPM_BETA,
        clip=True,
        **_diffusion.training(size),
    )
    config = _diffusion.experiment(
        "anoddpm", method, size, volumes=1, reference_slices=ANODDPM_SLICES
    )
    if size is Size.CPU:
        method.sampler, method.chain_calls = diffusion.Sampler.DDIM, 10
    if size is Size.PAPER:
        method.unet = denoising_config.UNetConfig(
            multipliers=(1, 1, 2, 2, 4, 4),
            num_blocks=2,
            attention_levels=(3, 4, 5),  # 32, 16 and 8 pixels of the published 256
            num_heads=2,
            film=False,
        )
        method.ema_decay = 0.9999
        method.optimizer = optim.OptimizerConfig(learning_rate=1e-4, clip_norm=1.0)
        config.train = config_lib.TrainConfig(
            steps_per_call=100, log_every=1000, eval_every=5000, save_every=5000
        )
        method.scoring.chunk = 16
        config.batch_size, config.total_steps = 1, ANODDPM_SLICES
    return config
