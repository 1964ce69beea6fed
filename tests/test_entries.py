"""What is compared is of the same volumes, and has a name of its own."""

import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from tests.fake_runs import FINGERPRINT, fake_run
from uad_jax import entries

AP = {"a": 0.5, "b": 0.25, "c": 0.75}


@pytest.fixture
def two(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return [fake_run(tmp_path / "one", AP), fake_run(tmp_path / "two", AP, name="vae")]


def test_entries_are_read_in_the_order_given(two: list[pathlib.Path]) -> None:
    second, first = entries.read(two[::-1])
    assert (second.name, first.name) == ("two", "one")
    assert (second.scorer, first.scorer) == ("vae", "ae")
    assert first.operating == ("healthy_fpr", 0.5)
    assert entries.lesion_values(first.subjects, "ap")[0] == AP


def test_names_take_parents_only_where_they_are_equal() -> None:
    paths = [pathlib.Path(p) for p in ("/r/1/ae", "/r/2/ae", "/r/vae")]
    assert entries.short_names(paths) == ["1/ae", "2/ae", "vae"]
    deep = [pathlib.Path(p) for p in ("/x/1/ae", "/y/1/ae", "/y/2/ae")]
    assert entries.short_names(deep) == ["x/1/ae", "y/1/ae", "2/ae"]


def test_one_run_alone_is_refused(two: list[pathlib.Path]) -> None:
    with pytest.raises(entries.CompareError, match="at least two"):
        entries.read(two[:1])


def test_a_run_given_twice_is_refused(two: list[pathlib.Path]) -> None:
    again = two[0].parent / "two" / ".." / "one"
    with pytest.raises(entries.CompareError, match=r"one is given twice"):
        entries.read([two[0], again])


def test_d10_runs_on_other_subjects_are_refused_by_name(
    two: list[pathlib.Path],
) -> None:
    other = fake_run(two[0].parent / "other", {"a": 0.5, "b": 0.2, "x": 0.1, "y": 0.3})
    with pytest.raises(entries.CompareError) as error:
        entries.read([*two, other])
    text = str(error.value)
    assert "1 subjects are only in one: c" in text
    assert "2 subjects are only in other: x, y" in text
    assert "Evaluate all of them on one store" in text
    assert "only in two" not in text


def test_runs_of_another_protocol_are_refused(two: list[pathlib.Path]) -> None:
    other = fake_run(two[0].parent / "other", AP, protocol="baur", fingerprint="x")
    with pytest.raises(entries.CompareError, match="behrendt in one, baur in other"):
        entries.read([two[0], other])


def test_equal_names_with_other_voxels_are_refused(two: list[pathlib.Path]) -> None:
    other = fake_run(two[0].parent / "other", AP, fingerprint="e" * 64)
    with pytest.raises(entries.CompareError, match="same names but other voxels"):
        entries.read([two[0], other])


def test_the_one_shared_set_is_found(tmp_path: pathlib.Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        fake_run(folder, AP, set_name="brats")
    own = fake_run(tmp_path / "spare", AP) / "results"
    for name in ("test.json", "test_subjects.csv"):
        shutil.copy(own / name, folders[0] / "results" / name)
    assert entries.read(folders)[0].results["set"]["name"] == "brats"


def test_several_shared_sets_are_listed(two: list[pathlib.Path]) -> None:
    for folder in two:
        for name in ("test.json", "test_subjects.csv"):
            path = folder / "results" / name
            shutil.copy(path, path.with_name(name.replace("test", "other")))
    with pytest.raises(entries.CompareError, match="Choose one with --set: other, te"):
        entries.read(two)
    assert len(entries.read(two, "test")) == 2


def test_no_shared_set_says_what_each_has(two: list[pathlib.Path]) -> None:
    lone = fake_run(two[0].parent / "lone", AP, set_name="atlas", fingerprint="x")
    with pytest.raises(entries.CompareError, match=r"(?s)lone: atlas.*run.py evaluate"):
        entries.read([two[0], lone])
    with pytest.raises(entries.CompareError, match="no set called 'test' that all"):
        entries.read([two[0], lone], "test")


def _add_set(folder: pathlib.Path, name: str, fingerprint: str) -> None:
    """Copies the set "test" of a workdir under another name and fingerprint."""
    results = folder / "results"
    content = json.loads((results / "test.json").read_text())
    content["set"] |= {"name": name, "fingerprint": fingerprint}
    (results / f"{name}.json").write_text(json.dumps(content))
    shutil.copy(results / "test_subjects.csv", results / f"{name}_subjects.csv")


def test_a_set_is_known_by_its_scans_whatever_its_name(tmp_path: pathlib.Path) -> None:
    run = fake_run(tmp_path / "run", AP, fingerprint="own")
    _add_set(run, "study", "study")
    maps = fake_run(tmp_path / "maps", AP, fingerprint="study", slices=None)
    for chosen in ("", "study", "test"):
        first, second = entries.read([run, maps], chosen)
        assert first.results["set"]["name"] == "study"
        assert second.results["set"]["name"] == "test"
        assert "These scans are its set 'test'." in second.notes
        assert not any("its set" in note for note in first.notes)


def test_of_several_sets_with_the_same_scans_that_with_one_name_is_read(
    two: list[pathlib.Path],
) -> None:
    for folder, name in zip(two, ("mine", "yours"), strict=True):
        _add_set(folder, name, "other scans")
    assert [one.results["set"]["name"] for one in entries.read(two)] == ["test"] * 2
    found = entries.read(two, "yours")
    assert [one.results["set"]["name"] for one in found] == ["mine", "yours"]


def test_two_sets_of_the_same_scans_are_told_apart_by_name_only(
    tmp_path: pathlib.Path,
) -> None:
    run, maps = fake_run(tmp_path / "run", AP), fake_run(tmp_path / "maps", AP)
    _add_set(run, "validated", FINGERPRINT)
    for name in ("test.json", "test_subjects.csv"):
        path = maps / "results" / name
        path.rename(path.with_name(name.replace("test", "theirs")))
    with pytest.raises(entries.CompareError, match="--set: test, theirs, validated"):
        entries.read([run, maps])
    assert entries.read([run, maps], "validated")[0].results["set"]["name"] == (
        "validated"
    )


def test_the_advice_for_maps_names_the_flags_that_maps_need(
    tmp_path: pathlib.Path,
) -> None:
    run = fake_run(tmp_path / "run", AP)
    maps = fake_run(tmp_path / "maps", AP, fingerprint="x", slices=None)
    wanted = (
        r"a run: run\.py evaluate --workdir=DIR --data=STORE; "
        r"maps: run\.py evaluate --workdir=DIR --maps=MAPS --store=STORE"
    )
    with pytest.raises(entries.CompareError, match=wanted):
        entries.read([run, maps])
    with pytest.raises(entries.CompareError, match=wanted):
        entries.read([run, maps], "nowhere")
    again = fake_run(tmp_path / "again", AP, fingerprint="y")
    with pytest.raises(entries.CompareError, match="a run: ") as error:
        entries.read([run, again])
    assert "--maps" not in str(error.value)


def test_damaged_tables_are_named(two: list[pathlib.Path]) -> None:
    path = two[0] / "results" / "test_subjects.csv"
    text = path.read_text()
    path.write_text(text.replace("patient", "person"))
    with pytest.raises(
        entries.CompareError, match=r"test_subjects.csv is damaged.*pat"
    ):
        entries.read(two)
    path.write_text(text[: len(text) // 2 - 8])
    with pytest.raises(entries.CompareError, match=r"test_subjects.csv is damaged"):
        entries.read(two)
    path.write_text(text.replace("ae,", "xx,"))
    with pytest.raises(entries.CompareError, match="has no line of 'ae'"):
        entries.read(two)


def test_results_of_an_older_version_are_refused(two: list[pathlib.Path]) -> None:
    path = two[0] / "results" / "test.json"
    results = json.loads(path.read_text())
    del results["set"]["fingerprint"]
    path.write_text(json.dumps(results))
    with pytest.raises(entries.CompareError, match="older version"):
        entries.read(two)


def test_curves_leave_out_checkpoints_scored_on_other_volumes(
    tmp_path: pathlib.Path,
) -> None:
    lines = [
        {"set": "test", "step": 20, "fingerprint": "f1" * 32},
        {"set": "test", "step": 10, "fingerprint": "f1" * 32},
        {"set": "test", "step": 30, "fingerprint": "stale"},
        {"set": "other", "step": 40, "fingerprint": "f1" * 32},
    ]
    one = fake_run(tmp_path / "one", AP, by_step=lines)
    entry, _ = entries.read([one, fake_run(tmp_path / "two", AP)])
    assert [row["step"] for row in entry.by_step] == ["10", "20"]
    assert any("1 lines of by_step.csv" in note for note in entry.notes)


def test_segmentations_of_other_volumes_are_left_out(tmp_path: pathlib.Path) -> None:
    masks = {"a": np.ones((1, 2, 2), bool)}
    one = fake_run(tmp_path / "one", AP, masks=masks, store="somewhere")
    two = fake_run(tmp_path / "two", AP, masks=masks, found_fingerprint="stale")
    first, second = entries.read([one, two])
    assert first.found is not None
    assert first.store == "somewhere"
    assert second.found is None
    assert "of other volumes" in " ".join(second.notes)


def test_damaged_segmentations_cost_the_pictures_only(tmp_path: pathlib.Path) -> None:
    masks = {"a": np.ones((1, 2, 2), bool)}
    one = fake_run(tmp_path / "one", AP, masks=masks)
    two = fake_run(tmp_path / "two", AP, masks=masks)
    path = two / "results" / "test_found.npz"
    path.write_bytes(path.read_bytes()[:-40])
    first, second = entries.read([one, two])
    assert first.found is not None
    assert second.found is None
    notes = " ".join(second.notes)
    assert "damaged, so no pictures" in notes
    assert str(tmp_path) not in notes


def test_only_annotated_lesions_of_abnormal_volumes_count() -> None:
    rows = {
        "lesion": {"label": "abnormal", "patient": "p", "ap": "0.5", "dice_x": ""},
        "empty": {"label": "abnormal", "patient": "p", "ap": "", "dice_x": "0"},
        "sham": {"label": "sham", "patient": "p", "ap": "0.9", "dice_x": "0.9"},
        "healthy": {"label": "healthy", "patient": "q", "ap": "", "dice_x": "0"},
    }
    values, patients = entries.lesion_values(rows, "ap")
    assert values == {"lesion": 0.5}
    assert patients == {"lesion": "p"}
    assert math.isnan(entries.lesion_values(rows, "dice_x")[0]["lesion"])
