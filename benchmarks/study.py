r"""Trains and evaluates methods of two cores over modalities and seeds.

    python benchmarks/study.py --root=runs/study                          # synthetic
    python benchmarks/study.py --root=runs/ixi --source=MANIFEST.csv \
        --sets=mslub=MSLUB_MANIFEST.csv,tcga=TCGA_MANIFEST.csv    # real scans

All train with the same number of steps of 16 slices, and so see as many, none of them
augmented. `cddpm_spark` needs `spark` before it in the list, and `fanogan` needs
`fanogan_gan`: these see as many slices again and have nothing to evaluate.
`vae_restored` needs `vae`: it is its run, scored by ten steps of the restoration.
Finished runs are skipped, so that it can be stopped and started again. Afterwards
`docs/render_results.py` collects the results and renders the tables.
"""

import importlib
import pathlib
import sys

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from uad_jax import config as config_lib
from uad_jax import evaluate, prepare, rescoring, runtime, train
from uad_jax.anomaly_score_config import Score
from uad_jax.baseline_scorers import BaselineMemory
from uad_jax.config import EvaluationSet
from uad_jax.data import cohort
from uad_jax.methods import autoencoder, cddpm, fanogan, spark
from uad_jax.ops import augment

_ROOT = flags.DEFINE_string("root", "runs/study", "Directory of cohort, store, runs.")
_SOURCE = flags.DEFINE_string("source", "", "Manifest of real scans; else synthetic.")
_SETS = flags.DEFINE_list("sets", [], "NAME=MANIFEST of further scans to test on.")
_MODALITIES = flags.DEFINE_list("modalities", ["flair", "t2", "t1"], "Modalities.")
_METHODS = flags.DEFINE_list("methods", ["vae", "ae", "ddpm", "pddpm"], "Methods.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
_STEPS = flags.DEFINE_integer("steps", 300, "Optimiser steps of 16 slices.")

# Name -> config file and argument.
CONFIGS = {
    "ae": ("autoencoder", "variant=ae,cpu"),
    "ae_spatial": ("autoencoder", "variant=ae_spatial,cpu"),
    "vae": ("autoencoder", "variant=vae,cpu"),
    "vae_spatial": ("autoencoder", "variant=vae_spatial,cpu"),
    "vae_restored": ("autoencoder", "variant=vae,cpu"),  # the run of vae with its seed
    "anovaegan": ("anovaegan", "cpu"),
    "anovaegan_spatial": ("anovaegan", "bottleneck=spatial,cpu"),
    "aegan": ("anovaegan", "variant=aegan,cpu"),
    "aae": ("aae", "cpu"),
    "constrained_aae": ("aae", "variant=constrained_aae,cpu"),
    "constrained_ae": ("aae", "variant=constrained_ae,cpu"),
    "gmvae": ("gmvae", "cpu"),
    "gmvae_spatial": ("gmvae", "spatial,cpu"),
    "fanogan_gan": ("fanogan", "stage=gan,cpu"),
    "fanogan": ("fanogan", "stage=encoder,cpu"),  # starts from the run of fanogan_gan
    "ddpm": ("ddpm", "cpu"),
    "pddpm": ("pddpm", "cpu"),
    "spark": ("spark", "cpu"),
    "cddpm": ("cddpm", "cpu"),
    "cddpm_spark": ("cddpm", "cpu"),  # starts from the run of spark with its seed
    "ce": ("context", "variant=ce,cpu"),
    "cevae": ("context", "variant=cevae,cpu"),
    "dae": ("dae", "cpu"),
    "anoddpm": ("ddpm", "anoddpm,cpu"),
    "interslice_none": ("interslice_vae", "mixer=none,cpu"),
    "interslice_gru": ("interslice_vae", "mixer=gru,cpu"),
    "interslice_lstm": ("interslice_vae", "mixer=lstm,cpu"),
    "interslice_convgru": ("interslice_vae", "mixer=convgru,cpu"),
    "interslice_transformer": ("interslice_vae", "mixer=transformer,cpu"),
}
# Fixed before the first model was trained on it.
COHORT = cohort.CohortConfig(
    seed=0,
    train=60,
    val_healthy=8,
    val_per_kind=3,
    test_healthy=8,
    test_per_kind=8,
)


def main(argv: list[str]) -> None:
    """Runs what is not finished."""
    del argv
    runtime.log_ours_only()
    runtime.setup()
    root = pathlib.Path(_ROOT.value)
    source = _SOURCE.value or str(cohort.write_cohort(COHORT, root / "cohort"))
    prepare.prepare(source, root / "store", "grid2mm")
    for name, manifest in _sets().items():
        prepare.prepare(manifest, root / name, "grid2mm")
    memory = BaselineMemory()
    for seed in map(int, _SEEDS.value):
        for modality in _MODALITIES.value:
            for name in _METHODS.value:
                _run(root, modality, name, seed, memory)


def _sets() -> dict[str, str]:
    return dict(one.split("=", 1) for one in _SETS.value)


def _run(
    root: pathlib.Path, modality: str, name: str, seed: int, memory: BaselineMemory
) -> None:
    workdir = root / f"{modality}-{name}-{seed}"
    if (workdir / "results" / "test.json").exists():
        return
    file, argument = CONFIGS[name]
    if name == "cddpm_spark":
        argument += f",encoder={root / f'{modality}-spark-{seed}'}"
    if name == "fanogan":
        argument += f",gan={root / f'{modality}-fanogan_gan-{seed}'}"
    module = importlib.import_module(f"configs.{file}")
    config: config_lib.ExperimentConfig = module.get_config(argument)
    config.name = name
    config.seed = seed
    config.total_steps = _STEPS.value
    config.train.eval_every = config.train.save_every = max(_STEPS.value // 10, 1)
    if isinstance(config.method, cddpm.CddpmConfig):
        config.method.augment = augment.none()  # as the others
    if _SOURCE.value:  # healthy scans: the validation scans are worth a row too
        config.evaluation.sets = {
            "val": EvaluationSet(split="val"),
            "test": EvaluationSet(),
        } | {other: EvaluationSet(store=str(root / other)) for other in _sets()}
    config.data.store = str(root / "store")
    config.data.modalities = modality
    config.source = f"configs/{file}.py:{argument}"
    if name == "vae_restored":
        _restore(config, root / f"{modality}-vae-{seed}", workdir, memory)
        return
    result = train.train(config, workdir, progress=False)
    if result.stopped == "preempted":
        sys.exit(train.EXIT_PREEMPTED)
    if not isinstance(config.method, spark.SparkConfig | fanogan.GanConfig):
        evaluate.evaluate(config, workdir, progress=False, memory=memory)


def _restore(
    config: config_lib.ExperimentConfig,
    trained: pathlib.Path,
    workdir: pathlib.Path,
    memory: BaselineMemory,
) -> None:
    """Scores a trained VAE by restoration; ten steps are what two cores can do."""
    method = config.method
    assert isinstance(method, autoencoder.AutoencoderConfig)
    method.score.kind = Score.RESTORATION
    method.score.restoration.num_steps = 10
    if not workdir.exists():
        rescoring.rescore(config, trained, workdir)
    config.evaluation.sets.pop("val", None)  # its thresholds take long enough
    evaluate.evaluate(config, workdir, progress=False, memory=memory)


if __name__ == "__main__":
    app.run(main)
