"""What this run ran on: versions, devices, and why a GPU was not found."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
from typing import Any

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "nibabel",
    "numpy",
    "scipy",
)


def describe() -> dict[str, Any]:
    """Collects versions, devices and the source commit.

    Returns:
      Plain JSON types; no absolute path, no host name.
    """
    import jax

    import uad_jax

    devices = jax.devices()
    return {
        "uad_jax": uad_jax.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "num_processes": jax.process_count(),
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


@functools.cache
def commit() -> str:
    """The git commit of the source tree, with "+changes" if it is not clean.

    Asked once: later commits are not what this process runs.
    """
    root = pathlib.Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return "unknown"

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    return (head or "unknown") + ("+changes" if git("status", "--porcelain") else "")


def render() -> str:
    """Readable text for `run.py env`."""
    from uad_jax import runtime

    facts = describe()
    lines = [f"uad_jax {facts['uad_jax']} (commit {facts['commit']})"]
    lines.append(f"Python {facts['python']} on {facts['system']}")
    lines += [f"  {name} {version}" for name, version in facts["packages"].items()]
    lines.append(
        f"Devices: {facts['num_devices']} x {facts['device_kind']} "
        f"({facts['backend']}), {facts['cpu_count']} CPU cores"
    )
    lines.append(f"XLA_FLAGS: {facts['xla_flags'] or '(none)'}")
    lines.append(f"Cache: {runtime.cache_dir()} (set UAD_JAX_CACHE to move it)")
    lines.append(accelerator_advice(facts["backend"]))
    return "\n".join(lines)


def accelerator_advice(backend: str) -> str:
    """Says why JAX runs on the CPU, or that it does not."""
    if backend != "cpu":
        return f"Accelerator: JAX uses the {backend}."
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if "cpu" in chosen:
        return f"No accelerator: JAX_PLATFORMS={chosen} asks for the CPU. Unset it."
    if not (shutil.which("nvidia-smi") or pathlib.Path("/dev/nvidia0").exists()):
        return (
            "No accelerator: this machine shows no NVIDIA driver (no nvidia-smi, no "
            "/dev/nvidia0). In a container, pass the GPU through (--gpus all)."
        )
    plugins = [name for name in _installed() if name.startswith("jax-cuda")]
    jax_version = _version("jax")
    if not plugins:
        return (
            "No accelerator: there is an NVIDIA driver, but JAX has no CUDA plugin. "
            f'Run: pip install "jax[cuda13]=={jax_version}"'
        )
    wrong = [f"{name} {_version(name)}" for name in plugins]
    return (
        f"No accelerator: the CUDA plugin is installed ({', '.join(wrong)}) but did "
        f"not start. It must match jax {jax_version} and the driver; look at the "
        "warning above and at nvidia-smi."
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _installed() -> list[str]:
    names = (dist.metadata["Name"] for dist in importlib.metadata.distributions())
    return sorted({name.lower() for name in names if name})
