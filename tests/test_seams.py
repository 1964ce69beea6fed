"""The seams that only later methods use carry a run from start to warm start."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import runs, stores
from uad_jax import config as config_lib
from uad_jax import mesh as mesh_lib
from uad_jax import train
from uad_jax.methods import base
from uad_jax.ops import losses
from uad_jax.types import Batch, Key, ModelState, Scalars, TrainState, Tree

SLAB = 3


class Generator(nn.Module):
    """Batch normalisation and a convolution."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Conv(x.shape[-1], (3, 3), name="conv")(x)


@dataclasses.dataclass
class AdversarialConfig:
    """Slabs, lesions, batch statistics, and a generator and a critic in turn."""

    learning_rate: float = 1e-3

    def validate(self) -> None:
        """Every value works."""

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method."""
        generator, critic = Generator(), nn.Dense(1)
        tx = optax.adam(self.learning_rate)

        def slices(batch: Batch) -> jax.Array:
            return batch.image.reshape(-1, *batch.image.shape[2:])

        def judge(params: Tree, x: jax.Array) -> jax.Array:
            return critic.apply({"params": params}, x.reshape(x.shape[0], -1)).mean()

        def loss(
            params: dict[str, Tree], collections: dict[str, Tree], batch: Batch
        ) -> tuple:
            assert batch.lesion is not None
            x = slices(batch)
            out, changed = generator.apply(
                {"params": params["generator"], **collections["generator"]},
                x,
                True,
                mutable=["batch_stats"],
            )
            healthy = ~batch.lesion.reshape(x.shape)
            rows = losses.l1(out * healthy, x * healthy, losses.Reduction.MEAN)
            value = losses.mean_over_valid(rows, batch.valid.reshape(-1))
            value = value + 1e-3 * judge(params["critic"], out)
            return value, (out, {"generator": dict(changed)})

        def init(key: Key, batch: Batch) -> TrainState:
            x = slices(batch)
            first = generator.init(key, x, False)
            second = critic.init(key, x.reshape(x.shape[0], -1))
            params = {"generator": first["params"], "critic": second["params"]}
            stats = {"batch_stats": first["batch_stats"]}
            return TrainState(
                step=jnp.int32(0),
                model=ModelState(params=params, collections={"generator": stats}),
                opt_state={name: tx.init(part) for name, part in params.items()},
                ema={"generator": jax.tree.map(jnp.copy, params["generator"])},
            )

        def update(
            state: TrainState, batch: Batch, key: Key
        ) -> tuple[TrainState, Scalars]:
            params = dict(state.model.params)
            opt_state = dict(state.opt_state)

            def step(name: str, grads: Tree) -> None:
                change, opt_state[name] = tx.update(grads, opt_state[name])
                params[name] = optax.apply_updates(params[name], change)

            (value, (out, collections)), grads = jax.value_and_grad(
                lambda part: loss(
                    {**params, "generator": part}, state.model.collections, batch
                ),
                has_aux=True,
            )(params["generator"])
            step("generator", grads)
            margin, grads = jax.value_and_grad(
                lambda part: judge(part, out) - judge(part, slices(batch))
            )(params["critic"])
            step("critic", grads)
            assert state.ema is not None
            ema = base.moving_average(
                state.ema, {"generator": params["generator"]}, 0.9, state.step
            )
            new = TrainState(
                step=state.step + 1,
                model=ModelState(params=params, collections=collections),
                opt_state=opt_state,
                ema=ema,
            )
            return new, {"loss": value, "margin": margin}

        def validate(model: ModelState, batch: Batch, key: Key) -> Scalars:
            return {"loss": loss(model.params, model.collections, batch)[0]}

        return base.Method(
            inputs=base.Inputs(num_slices=SLAB, needs_lesion=True),
            init=init,
            update=update,
            validate=validate,
            score=None,
        )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("seams"))


def _config(store: pathlib.Path) -> config_lib.ExperimentConfig:
    config = runs.scale_config(
        store, **{"batch_size": 4, "train.log_every": 2, "train.validation_slices": 4}
    )
    config.method = AdversarialConfig()
    return config


def test_slabs_two_optimisers_and_batch_statistics_train_resume_and_hand_over(
    store: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = mesh_lib.make_mesh(jax.devices()[:2])
    # Two steps per call, as on an accelerator.
    monkeypatch.setattr(train, "_steps_per_call", lambda config, mesh: 2)
    config = _config(store)
    assert train.train(config, tmp_path / "whole", mesh=mesh).step == 8
    whole = runs.final_state(config, tmp_path / "whole", mesh)
    stats = whole.model.collections["generator"]["batch_stats"]["norm"]
    assert (stats["mean"] != 0).all()
    assert set(whole.opt_state) == {"generator", "critic"}

    config.total_steps = 4
    train.train(config, tmp_path / "parts", mesh=mesh)
    config.total_steps = 8
    assert train.train(config, tmp_path / "parts", mesh=mesh).step == 8
    runs.assert_equal(runs.final_state(config, tmp_path / "parts", mesh), whole)

    later = _config(store)
    later.method = AdversarialConfig(learning_rate=1e-12)
    later.total_steps = 2
    later.train.warm_start = [
        config_lib.WarmStart(
            workdir=str(tmp_path / "whole"),
            step=8,
            source_prefix="generator",
            target_prefix="generator",
        )
    ]
    train.train(later, tmp_path / "later", mesh=mesh)
    taken = runs.final_state(later, tmp_path / "later", mesh).model
    expected = whole.for_eval()
    np.testing.assert_allclose(
        taken.params["generator"]["conv"]["kernel"],
        expected.params["generator"]["conv"]["kernel"],
        rtol=1e-6,
    )
    # The statistics moved on from those of the source, not from zero.
    found = taken.collections["generator"]["batch_stats"]["norm"]["mean"]
    assert abs(found - stats["mean"]) < abs(found)
    critic = taken.params["critic"]["kernel"]
    assert (critic != expected.params["critic"]["kernel"]).any()
