import dataclasses
import math

import jax
import jax.numpy as jnp

from uad_jax import cost
from uad_jax.types import ModelState, TrainState


def test_the_largest_batch_follows_from_what_grows_with_it() -> None:
    estimate = cost.Cost(flops=1.0, total_bytes=1100, fixed_bytes=100)
    # 10 bytes a row: 550 bytes leave room for 45 rows, 44 on four devices.
    assert cost.largest_batch(estimate, 100, 1, 550) == 45
    assert cost.largest_batch(estimate, 100, 4, 550) == 44
    assert cost.largest_batch(estimate, 100, 1, 50) == 0
    assert cost.largest_batch(estimate, 100, 1, 0) is None
    advice = cost.advice(estimate, 100, 4, 550)
    assert "About batch_size = 44 would fit" in advice
    # 4 micro-batches of 25 rows fit, but 4 devices cannot share 25 rows; 5 x 20 can.
    assert "multiply method.accumulate_steps by 5" in advice
    assert "smaller" in cost.advice(estimate, 100, 1, 50)


def _state(weights: jax.Array) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        model=ModelState(params={"net": {"w": weights}}, collections={}),
        opt_state={},
    )


def test_flops_are_those_of_the_products() -> None:
    a, b = jnp.ones((8, 16)), jnp.ones((16, 4))
    lowered = jax.jit(jnp.dot).lower(a, b)
    found = cost.estimate(lowered, lowered.compile(), _state(a))
    assert found.flops == 2 * 8 * 16 * 4
    assert found.fixed_bytes == 4 + 2 * a.nbytes
    assert found.total_bytes >= a.nbytes + b.nbytes


@dataclasses.dataclass
class _Program:
    """A program of a backend that does not say all."""

    flops: float | None

    def cost_analysis(self) -> dict[str, float] | None:
        return None if self.flops is None else {"flops": self.flops}

    def memory_analysis(self) -> None:
        return None


def test_flops_of_a_backend_that_counts_compiled_programs_only() -> None:
    # GPU: nothing before compilation, then the share of one device.
    found = cost.estimate(_Program(None), _Program(7.0), _state(jnp.ones(2)), 4)
    assert found.flops == 28
    assert found.total_bytes == 0
    nothing = cost.estimate(_Program(None), _Program(None), _state(jnp.ones(2)), 4)
    assert math.isnan(nothing.flops)
