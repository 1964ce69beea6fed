"""What a report shows."""

from tests.test_summary import result
from uad_jax import drawing


def test_the_best_the_median_and_the_worst_are_shown() -> None:
    third = result(9, [3.0, 2.0, 1.0], [0, 0, 1])
    first = result(0, [3.0, 2.0, 1.0], [1, 0, 0])
    second = result(1, [9.0, 8.0, 7.0], [0, 1, 0])
    healthy = result(2, [0.1], [0], abnormal=False)

    def shown(*results: drawing.VolumeResult) -> dict[str, str]:
        chosen = drawing.chosen(results)
        return {
            caption.split(":")[0]: one.info.subject for caption, one in chosen.items()
        }

    assert shown(third, first, second, healthy) == {
        "best": "sub-0",
        "median": "sub-1",
        "worst": "sub-9",
    }
    assert shown(third, first) == {"best": "sub-0", "worst": "sub-9"}
    assert shown(third, healthy) == {"only": "sub-9"}


def test_without_lesions_the_highest_scores_come_first() -> None:
    volumes = [
        result(n, [0.0], [0], abnormal=False, volume_score=float(n % 7))
        for n in range(20)
    ]
    chosen = drawing.chosen(volumes)
    scores = [one.volume_score for one in chosen.values()]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 6.0
    assert len(chosen) == 12
