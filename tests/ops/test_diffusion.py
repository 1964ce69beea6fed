"""Diffusion against hand values, float64 loops and the theory."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.ops import diffusion, schedules
from uad_jax.ops.diffusion import Prediction, Sampler

SHAPE = (3, 4, 5, 1)
COSINE = schedules.cosine()
SHORT = schedules.cosine(20)


def _normal(seed: int, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _keys(count: int = 3, seed: int = 7) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def _waves(keys: jax.Array, t: jax.Array) -> jax.Array:
    """Noise that compiles fast: own for [N] keys, shared for one key."""
    data = jax.random.key_data(keys).reshape(-1, 2)
    phase = (data % 997).astype(jnp.float32).sum(-1).reshape(-1, 1, 1, 1)
    pixel = jnp.arange(np.prod(SHAPE[1:]), dtype=jnp.float32).reshape(1, *SHAPE[1:])
    field = 1.4 * jnp.sin(phase + 1.7 * pixel)
    return jnp.broadcast_to(field, (*t.shape, *SHAPE[1:]))


def _rows(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).reshape(-1, 1, 1, 1)


def _perfect(kind: Prediction, x0: jax.Array, schedule: schedules.Schedule):
    """A denoiser that knows the clean image."""

    def denoise(xt: jax.Array, t: jax.Array) -> jax.Array:
        return diffusion.from_x0(schedule, kind, x0, xt, t)

    return denoise


def _abar64(num_steps: int) -> np.ndarray:
    """Signal shares from the definition of the cosine schedule, [T] float64."""
    signal = [
        np.cos((i / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
        for i in range(num_steps + 1)
    ]
    abar = [1.0]
    for i in range(num_steps):
        abar.append(abar[-1] * (1 - min(1 - signal[i + 1] / signal[i], 0.999)))
    return np.array(abar[1:])


def test_noising_takes_the_hand_computed_shares() -> None:
    x0, eps = jnp.full(SHAPE, 0.5), jnp.full(SHAPE, -2.0)
    t = jnp.array([0, 499, 999])
    found = jax.jit(diffusion.q_sample)(COSINE, x0, t, eps)
    abar = np.array([0.9999587, 0.493844, 2.43e-9])
    expected = 0.5 * np.sqrt(abar) - 2.0 * np.sqrt(1 - abar)
    np.testing.assert_allclose(found[:, 0, 0, 0], expected, atol=2e-5)
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1, :1, :1], SHAPE))


@pytest.mark.parametrize("kind", list(Prediction))
def test_conversions_invert_each_other(kind: Prediction) -> None:
    x0, eps = _normal(0), _normal(1)
    t = jnp.array([0, 300, 700])
    xt = diffusion.q_sample(COSINE, x0, t, eps)
    prediction = diffusion.from_x0(COSINE, kind, x0, xt, t)
    back = diffusion.to_x0(COSINE, kind, prediction, xt, t)
    np.testing.assert_allclose(back, x0, atol=2e-5)


def test_eps_and_v_have_their_defining_values() -> None:
    x0, eps, t = _normal(0), _normal(1), jnp.array([250, 500, 900])
    xt = diffusion.q_sample(COSINE, x0, t, eps)
    abar = _rows(_abar64(1000)[np.asarray(t)])
    found = diffusion.from_x0(COSINE, Prediction.EPS, x0, xt, t)
    np.testing.assert_allclose(found, eps, atol=1e-5)
    found = diffusion.from_x0(COSINE, Prediction.V, x0, xt, t)
    expected = np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_clipping_limits_the_reconstruction_only_where_asked() -> None:
    x0, t = jnp.full(SHAPE, 3.0), jnp.array([10, 10, 10])
    predict = functools.partial(diffusion.to_x0, COSINE, Prediction.X0, x0, x0, t)
    assert float(predict().max()) == 3.0
    assert float(predict(1.0).max()) == 1.0


def test_predictions_of_low_precision_become_float32() -> None:
    x, t = _normal(0), jnp.array([1, 2, 3])
    half = x.astype(jnp.bfloat16)
    for kind in Prediction:
        assert diffusion.to_x0(COSINE, kind, half, x, t).dtype == jnp.float32


def test_posterior_equals_a_float64_loop_between_any_two_steps() -> None:
    x0, xt, abar = _normal(0, (9, 2, 2, 1)), _normal(1, (9, 2, 2, 1)), _abar64(1000)
    t = np.array([1, 2, 50, 250, 499, 749, 999, 0, 600])
    s = np.array([0, 1, 49, 249, 498, 748, 998, -1, 100])
    mean, variance = jax.jit(diffusion.posterior)(COSINE, x0, xt, t, s)
    for n in range(9):
        a_t, a_s = abar[t[n]], abar[s[n]] if s[n] >= 0 else 1.0
        ratio = a_t / a_s
        expected = np.sqrt(a_s) * (1 - ratio) / (1 - a_t) * np.float64(x0[n]) + np.sqrt(
            ratio
        ) * (1 - a_s) / (1 - a_t) * np.float64(xt[n])
        np.testing.assert_allclose(mean[n], expected, rtol=5e-5, atol=5e-6)
        expected = (1 - a_s) / (1 - a_t) * (1 - ratio)
        np.testing.assert_allclose(variance[n], expected, rtol=5e-5)


def test_last_ancestral_step_is_the_clean_estimate_without_noise() -> None:
    x0, xt, noise = _normal(0), _normal(1), _normal(2)
    t, s = jnp.array([0, 5, 19]), jnp.array([-1, -1, -1])
    for posterior_variance in (True, False):
        found = diffusion.ddpm_step(SHORT, x0, xt, t, s, noise, posterior_variance)
        np.testing.assert_allclose(found, x0, atol=1e-6)


def test_beta_variance_is_the_larger_one_of_anoddpm() -> None:
    schedule, zero = schedules.linear(), jnp.zeros(SHAPE)
    t, ones = jnp.array([1, 100, 900]), jnp.ones(SHAPE)
    found = diffusion.ddpm_step(schedule, zero, zero, t, t - 1, ones, False)
    beta = np.linspace(1e-4, 0.02, 1000)[np.asarray(t)]
    np.testing.assert_allclose(found[:, 0, 0, 0], np.sqrt(beta), rtol=2e-5)
    small = diffusion.ddpm_step(schedule, zero, zero, t, t - 1, ones)
    assert (np.asarray(small) < np.asarray(found)).all()


@pytest.mark.parametrize("gap", [1, 7])
def test_ddim_with_eta_one_is_the_ancestral_step(gap: int) -> None:
    x0, xt, noise = _normal(0), _normal(1), _normal(2)
    t = jnp.array([7, 12, 19])
    eps = diffusion.from_x0(SHORT, Prediction.EPS, x0, xt, t)
    found = diffusion.ddim_step(SHORT, x0, eps, t, t - gap, noise, 1.0)
    expected = diffusion.ddpm_step(SHORT, x0, xt, t, t - gap, noise)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_keeps_the_marginals_of_the_forward_process(eta: float) -> None:
    # With x0 known, x_s is sqrt(abar_s) x0 plus noise of variance 1 - abar_s.
    t, s = jnp.full((3,), 400), jnp.full((3,), 150)
    zero, one = jnp.zeros(SHAPE), jnp.ones(SHAPE)
    abar = _abar64(1000)[150]

    def weight(x0: jax.Array, eps: jax.Array, noise: jax.Array) -> float:
        out = diffusion.ddim_step(COSINE, x0, eps, t, s, noise, eta)
        return float(out[0, 0, 0, 0])

    assert abs(weight(one, zero, zero) - np.sqrt(abar)) < 1e-6
    variance = weight(zero, one, zero) ** 2 + weight(zero, zero, one) ** 2
    assert abs(variance - (1 - abar)) < 1e-6


def test_chains_list_their_steps_from_start_to_zero() -> None:
    assert diffusion.chain_steps(3).tolist() == [3, 2, 1, 0]
    assert diffusion.chain_steps(249).tolist() == list(range(249, -1, -1))
    assert diffusion.chain_steps(999, 1).tolist() == [999]
    assert diffusion.chain_steps(999, 4).tolist() == [999, 666, 333, 0]
    for start, calls in [(999, 37), (10, 8), (5, 6)]:
        steps = diffusion.chain_steps(start, calls)
        assert len(steps) == calls
        assert (np.diff(steps) < 0).all()
    with pytest.raises(ValueError, match=r"from t = 9 cannot make 11 .* 1 to .* 10"):
        diffusion.chain_steps(9, 11)
    with pytest.raises(ValueError, match="t = -1"):
        diffusion.chain_steps(-1)


@pytest.mark.parametrize("kind", list(Prediction))
def test_a_perfect_denoiser_recovers_the_image_in_one_call(kind: Prediction) -> None:
    x0, t = _normal(0), jnp.array([2, 250, 600])
    found = diffusion.denoise_once(
        _perfect(kind, x0, COSINE), COSINE, kind, x0, t, _normal(1)
    )
    np.testing.assert_allclose(found, x0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [*((Prediction.X0, s) for s in Sampler), *((k, Sampler.DDIM) for k in Prediction)],
)
def test_a_perfect_denoiser_recovers_the_image_by_any_chain(
    kind: Prediction, sampler: Sampler
) -> None:
    x0 = _normal(0)
    steps = diffusion.chain_steps(15, 6)
    chain = diffusion.Chain(SHORT, kind, steps, sampler, eta=0.5)
    denoise = _perfect(kind, x0, SHORT)
    found = jax.jit(lambda: diffusion.restore(denoise, chain, x0, _keys(), _waves))()
    np.testing.assert_allclose(found, x0, atol=1e-4)


def _toy(xt: jax.Array, t: jax.Array) -> jax.Array:
    """A denoiser that is wrong in a way that depends on image and step."""
    return 0.7 * jnp.tanh(xt) + _rows_jax(t) / 40.0


def _sample(chain: diffusion.Chain, x: jax.Array) -> jax.Array:
    run = functools.partial(diffusion.sample, _toy, chain, noise=_waves)
    return jax.jit(lambda x, keys: run(x, keys))(x, _keys())


def _rows_jax(t: jax.Array) -> jax.Array:
    return t.astype(jnp.float32).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("sampler", list(Sampler))
def test_chain_equals_a_float64_loop(sampler: Sampler, clip: float | None) -> None:
    """An independent loop in numpy, written from the papers' equations."""
    steps, eta = diffusion.chain_steps(17, 5), 0.3
    chain = diffusion.Chain(SHORT, Prediction.V, steps, sampler, eta, clip)
    x_start, keys = _normal(3), _keys()
    sample = jax.jit(lambda x, k: diffusion.sample(_toy, chain, x, k, _waves))
    found = sample(x_start, keys)

    abar, x = _abar64(20), np.float64(x_start)
    for i, t in enumerate(steps):
        a_t = abar[t]
        a_s = abar[steps[i + 1]] if i + 1 < len(steps) else 1.0
        v = 0.7 * np.tanh(x) + t / 40.0
        x0 = np.sqrt(a_t) * x - np.sqrt(1 - a_t) * v
        x0 = x0 if clip is None else np.clip(x0, -clip, clip)
        eps = (x - np.sqrt(a_t) * x0) / np.sqrt(1 - a_t)
        beta = 1 - a_t / a_s
        sigma = np.sqrt((1 - a_s) / (1 - a_t) * beta)
        if sampler is Sampler.DDIM:
            sigma *= eta
            mean = np.sqrt(a_s) * x0 + np.sqrt(1 - a_s - sigma**2) * eps
        else:
            mean = (np.sqrt(a_s) * beta * x0 + np.sqrt(a_t / a_s) * (1 - a_s) * x) / (
                1 - a_t
            )
        if sampler is Sampler.DDPM_BETA and a_s < 1:
            sigma = np.sqrt(beta)
        folded = diffusion.fold_in(keys, int(t))
        x = mean + sigma * np.float64(_waves(folded, jnp.full((3,), t)))
    np.testing.assert_allclose(found, x, atol=1e-4)


