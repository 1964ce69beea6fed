"""Conditioned denoising diffusion model (cDDPM).

Paper:     Behrendt et al. 2023, "Guided reconstruction with conditioned diffusion
           models for unsupervised anomaly detection in brain MRIs" (arXiv 2312.04215)
Command:   python run.py train --config=configs/cddpm.py:WORDS \
             --config.data.store=STORE --workdir=DIR
           Words, separated by commas: `paper` for the published settings or `cpu` for
           two cores, neither for an accelerator; `encoder=WORKDIR` starts the encoder
           from a run of configs/spark.py with the same size.
Hardware:  one accelerator (its memory not yet measured); `cpu`: two cores
Time:      accelerator: not yet measured; `cpu`: 300 steps took 5 to 11 minutes on two
           cores with other work
Expected:  `cpu`, 300 steps from SparK: docs/results_synthetic.md; docs/diffusion.md has
           what is published
"""

import dataclasses

from configs import _diffusion, _parts
from configs._diffusion import Size
from uad_jax import config as config_lib
from uad_jax import denoising_config
from uad_jax.methods import base, cddpm


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    parsed = _parts.parse(arg, ("paper", "cpu"), {"encoder": str})
    size = _diffusion.size(parsed.words)
    method = cddpm.CddpmConfig(
        process=denoising_config.ProcessConfig(shared_noise=size is Size.PAPER),
        scoring=_diffusion.scoring(size, test_steps=(249, 499, 749)),
        **_diffusion.training(size),
    )
    method.ema_decay = 0.0  # averages would run with the live batch statistics
    method.encoder = dataclasses.replace(method.encoder, **_diffusion.backbone(size))
    if size is Size.CPU:
        method.encoder.features = 4 * method.unet.width  # as in the published model
    if size is Size.PAPER:
        method.precision = base.Precision.BFLOAT16  # published: float16
    config = _diffusion.experiment(
        "cddpm", method, size, 4, _diffusion.CONDITIONED_SLICES
    )
    if "encoder" in parsed.values:
        config.train.warm_start.append(
            config_lib.WarmStart(
                workdir=parsed.values["encoder"],
                source_prefix="spark/backbone",
                target_prefix="encoder/backbone",
            )
        )
    return config
