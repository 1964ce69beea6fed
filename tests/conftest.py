"""Test set-up: CPU, 8 virtual devices, strict ranks, programs compiled in haste."""

import gc
import itertools
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Nearly all programs run once or twice, on tiny shapes: without LLVM's optimisation the
# tests take half the time. The processes that tests start inherit it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
).strip()

from uad_jax import runtime

runtime.setup()

import jax
import pytest
from absl import flags

from uad_jax import mesh as mesh_lib

jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # grain reads absl flags


@pytest.fixture(scope="session")
def mesh1() -> jax.sharding.Mesh:
    """Mesh of one device: what most tests use."""
    return mesh_lib.make_mesh(jax.devices()[:1])


@pytest.fixture(scope="session")
def mesh8() -> jax.sharding.Mesh:
    """Mesh of all 8 virtual devices."""
    return mesh_lib.make_mesh()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps tests that share compiled programs in one process (`-n 2`).

    These are the tests of a file, of the contract those of a method.
    """
    for item in items:
        group = item.nodeid.partition("::")[0]
        parameters = getattr(item, "callspec", None)
        if "contract" in group and parameters is not None:
            group += f"-{parameters.params.get('name')}"
        item.add_marker(pytest.mark.xdist_group(group))


# Linux gives a process 65,530 memory maps, every compiled program takes some, and the
# compiler crashes when there are none left.
_MOST_MAPS = 25_000
_tests = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Forgets compiled programs, now and then, before there are too many."""
    maps = pathlib.Path("/proc/self/maps")
    if next(_tests) % 20 or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()