def test_chain_of_a_known_gaussian_ends_in_it() -> None:
    # Data N(m, r^2): the best estimate of x0 is linear, and the chain from pure noise
    # must end with mean m and standard deviation r.
    mean, std, count = 0.3, 0.5, 4096
    schedule = schedules.cosine(200)
    abar, rest = jnp.asarray(schedule.abar), jnp.asarray(schedule.one_minus_abar)

    def best(xt: jax.Array, t: jax.Array) -> jax.Array:
        a, b = abar[t].reshape(-1, 1, 1, 1), rest[t].reshape(-1, 1, 1, 1)
        gain = std**2 * jnp.sqrt(a) / (std**2 * a + b)
        return mean + gain * (xt - jnp.sqrt(a) * mean)

    def noise(keys: jax.Array, t: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.normal(key, (1, 1, 1)))(keys)

    x_start = _normal(3, (count, 1, 1, 1))
    for sampler in (Sampler.DDPM, Sampler.DDIM):
        chain = diffusion.Chain(
            schedule, Prediction.X0, diffusion.chain_steps(199), sampler
        )
        found = jax.jit(
            lambda c=chain: diffusion.sample(best, c, x_start, _keys(count), noise)
        )()
        assert abs(float(found.mean()) - mean) < 4 * std / np.sqrt(count)
        assert abs(float(found.std()) - std) < 0.03


