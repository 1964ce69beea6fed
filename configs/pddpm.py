"""Patched denoising diffusion model (pDDPM).

Paper:     Behrendt et al. 2023, "Patched diffusion models for unsupervised anomaly
           detection in brain MRI" (arXiv 2303.03758)
Command:   python run.py train --config=configs/pddpm.py:WORD \
             --config.data.store=STORE --workdir=DIR
           WORD: `paper` for the published settings (needs slices of 48 x 48 or more),
           `cpu` for two cores, none for an accelerator.
           Overlapping boxes: --config.method.patch=60 --config.method.overlap=average
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
from uad_jax import denoising_config
from uad_jax.methods import pddpm


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    size = _diffusion.size(_parts.parse(arg, ("paper", "cpu")).words)
    method = pddpm.PddpmConfig(
        process=denoising_config.ProcessConfig(shared_noise=size is Size.PAPER),
        scoring=_diffusion.scoring(size),
        **_diffusion.training(size),
    )
    return _diffusion.experiment("pddpm", method, size, volumes=2)
