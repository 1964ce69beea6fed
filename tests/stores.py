"""Tiny prepared stores that the tests of many files share."""

import dataclasses
import functools
import pathlib

import numpy as np

from uad_jax.data import builder
from uad_jax.types import Geometry


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A synthetic scan on the model grid, shaped like `preprocess.Prepared`."""

    image: np.ndarray
    brain: np.ndarray
    lesion: np.ndarray
    geometry: Geometry
    notes: tuple[str, ...] = ()


def phantom(
    number: int,
    grid: tuple[int, int, int, int] = (6, 32, 32, 1),
    *,
    lesion: bool = False,
) -> Prepared:
    """Makes an ellipsoidal "brain" with texture and, if asked, a bright lesion.

    Args:
      number: Seeds the texture and the shape.
      grid: D, H, W, C.
      lesion: Whether there is a lesion, one brighter ball.

    Returns:
      The scan; the background is 0 and the brain lies in about [0.2, 1].
    """
    depth, height, width, channels = grid
    rng = np.random.default_rng(number)
    z, x, y = np.meshgrid(
        *(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in grid[:3]),
        indexing="ij",
    )
    radii = rng.uniform(0.75, 0.95, 3)
    brain = (z / 1.2) ** 2 + (x / radii[1]) ** 2 + (y / radii[2]) ** 2 < 1
    waves = np.stack(
        [
            0.5 + 0.1 * np.cos(3 * x + 2 * y + z + rng.uniform(0, 6))
            for _ in range(channels)
        ],
        axis=-1,
    )
    image = waves + rng.normal(0, 0.02, waves.shape)
    ball = np.zeros_like(brain)
    if lesion:
        center = rng.uniform(-0.3, 0.3, 2)
        ball = brain & (z**2 + (x - center[0]) ** 2 + (y - center[1]) ** 2 < 0.06)
        image = image + 0.35 * ball[..., None]
    image = np.where(brain[..., None], image, 0.0).astype(np.float32)
    spacing = np.diag([2.0, 2.0, 2.0, 1.0])
    geometry = Geometry(
        native_shape=(height, width, depth),
        native_affine=spacing,
        grid_to_native=np.eye(4),
    )
    return Prepared(image, brain, ball, geometry)


def tiny_scans(
    splits: dict[str, int] | None = None,
    *,
    grid: tuple[int, int, int, int] = (6, 32, 32, 1),
    modalities: tuple[str, ...] = ("t1",),
) -> list[builder.Source]:
    """Describes the scans of `tiny_store`."""
    splits = splits or {"train": 3, "val": 2, "test": 3}
    scans: list[builder.Source] = []
    for split, count in splits.items():
        for number in range(count):
            abnormal = split != "train" and number % 2 == 1
            make = functools.partial(phantom, len(scans), grid, lesion=abnormal)
            scans.append(
                builder.Source(
                    subject=f"{split}-{number}",
                    load=make,
                    modalities=modalities,
                    label="abnormal" if abnormal else "healthy",
                    split=split,
                    licence="synthetic",
                )
            )
    return scans


def tiny_store(
    directory: pathlib.Path,
    splits: dict[str, int] | None = None,
    *,
    grid: tuple[int, int, int, int] = (6, 32, 32, 1),
    modalities: tuple[str, ...] = ("t1",),
) -> pathlib.Path:
    """Writes a small store; a second call with the same arguments is instant.

    Args:
      directory: Where the store goes; the store is `directory`/"store".
      splits: Volumes per split; default 3 train, 2 val, 3 test. Every second
        volume outside "train" has a lesion.
      grid: D, H, W, C.
      modalities: Names of the C channels.

    Returns:
      The store's directory, for `sources.Store.open` and `DataConfig.store`.
    """
    scans = tiny_scans(splits, grid=grid, modalities=modalities)
    return builder.build_from(
        scans,
        pathlib.Path(directory) / "store",
        recipe={"name": "phantom", "spacing": [2.0, 2.0, 2.0]},
        recipe_hash="phantom-1",
        source_hash=f"{splits}-{grid}-{modalities}",
        workers=0,
    )


def folded_store(directory: pathlib.Path) -> pathlib.Path:
    """Writes a small store of three folds, of 2, 2 and 3 scans, and two test scans."""
    scans = tiny_scans({"train": 7, "test": 2})
    for number in range(7):
        fold = min(number // 2, 2)
        scans[number] = dataclasses.replace(scans[number], split=None, fold=fold)
    return builder.build_from(
        scans,
        pathlib.Path(directory) / "store",
        recipe={"name": "phantom", "spacing": [2.0, 2.0, 2.0]},
        recipe_hash="phantom-1",
        source_hash="folded",
        workers=0,
    )