def test_a_deterministic_chain_needs_no_keys_and_others_say_so() -> None:
    steps = diffusion.chain_steps(9)
    still = diffusion.Chain(SHORT, Prediction.X0, steps, Sampler.DDIM)
    run = jax.jit(lambda x: diffusion.sample(_toy, still, x))
    np.testing.assert_allclose(run(_normal(3)), _sample(still, _normal(3)), atol=1e-6)
    for chain in (still._replace(sampler=Sampler.DDPM), still._replace(eta=0.5)):
        with pytest.raises(ValueError, match="is random"):
            diffusion.sample(_toy, chain, _normal(3))


@pytest.mark.parametrize(
    ("steps", "eta", "message"),
    [
        ([20, 3], 0.0, "is 20, but the schedule has T = 20"),
        ([4, -1], 0.0, "is -1, but"),
        ([4, 4], 0.0, r"must fall, found \[4, 4\]"),
        ([4, 3], 1.5, "eta is 1.5"),
    ],
)
def test_chains_out_of_range_are_named(steps, eta: float, message: str) -> None:
    for array in (np.array(steps), jnp.array(steps)):
        chain = diffusion.Chain(SHORT, Prediction.X0, array, Sampler.DDIM, eta=eta)
        with pytest.raises(ValueError, match=message):
            diffusion.sample(_toy, chain, _normal(3), _keys(), _waves)


