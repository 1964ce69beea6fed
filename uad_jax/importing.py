"""A run made of somebody's trained weights, to evaluate, compare and predict."""

import contextlib
import dataclasses
import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from uad_jax import checkpoint as checkpoint_lib
from uad_jax import config as config_lib
from uad_jax import denoising, programs, torch_names, train, weights
from uad_jax import mesh as mesh_lib
from uad_jax import workdir as workdir_lib
from uad_jax.config import ExperimentConfig
from uad_jax.data import sources
from uad_jax.methods import cddpm, ddpm, pddpm
from uad_jax.types import ModelState, Tree


def import_weights(
    config: ExperimentConfig,
    path: pathlib.Path,
    workdir: pathlib.Path,
    *,
    entry: str = "",
    note: str = "",
    mesh: Mesh | None = None,
) -> int:
    """Writes weights of another program as the last checkpoint of a run.

    The checkpoint counts as trained to the end of the config's budget, since a file
    does not say how long it was trained. The data of the config are those that later
    evaluations calibrate thresholds on; the weights were trained on others.

    Args:
      config: The experiment that the weights belong to, with its data.
      path: The file; nothing in it is executed.
      workdir: Directory of the run to make.
      entry: For files with several models, as in `weights.read`.
      note: Source and licence of the weights; stands in reports and results.
      mesh: Devices; default: all.

    Returns:
      The step of the checkpoint.

    Raises:
      WeightsError: If the file is damaged or does not fit the config's networks.
      ValueError: If there is no importer for the config's method.
      workdir.WorkdirError: If the workdir holds a run already.
    """
    config_lib.validate(config)
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    file = weights.read(path, entry=entry)
    step = config.total_steps
    with workdir_lib.opened(workdir):
        checkpoints = checkpoint_lib.Checkpoints(workdir / train.CHECKPOINTS)
        with contextlib.closing(checkpoints):
            if checkpoints.latest() is not None:
                raise workdir_lib.WorkdirError(
                    f"{workdir} holds a run already: import into a new --workdir."
                )
            workdir_lib.check_config(workdir, config_lib.to_dict(config))
            workdir_lib.write_environment(workdir)
            store, stream, method = train.describe(config, workdir, mesh)
            _say_how_slices_lie(store)
            state = programs.init(method, stream.spec(), config.seed, mesh)
            model = fill(config, file, state.model, stream.spec().image.shape)
            model = jax.device_put(model, mesh_lib.replicated(mesh))
            state = dataclasses.replace(
                state,
                step=jnp.full_like(state.step, step),
                model=model,
                ema=None if state.ema is None else jax.tree.map(jnp.copy, model.params),
            )
            checkpoints.save(step, state, metrics=None)
            checkpoints.wait()
            with path.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            workdir_lib.write_json(
                workdir / workdir_lib.IMPORTED,
                {
                    "step": step,
                    "file": path.name,
                    "entry": entry,
                    "sha256": digest,
                    "note": note,
                },
            )
    logging.info("Imported %s as step %d of %s.", path, step, workdir)
    return step


def fill(
    config: ExperimentConfig,
    file: weights.Weights,
    like: ModelState,
    shape: tuple[int, ...],
) -> ModelState:
    """Puts the tensors of a file into the networks of a model.

    Args:
      config: The experiment.
      file: The weights.
      like: The model, or its shapes.
      shape: Of the images, [..., H, W, C].

    Returns:
      The model as numpy arrays.

    Raises:
      WeightsError: Lists everything that does not fit.
      ValueError: If there is no importer for the config's method.
    """
    method = config.method
    if not isinstance(method, ddpm.DdpmConfig | pddpm.PddpmConfig | cddpm.CddpmConfig):
        raise ValueError(
            f"There is no importer for {type(method).__name__}; there are for the "
            "configs ddpm, pddpm and cddpm."
        )
    conditional = isinstance(method, cddpm.CddpmConfig)
    network = denoising.network(method, shape, conditional=conditional)
    unet: Tree = {"params": like.params[denoising.NETWORK]}
    spelling = torch_names.ANODDPM if _is_anoddpm(file) else None
    unet = torch_names.load_unet(file, network, unet, spelling=spelling)
    params = {denoising.NETWORK: unet["params"]}
    collections: dict[str, Tree] = {}
    if conditional:
        name = cddpm.ENCODER
        encoder: Tree = {"params": like.params[name], **like.collections[name]}
        encoder = torch_names.load_resnet(file, encoder)
        params[name] = encoder.pop("params")
        collections[name] = encoder
    numbers = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    logging.info("%s: %d parameters fit.", file.path, numbers)
    return ModelState(params=params, collections=collections)


def _say_how_slices_lie(store: sources.Store) -> None:
    if not store.recipe.get("turned", False):
        logging.warning(
            "%s was prepared with --recipe=%s, whose axes grow to R, A, S. Weights of "
            "the authors' pDDPM and cDDPM programs have seen slices that are turned by "
            "180 degrees: prepare a store with --recipe=behrendt_lps for them.",
            store.path,
            store.recipe.get("name", ""),
        )


def _is_anoddpm(file: weights.Weights) -> bool:
    return any(".to_qkv." in f".{name}" for name in file.arrays)
