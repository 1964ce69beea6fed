"""The one place that sets up the JAX process, before its backend starts."""

import importlib.metadata
import logging
import os
import pathlib
import platform

from absl import logging as absl_logging

# XLA:CPU routes single convolutions to YNNPACK, whose weight gradients run 1.3 to
# 1.9 times slower than the built-in ones. An unknown flag aborts the process, so it
# is set only for the releases it was checked on.
_CPU_CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
_FLAG_CHECKED_ON = ("0.10.2", "0.11.2")


def cache_dir() -> pathlib.Path:
    """Directory of everything that can be made again: programs, cohorts, features."""
    root = os.environ.get("UAD_JAX_CACHE")
    if root:
        return pathlib.Path(root)
    base = os.environ.get("XDG_CACHE_HOME", str(pathlib.Path.home() / ".cache"))
    return pathlib.Path(base) / "uad_jax"


def setup() -> None:
    """Sets XLA flags and the compilation cache; call before the first JAX call."""
    flags = os.environ.get("XLA_FLAGS", "")
    checked = importlib.metadata.version("jaxlib") in _FLAG_CHECKED_ON
    if checked and "ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_CONVOLUTION_FLAG}".strip()

    import jax  # after XLA_FLAGS

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Compiled CPU programs are only good for the kind of machine they came from.
        programs = cache_dir() / "xla" / platform.machine()
        jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def log_ours_only() -> None:
    """Shows our own progress and everybody's warnings, each as a plain line."""
    absl_logging.set_verbosity(absl_logging.INFO)
    handler = absl_logging.get_absl_handler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = str(pathlib.Path(__file__).parent)

    def shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.pathname.startswith(ours)

    handler.addFilter(shown)
