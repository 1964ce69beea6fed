import collections
import pathlib

import pytest

from tests.data import phantom
from uad_jax.data import implant_plan
from uad_jax.data.implant import Generator


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return phantom.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def masks(data: pathlib.Path) -> list[implant_plan.Mask]:
    return implant_plan.list_masks(data)


@pytest.fixture(scope="module")
def choices(
    data: pathlib.Path, masks: list[implant_plan.Mask]
) -> list[implant_plan.Choice]:
    return implant_plan.plan(data, phantom.SUBJECTS, masks, seed=1)


def test_masks_are_cut_into_strata_by_size_and_patient26_is_left_out(
    masks: list[implant_plan.Mask],
) -> None:
    ms = [mask for mask in masks if mask.source == "mslub"]
    assert [mask.stratum for mask in ms] == [0] * 5 + [1] * 5 + [2] * 5
    assert [mask.patient for mask in ms] == [f"patient{n:02d}" for n in range(15)]
    stroke = [mask.patient for mask in masks if mask.source == "soop"]
    assert stroke[0] == "sub-0"
    assert "sub-26" in stroke  # another person than patient26


def test_masks_that_are_too_small_or_too_large_are_left_out(
    data: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implant_plan, "SIZES_ML", (5.0, 20.0))
    found = implant_plan.list_masks(data)
    assert 0 < len([mask for mask in found if mask.source == "mslub"]) < 15


def test_no_patient_has_masks_for_test_and_for_the_rest(
    masks: list[implant_plan.Mask],
) -> None:
    parts = implant_plan.split_masks(masks, seed=1)
    test, rest = ({(m.source, m.patient) for m in parts[k]} for k in ("test", "train"))
    assert not test & rest
    assert len(test | rest) == len(masks)
    counts = collections.Counter((m.source, m.stratum) for m in parts["test"])
    assert set(counts.values()) == {implant_plan.TEST_MASKS}
    assert implant_plan.split_masks(masks, seed=2) != parts


def test_a_patient_in_both_parts_is_an_error(masks: list[implant_plan.Mask]) -> None:
    with pytest.raises(ValueError, match="mslub/patient00 is in both parts"):
        implant_plan._check_disjoint({"test": masks[:1], "train": masks[:2]})


def test_too_few_masks_are_an_error(masks: list[implant_plan.Mask]) -> None:
    with pytest.raises(ValueError, match="2 patients in size stratum 0; expected more"):
        implant_plan.split_masks(masks[:2], seed=1)


def test_subjects_get_their_number_of_implants_of_every_size(
    choices: list[implant_plan.Choice],
) -> None:
    counts = collections.Counter((c.background, c.mask.source) for c in choices)
    expected = {"train": 1, "val": 1, "test": 2}
    for name, split in phantom.SUBJECTS.items():
        for source in implant_plan.KINDS:
            assert counts[name, source] == expected[split]
    tests = [choice for choice in choices if choice.split == "test"]
    strata = collections.Counter((c.mask.source, c.mask.stratum) for c in tests)
    assert set(strata.values()) == {2}  # 3 subjects with 2 implants, 3 strata
    assert len({choice.mask.file for choice in tests}) == len(tests)  # none twice
    assert len({choice.seed for choice in choices}) == len(choices)


def test_test_implants_have_their_own_generator_and_masks(
    choices: list[implant_plan.Choice],
) -> None:
    generators = {(c.split == "test", c.generator) for c in choices}
    assert generators == {(True, Generator.TEST), (False, Generator.TRAIN)}
    files = {
        part: {c.mask.file for c in choices if (c.split == "test") is part}
        for part in (True, False)
    }
    assert not files[True] & files[False]


def test_the_plan_is_a_function_of_its_seed(
    data: pathlib.Path,
    masks: list[implant_plan.Mask],
    choices: list[implant_plan.Choice],
) -> None:
    assert implant_plan.plan(data, phantom.SUBJECTS, masks, seed=1) == choices
    assert implant_plan.plan(data, phantom.SUBJECTS, masks, seed=2) != choices


def test_a_subject_that_no_mask_fits_is_an_error(
    data: pathlib.Path,
    masks: list[implant_plan.Mask],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(implant_plan, "MAX_LOST", -1.0)
    with pytest.raises(ValueError, match="C: none of 4 masks lies in its brain"):
        implant_plan.plan(data, phantom.SUBJECTS, masks, seed=1)