def test_a_step_beyond_the_schedule_is_named() -> None:
    for t in (20, -1):
        with pytest.raises(ValueError, match=f"is {t}, but the schedule has T = 20"):
            diffusion.q_sample(SHORT, _normal(3), jnp.array([0, 3, t]), _normal(4))


def test_place_in_the_batch_changes_nothing() -> None:
    chain = diffusion.Chain(SHORT, Prediction.X0, diffusion.chain_steps(9))
    restore = jax.jit(lambda x, k: diffusion.restore(_toy, chain, x, k, _waves))
    x0, keys, order = _normal(0), _keys(), np.array([2, 0, 1])
    straight = np.asarray(restore(x0, keys))
    np.testing.assert_array_equal(restore(x0[order], keys[order]), straight[order])
    assert np.abs(straight - restore(x0, _keys(seed=8))).max() > 0.01


def test_one_key_gives_all_samples_the_same_noise() -> None:
    chain = diffusion.Chain(SHORT, Prediction.X0, diffusion.chain_steps(9))
    restore = jax.jit(lambda x, k: diffusion.restore(_toy, chain, x, k, _waves))
    x0 = jnp.broadcast_to(_normal(0)[:1], SHAPE)
    shared = restore(x0, jax.random.key(1))
    np.testing.assert_array_equal(shared[0], shared[2])
    own = restore(x0, _keys())
    assert np.abs(np.asarray(own[0] - own[2])).max() > 0.01


