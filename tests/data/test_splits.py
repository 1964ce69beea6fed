import collections
from pathlib import Path

import pytest

from uad_jax.data import splits
from uad_jax.data.manifest import SubjectFiles


def _subject(name: str, **fields: object) -> SubjectFiles:
    return SubjectFiles(
        subject=name,
        **({"patient": name, "images": {"t1": Path("x")}} | fields),
    )


def _healthy(count: int) -> list[SubjectFiles]:
    return [_subject(f"h{number}") for number in range(count)]


def test_drawn_folds_partition_the_healthy_patients() -> None:
    volumes = _healthy(40) + [_subject(f"s{n}", label="abnormal") for n in range(10)]
    folds = [splits.assign(volumes, fold) for fold in range(5)]
    tests = [{s for s, role in fold.items() if role == "test"} for fold in folds]
    assert all(test == tests[0] for test in tests)
    validated = collections.Counter(
        subject
        for fold in folds
        for subject, role in fold.items()
        if role == "val" and subject.startswith("h")
    )
    assert set(validated.values()) == {1}
    counts = collections.Counter((s[0], role) for s, role in folds[0].items())
    assert counts[("h", "test")] == 6  # 15 % of 40
    assert counts[("h", "val")] == 7  # a fifth of 34
    assert counts[("s", "val")] == 2  # 20 % of 10
    assert counts[("s", "test")] == 8
    assert counts[("s", "train")] == 0


def test_draw_depends_on_names_and_seed_only() -> None:
    volumes = _healthy(20)
    assert splits.assign(volumes) == splits.assign(volumes[::-1])
    assert splits.assign(volumes, seed=1) != splits.assign(volumes)
    # A fixed value, so that a release cannot silently move subjects between splits.
    test = sorted(s for s, role in splits.assign(volumes).items() if role == "test")
    assert test == ["h0", "h17", "h3"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_few_subjects_still_train(count: int) -> None:
    roles = splits.assign(_healthy(count))
    counts = collections.Counter(roles.values())
    assert sum(counts.values()) == count
    assert counts["train"] >= 1
    assert (counts["val"] >= 1) == (count > 1)
    assert counts["test"] == (1 if count > 2 else 0)


def test_a_store_of_patients_alone_splits_alike_in_every_fold() -> None:
    volumes = [_subject(f"p{number}", label="abnormal") for number in range(5)]
    assert splits.assign(volumes, fold=3) == splits.assign(volumes)
    assert set(splits.assign(volumes).values()) == {"val", "test"}


def test_scans_of_one_patient_stay_together() -> None:
    volumes = [_subject(f"{p}-{k}", patient=f"p{p}") for p in range(12) for k in (1, 2)]
    volumes.append(_subject("lesion", patient="p3", label="abnormal"))
    for fold in range(5):
        roles = splits.assign(volumes, fold)
        for volume in volumes:
            twins = {roles[v.subject] for v in volumes if v.patient == volume.patient}
            assert len(twins) == 1
        assert roles["3-1"] != "train"  # its patient has a lesion


def test_given_splits_and_folds_count() -> None:
    volumes = [
        _subject("a", fold=0),
        _subject("b", fold=1),
        _subject("c", split="train"),
        _subject("d", split="test", fold=1),
        _subject("e", label="abnormal", fold=0),
        _subject("f", label="abnormal", fold=1),
    ]
    assert splits.assign(volumes, 0) == {
        "a": "val",
        "b": "train",
        "c": "train",
        "d": "test",
        "e": "val",
        "f": "test",
    }
    assert splits.assign(volumes, 1)["a"] == "train"
    assert splits.folds(volumes) == [0, 1]
    with pytest.raises(
        ValueError, match=r"fold is 5, but the folds given are \[0, 1\]"
    ):
        splits.assign(volumes, 5)


def test_published_fold_columns_count() -> None:
    volumes = [
        _subject("a", extra={"split_fold0": "train", "split_fold1": "val"}),
        _subject("b", extra={"split_fold0": "val", "split_fold1": ""}),
    ]
    assert splits.assign(volumes, 0) == {"a": "train", "b": "val"}
    assert splits.assign(volumes, 1) == {"a": "val"}
    assert splits.folds(volumes) == [0, 1]
    with pytest.raises(ValueError, match="no column 'split_fold2'"):
        splits.assign(volumes, 2)


def test_patient_in_two_splits_is_an_error_unless_asked_for() -> None:
    leak = [
        _subject("a", patient="p", split="train"),
        _subject("b", patient="p", split="test"),
    ]
    with pytest.raises(ValueError, match="patient 'p' is in test and train"):
        splits.assign(leak)
    kept = [
        _subject(v.subject, patient="p", split=v.split, extra={"leak": "kept"})
        for v in leak
    ]
    assert splits.assign(kept) == {"a": "train", "b": "test"}


def test_abnormal_in_train_is_an_error_unless_asked_for() -> None:
    volumes = [_subject("a", label="abnormal", split="train")]
    with pytest.raises(ValueError, match="1 abnormal subject"):
        splits.assign(volumes)
    assert splits.assign(volumes, abnormal_in_train=True) == {"a": "train"}


def test_shams_never_train() -> None:
    given = [_subject("a", label="sham", split="train")]
    for allowed in (False, True):
        with pytest.raises(ValueError, match=r"1 sham\(s\) in train \(a\)"):
            splits.assign(given, abnormal_in_train=allowed)
    drawn = _healthy(12) + [_subject(f"s{n}", label="sham") for n in range(8)]
    drawn.append(_subject("h3-sham", patient="h3", label="sham"))
    for fold in range(5):
        roles = splits.assign(drawn, fold)
        assert {roles[v.subject] for v in drawn if v.label == "sham"} == {"test"}
        assert roles["h3"] == "test"  # its patient has a sham
    folds = [_subject("b", fold=0), _subject("s", label="sham", fold=1)]
    assert splits.assign(folds) == {"b": "val", "s": "test"}


def test_subjects_without_a_split_among_others_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 subjects have neither .*\(b\)"):
        splits.assign([_subject("a", split="train"), _subject("b")])


def test_fault_B35_same_image_in_train_and_test_is_an_error() -> None:
    volumes = [
        _subject("a", split="train"),
        _subject("b", split="train"),
        _subject("c", split="test"),
    ]
    splits.check_duplicates(volumes, {"a": "1", "b": "2", "c": "3"})
    with pytest.raises(
        ValueError, match="same image is given for a, c, in test and train"
    ):
        splits.check_duplicates(volumes, {"a": "1", "b": "2", "c": "1"})
    errors, warnings = splits.duplicates(volumes, {"a": "1", "b": "1", "c": "3"})
    assert errors == []
    assert "it counts 2 times" in warnings[0]


def test_fault_B35_is_found_in_any_fold() -> None:
    volumes = [_subject("a", fold=0), _subject("b", fold=1), _subject("c", fold=2)]
    errors, _ = splits.duplicates(volumes, {"a": "0", "b": "1", "c": "1"})
    assert "in train and val" in errors[0]  # fold 0 has b and c in train
    together = [_subject(v.subject, patient="p", fold=1) for v in volumes[1:]]
    errors, warnings = splits.duplicates(together, {"b": "1", "c": "1"})
    assert errors == []
    assert len(warnings) == 1
