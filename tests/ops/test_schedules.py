import numpy as np
import pytest

from uad_jax.ops import schedules


def test_cosine_schedule_has_the_published_signal_shares() -> None:
    abar = schedules.cosine().abar
    known = {0: 0.9999587, 249: 0.847012, 499: 0.493844, 749: 0.144272}
    for t, value in known.items():
        assert abs(abar[t] - value) < 1e-6, (t, abar[t])
    assert abs(abar[999] - 2.43e-9) < 1e-11


def test_linear_schedule_runs_from_first_to_last_beta() -> None:
    schedule = schedules.linear()
    np.testing.assert_allclose(schedule.beta[[0, 999]], [1e-4, 0.02], rtol=1e-6)
    np.testing.assert_allclose(schedule.abar[0], 1 - 1e-4, rtol=1e-7)
    assert 3e-5 < schedule.abar[999] < 5e-5


@pytest.mark.parametrize("make", [schedules.cosine, schedules.linear])
@pytest.mark.parametrize("num_steps", [1, 10, 1000])
def test_arrays_equal_a_float64_loop(make, num_steps: int) -> None:
    schedule = make(num_steps)
    product, abar = 1.0, []
    for beta in np.float64(schedule.beta):
        product *= 1 - beta
        abar.append(product)
    # The loop reads betas that were rounded to float32.
    np.testing.assert_allclose(schedule.abar, abar, rtol=2e-4)
    np.testing.assert_allclose(schedule.one_minus_abar, 1 - np.array(abar), rtol=1e-6)
    np.testing.assert_allclose(schedule.log_abar, np.log(abar), rtol=2e-5)
    assert schedule.num_steps == num_steps
    assert {v.dtype for v in vars(schedule).values()} == {np.dtype(np.float32)}


def test_short_linear_schedules_end_in_noise_too() -> None:
    assert schedules.linear(10).abar[-1] < 1e-3
    assert schedules.linear(10).beta.max() <= np.float32(0.999)


def test_noise_share_of_the_first_step_keeps_its_digits() -> None:
    schedule = schedules.linear(1000)
    np.testing.assert_allclose(schedule.one_minus_abar[0], 1e-4, rtol=1e-6)
    # The same from the rounded abar would be off in the fourth digit.
    assert abs((1 - schedule.abar[0]) / 1e-4 - 1) > 1e-5


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="has 0 steps"):
        schedules.cosine(0)
    with pytest.raises(ValueError, match=r"betas in \(0, 1\), found .* to 1\.5"):
        schedules.from_betas(np.array([0.1, 1.5]))
    with pytest.raises(ValueError, match=r"found shape \(0,\)"):
        schedules.from_betas(np.array([]))


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_step_outside_the_schedule_is_named_with_the_range(t: int) -> None:
    with pytest.raises(ValueError, match=f"test_t is {t}.*T = 1000.*from 0 to 999"):
        schedules.check_t("test_t", t, 1000)
    schedules.check_t("test_t", 999, 1000)
