"""Evaluates anomaly maps that another tool made, exactly like our own."""

import dataclasses
import pathlib
from typing import Any

import jax
from absl import logging

from uad_jax import calibrating, evaluate, evaluation, maps, train
from uad_jax import mesh as mesh_lib
from uad_jax.config import EvaluationConfig, EvaluationSet
from uad_jax.data.config import DataConfig
from uad_jax.data.examine import Reading
from uad_jax.data.sources import Store


def evaluate_maps(
    folder: pathlib.Path,
    store: pathlib.Path,
    workdir: pathlib.Path,
    *,
    name: str = "",
    modality: str = "",
    set_name: str = evaluation.DEFAULT_SET,
    evaluation_set: EvaluationSet | None = None,
    settings: EvaluationConfig | None = None,
    reading: Reading | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Evaluates a folder of NIfTI maps on the test scans of a store.

    Thresholds come from the maps of the store's validation scans; without any, only
    figures that need no threshold are given, and the ceiling.

    Args:
      folder: The maps, named after the subjects (`maps.find`).
      store: Prepared scans that the maps are of.
      workdir: Gets what `evaluate.evaluate` writes.
      name: For tables; "" = that of the folder.
      modality: Of the intensity baselines; "" = the store's first.
      set_name: What the results are called.
      evaluation_set: Split, protocol and rule; the store is the above.
      settings: Rates and resamplings.
      reading: How the maps are read.
      mesh: Devices; None = all.
      progress: Whether to show progress bars.

    Returns:
      Set name -> results, as in the JSON file (where NaN is null).

    Raises:
      ValueError: Lists every map that is missing or cannot be used.
    """
    evaluation.refuse_several_processes()
    if (workdir / "config.json").exists() or (workdir / train.CHECKPOINTS).exists():
        raise ValueError(
            f"{workdir} is the directory of a run, whose results and report would be "
            "overwritten. Give maps a --workdir of their own."
        )
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    opened = Store.open(store)
    chosen = evaluation_set or EvaluationSet()
    context = evaluation.Context(
        scorer=name or folder.resolve().name,
        name=set_name,
        evaluation_set=dataclasses.replace(chosen, store=""),
        settings=settings or EvaluationConfig(),
        data=DataConfig(store=str(store), modalities=modality or opened.modalities[0]),
        workdir=workdir,
        step=None,
        training_store=opened,
        store=opened,
        mesh=mesh,
        progress=progress,
    )
    infos = list(context.test)
    validation = calibrating.volumes(context)
    others = [info.subject for info in opened.volumes]
    there = maps.available(folder, validation, others)
    if there and len(there) < len(validation):
        lacking = sorted({x.subject for x in validation} - {x.subject for x in there})
        raise ValueError(
            f"{folder} has maps of {len(there)} of {len(validation)} validation scans, "
            "which thresholds are made from; there is none of "
            f"{', '.join(lacking[:9])}. Give all of them, or none: then there are no "
            "thresholds."
        )
    if there:
        infos += [info for info in validation if info not in infos]
    else:
        logging.warning(
            "%s has no maps of validation scans: no thresholds, only the ceiling.",
            folder,
        )
        context = dataclasses.replace(context, validation=False)
    scorer = maps.scorer(
        context.scorer,
        folder,
        opened,
        infos,
        chosen.protocol,
        mesh,
        progress=progress,
        **({} if reading is None else {"reading": reading}),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    return {context.name: evaluate.evaluate_set(context, scorer)}
