import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from configs import ddpm, smoke
from tests import denoisers, runs, stores
from uad_jax import ensembles, member_programs, workdir
from uad_jax.ensembles import Axis
from uad_jax.methods import base

RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)


@pytest.mark.parametrize(
    ("text", "field", "values", "folder"),
    [
        ("seed:3", "seed", (7, 8, 9), "seed-7"),
        ("seed:5,1", "seed", (5, 1), "seed-5"),
        ("fold:2", "data.fold", (0, 1), "fold-0"),
        ("data.fold:3,1", "data.fold", (3, 1), "fold-3"),
        ("method.kl_weight:0.1, 1", "method.kl_weight", (0.1, 1.0), "kl_weight-0.1"),
        (
            "method.kl_weight:1e+2,3",
            "method.kl_weight",
            (100.0, 3.0),
            "kl_weight-100.0",
        ),
        (
            "method.optimizer.learning_rate:1e-4,1e-3,1e-2",
            "method.optimizer.learning_rate",
            (1e-4, 1e-3, 1e-2),
            "learning_rate-0.0001",
        ),
    ],
)
def test_an_axis_is_a_field_with_values(
    text: str, field: str, values: tuple, folder: str
) -> None:
    config = smoke.get_config()
    config.seed = 7
    axis = ensembles.parse(text, config)
    assert (axis.field, axis.values, axis.folders[0]) == (field, values, folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed:1", "use 2 or more members"),
        ("seed:0", "use 2 or more members"),
        ("seed", "expected a count or whole numbers"),
        ("seed:1.5", "expected a count or whole numbers"),
        ("seed:2,2", "2 values, 1 of them different"),
        ("seed:2;fold:2", "members differ in one thing, and this names several"),
        ("seed:2:fold", "members differ in one thing"),
        ("seed+fold:2", "members differ in one thing"),
        ("sede:5", "there is no axis 'sede'"),
        ("kl_weight:1,2", "Did you mean method.kl_weight?"),
        ("method.kl_wieght:1,2", "Did you mean method.kl_weight?"),
        ("method.latent_size:8,16", "method.latent_size is 8, and not a float field"),
        ("method.optimizer:1,2", "and not a float field"),
        ("evaluation.healthy_fpr:0.1,0.2", "is 0.05, and not a float field of the"),
        ("method.kl_weight:5", "1 values, 1 of them different"),
        ("method.kl_weight:1,many", "expected finite numbers"),
        ("method.kl_weight:1,nan", "expected finite numbers"),
        ("method.kl_weight:", "expected finite numbers"),
    ],
)
def test_what_is_no_ensemble_is_refused_with_a_remedy(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        ensembles.parse(text, smoke.get_config())
    assert "seed:" in str(caught.value) or "2 or more" in str(caught.value)


def test_a_field_of_the_score_is_asked_of_one_trained_run() -> None:
    field = "method.score.restoration.step_size"
    with pytest.raises(ValueError, match=rf"run\.py rescore .*{re.escape(field)}="):
        ensembles.parse(f"{field}:0.1,0.2", smoke.get_config())
    with pytest.raises(ValueError, match="there is no axis") as caught:
        ensembles.parse("method.kl:1,2", smoke.get_config())
    assert "method.score." not in str(caught.value)


def test_how_a_chain_goes_back_is_a_matter_of_the_score() -> None:
    with pytest.raises(ValueError, match=r"run\.py rescore .*method\.eta="):
        ensembles.parse("method.eta:0,1", ddpm.get_config("cpu"))


@pytest.mark.parametrize("field", ["mask_ratio", "max_blur"])
def test_floats_that_fix_sizes_cannot_differ_between_members(
    field: str, mesh1: Mesh
) -> None:
    plain: Any = denoisers.spark_config()
    if field == "max_blur":
        plain = denoisers.ddpm_config()
        plain.augment = dataclasses.replace(plain.augment, blur_probability=1.0)

    def make(place: jax.Array) -> base.Method:
        value = member_programs.chosen((0.5, 0.75), place)
        if field == "max_blur":
            blurred = dataclasses.replace(plain.augment, max_blur=value)
            return dataclasses.replace(plain, augment=blurred).make(RUN)
        return dataclasses.replace(plain, mask_ratio=value).make(RUN)

    batch = denoisers.batch()
    if field == "mask_ratio":
        image, mask = jnp.zeros((4, 64, 64, 1)), jnp.ones((4, 64, 64, 1), bool)
        batch = dataclasses.replace(batch, image=image, mask=mask)
    with pytest.raises(ValueError, match=r"cannot share one program.*separate runs"):
        member_programs.build(make, 2, batch, [], mesh1, 1)


def test_members_are_complete_experiments_of_their_own() -> None:
    config = smoke.get_config()
    axis = ensembles.parse("method.optimizer.learning_rate:0.1,0.2", config)
    one, two = ensembles.configs(config, axis)
    assert one.method.optimizer.learning_rate == 0.1
    assert two.method.optimizer.learning_rate == 0.2
    assert config.method.optimizer.learning_rate == 1e-3
    assert one.method.optimizer is not two.method.optimizer
    assert one.evaluation is not config.evaluation


def test_values_that_cannot_work_are_all_named() -> None:
    config = smoke.get_config()
    axis = ensembles.parse("method.kl_weight:-1,1,-2", config)
    with pytest.raises(ValueError, match=r"(?s)kl_weight=-1\.0: .*kl_weight=-2\.0: "):
        ensembles.configs(config, axis)


def test_folds_that_the_store_does_not_have_are_named(tmp_path: pathlib.Path) -> None:
    config = runs.smoke_config(stores.tiny_store(tmp_path))
    axis = ensembles.parse("fold:2", config)
    with pytest.raises(ValueError, match=r"no fold 1; the split has 1: 0\. Use .*seed"):
        ensembles.check_folds(config, axis)
    ensembles.check_folds(config, ensembles.parse("seed:2", config))


def test_the_note_of_a_directory_is_read_again(tmp_path: pathlib.Path) -> None:
    assert ensembles.read(tmp_path) is None
    axis = Axis(field="method.kl_weight", values=(0.1, 1e-7))
    ensembles.write(tmp_path, axis)
    assert ensembles.read(tmp_path) == axis
    ensembles.check(tmp_path, axis)
    (tmp_path / workdir.ENSEMBLE).write_text("{}")
    with pytest.raises(workdir.WorkdirError, match="is damaged"):
        ensembles.read(tmp_path)


def test_another_ensemble_takes_a_directory_until_a_member_has_a_checkpoint(
    tmp_path: pathlib.Path,
) -> None:
    ensembles.write(tmp_path, Axis(field="seed", values=(0, 1)))
    other = Axis(field="seed", values=(0, 1, 2))
    ensembles.check(tmp_path, other)
    (tmp_path / "seed-1" / workdir.CHECKPOINTS / "4").mkdir(parents=True)
    with pytest.raises(workdir.WorkdirError, match="begun with the members seed=0, s"):
        ensembles.check(tmp_path, other)


def test_a_chosen_number_takes_part_in_arithmetic_as_a_number_does() -> None:
    def times(place: jax.Array) -> jax.Array:
        value = member_programs.chosen([0.5, 2.0, 3.0], place)
        return jnp.ones(2, jnp.bfloat16) * value

    found = jax.vmap(times)(jnp.arange(3))
    assert found.dtype == jnp.bfloat16
    assert found[:, 0].tolist() == [0.5, 2.0, 3.0]
    assert member_programs.chosen([4, 4], jnp.int32(1)) == 4
    assert isinstance(member_programs.chosen([4, 4], jnp.int32(1)), int)
