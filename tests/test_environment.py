import pathlib

import pytest

from uad_jax import environment


def test_describe_has_versions_and_no_absolute_path() -> None:
    facts = environment.describe()
    assert facts["packages"]["jax"] != "missing"
    assert facts["num_devices"] == 8
    assert str(pathlib.Path.home()) not in str(facts)


def test_render_shows_devices_and_cache() -> None:
    text = environment.render()
    assert "Devices: 8 x cpu" in text
    assert "Cache: " in text


def test_advice_names_the_variable_that_asks_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS=cpu" in environment.accelerator_advice("cpu")


def test_advice_names_the_install_line_when_the_plugin_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(environment.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(environment, "_installed", lambda: ["jax", "jaxlib"])
    assert 'pip install "jax[cuda13]==' in environment.accelerator_advice("cpu")


def test_advice_names_the_plugin_that_did_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(environment.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(environment, "_installed", lambda: ["jax-cuda13-plugin"])
    assert "jax-cuda13-plugin" in environment.accelerator_advice("cpu")
