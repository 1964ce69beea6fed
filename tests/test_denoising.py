import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from tests import denoisers
from uad_jax import noising
from uad_jax.methods import base
from uad_jax.ops import augment, diffusion

RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)
KEY = jax.random.key(3)
CONFIGS = {
    "ddpm": denoisers.ddpm_config,
    "pddpm": denoisers.pddpm_config,
    "cddpm": denoisers.cddpm_config,
}


def test_slices_are_augmented_by_their_own_keys() -> None:
    batch, config = denoisers.batch(), augment.AugmentConfig(gamma_probability=1.0)
    found = noising.augmented(config, batch, KEY)
    keys = base.sample_keys(KEY, batch.uid, batch.slice_index)
    expected = augment.augment(config, diffusion.fold_in(keys, 3), batch.image)
    np.testing.assert_array_equal(found.image, expected)
    assert (np.asarray(found.image) != batch.image).any(axis=(1, 2, 3)).all()
    same = noising.augmented(augment.none(), batch, KEY)
    np.testing.assert_array_equal(same.image, batch.image)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_training_is_augmented_and_validation_is_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a training step computes comes from the changed slices."""
    batch = denoisers.batch()
    darker = dataclasses.replace(batch, image=0.5 * batch.image)
    changes: dict[str, Any] = {"augment": augment.none()}
    method = dataclasses.replace(CONFIGS[name](), **changes).make(RUN)
    state = jax.jit(method.init)(KEY, batch)
    expected = jax.jit(method.update)(state, darker, KEY)
    checked = jax.jit(method.validate)(state.model, batch, KEY)
    monkeypatch.setattr(augment, "augment", lambda config, keys, image: 0.5 * image)
    method = dataclasses.replace(CONFIGS[name](), **changes).make(RUN)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(method.update)(state, batch, KEY),
        expected,
    )
    found = jax.jit(method.validate)(state.model, batch, KEY)
    assert float(found["loss"]) == float(checked["loss"])
