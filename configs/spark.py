"""SparK pretraining of the encoder of cDDPM.

Paper:     Tian et al. 2023, "Designing BERT for convolutional networks: sparse and
           hierarchical masked modeling" (arXiv 2301.03580), with the settings of
           Behrendt et al. 2023 (arXiv 2312.04215)
Command:   python run.py train --config=configs/spark.py:WORD \
             --config.data.store=STORE --workdir=DIR
           then train configs/cddpm.py:WORD,encoder=DIR
           WORD: `paper` for the published settings, `cpu` for two cores, none for an
           accelerator. Slices need sides that are multiples of 32.
Hardware:  one accelerator; `cpu`: two cores
Time:      accelerator: not yet measured; `cpu`: 300 steps took 2 to 3 minutes on two
           cores with other work
Expected:  a falling validation loss, the squared error where nothing was seen; there
           is nothing to evaluate
"""

from configs import _diffusion, _parts
from configs._diffusion import Size
from uad_jax import config as config_lib
from uad_jax import optim
from uad_jax.methods import base, spark


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    size = _diffusion.size(_parts.parse(arg, ("paper", "cpu")).words)
    method = spark.SparkConfig(
        **_diffusion.backbone(size),
        precision=base.Precision.BFLOAT16,  # published: float16
        optimizer=optim.OptimizerConfig(learning_rate=1e-4, b2=0.95, weight_decay=0.05),
    )
    if size is not Size.PAPER:
        method.optimizer.schedule = optim.Schedule.COSINE
        method.optimizer.warmup_steps = 200
        method.optimizer.learning_rate = 4e-4  # four times the batch
        method.optimizer.clip_norm = 5.0
    if size is Size.CPU:
        method.precision = base.Precision.FLOAT32
        method.decoder_width = 128
        method.optimizer.warmup_steps = 20
        method.optimizer.learning_rate = 2e-3
    return _diffusion.experiment(
        "spark", method, size, 1, _diffusion.CONDITIONED_SLICES
    )