def test_every_step_of_a_chain_draws_other_noise() -> None:
    seen = []

    def record(keys: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(
            lambda k, t: seen.append((k.tobytes(), int(t[0]))),
            jax.random.key_data(keys),
            t,
        )
        return _waves(keys, t)

    chain = diffusion.Chain(SHORT, Prediction.X0, diffusion.chain_steps(5))
    restore = jax.jit(lambda x, k: diffusion.restore(_toy, chain, x, k, record))
    jax.block_until_ready(restore(_normal(0), _keys()))
    jax.effects_barrier()
    assert sorted(t for _, t in seen) == [0, 1, 2, 3, 4, 5, 5]
    assert len({k for k, _ in seen}) == 7


def _count(jaxpr, name: str) -> int:
    """Equations of a kind in a jaxpr and all jaxprs inside it."""
    return sum(
        (equation.primitive.name == name)
        + sum(
            _count(j, name) for j in jax.extend.core.jaxprs_in_params(equation.params)
        )
        for equation in jaxpr.eqns
    )


def test_a_chain_is_one_scan_whose_memory_ignores_the_number_of_steps() -> None:
    calls, temporary = [], []
    x = jnp.zeros((3, 64, 64, 1))

    def denoise(xt: jax.Array, t: jax.Array) -> jax.Array:
        calls.append(1)
        return _toy(xt, t)

    for num_steps in (5, 500):
        steps = diffusion.chain_steps(num_steps - 1)
        chain = diffusion.Chain(COSINE, Prediction.X0, steps)
        run = functools.partial(diffusion.sample, denoise, chain, noise=_half)
        calls.clear()
        traced = jax.jit(lambda x, keys, run=run: run(x, keys)).trace(x, _keys())
        assert len(calls) == 1
        assert _count(traced.jaxpr.jaxpr, "scan") == 1
        assert _count(traced.jaxpr.jaxpr, "while") == 0
        memory = traced.lower().compile().memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
    one_image = x.nbytes // 3
    assert temporary[1] - temporary[0] < one_image


def _half(keys: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.full((3, 64, 64, 1), 0.5)


def test_new_images_keys_and_steps_reuse_the_program() -> None:
    traces = []

    @jax.jit
    def run(x: jax.Array, keys: jax.Array, steps: jax.Array) -> jax.Array:
        traces.append(1)
        chain = diffusion.Chain(SHORT, Prediction.X0, steps)
        return diffusion.restore(_toy, chain, x, keys, _waves)

    for seed, start in ((0, 15), (1, 9)):
        steps = diffusion.chain_steps(start, 8)
        run(_normal(seed), _keys(seed=seed), jnp.asarray(steps))
    assert len(traces) == 1


def test_randomness_of_ddim_may_be_traced() -> None:
    chain = diffusion.Chain(
        SHORT, Prediction.X0, diffusion.chain_steps(9), Sampler.DDIM
    )

    @jax.jit
    def run(eta: jax.Array) -> jax.Array:
        return jax.vmap(lambda e: _sample(chain._replace(eta=e), _normal(3)))(eta)

    found = run(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(found[0], _sample(chain, _normal(3)), atol=1e-5)
    ancestral = _sample(chain._replace(sampler=Sampler.DDPM), _normal(3))
    np.testing.assert_allclose(found[1], ancestral, atol=1e-4)
