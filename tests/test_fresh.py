"""A test with fresh inputs names the seed of its failure."""

import re

import numpy as np
import pytest

from tests import fresh


def test_what_is_printed_gives_the_same_numbers_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, other = fresh.rng().random(8), fresh.rng().random(8)
    assert not np.array_equal(first, other)
    seed, _ = re.findall(r"^fresh\.rng\((\d+)\)$", capsys.readouterr().out, re.M)
    np.testing.assert_array_equal(fresh.rng(int(seed)).random(8), first)
