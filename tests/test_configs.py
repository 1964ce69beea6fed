import ast
import dataclasses
import enum
import importlib
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from configs import _parts, smoke
from uad_jax import config as config_lib
from uad_jax import optim, types
from uad_jax.data import config as data_config
from uad_jax.methods import aae, base, cddpm
from uad_jax.methods.autoencoder import Variant
from uad_jax.nn.sequence import Mixer
from uad_jax.ops import augment

# ml_collections loads config files in a way that Python 3.15 will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).parent.parent

# Config file -> every argument that it documents.
ARGUMENTS = {
    "aae": [
        ",".join(filter(None, (variant, word)))
        for variant in ("", *(f"variant={one.value}" for one in aae.Variant))
        for word in ("", "paper", "cpu")
    ],
    "anovaegan": [
        ",".join(filter(None, (model, word)))
        for model in ("", "variant=aegan", "bottleneck=spatial")
        for word in ("", "baur2018", "baur2020", "paper", "cpu")
    ],
    "autoencoder": [
        ",".join(filter(None, (variant, word)))
        for variant in ("", *(f"variant={one.value}" for one in Variant))
        for word in ("", "paper", "cpu", "baur2018", "baur2020")
    ],
    "cddpm": ["", "paper", "cpu", "cpu,encoder=runs/spark"],
    "context": [
        ",".join(filter(None, (variant, word)))
        for variant in ("", "variant=ce", "variant=cevae")
        for word in ("", "paper", "cpu")
    ],
    "dae": ["", "paper", "cpu"],
    "ddpm": ["", "paper", "cpu", "anoddpm", "anoddpm,paper", "anoddpm,cpu"],
    "demo": ["", "quick"],
    "gmvae": ["", "paper", "cpu", "spatial", "spatial,paper", "spatial,cpu"],
    "interslice_vae": [
        ",".join(filter(None, (mixer, word)))
        for mixer in ("", *(f"mixer={mixer.value}" for mixer in Mixer))
        for word in ("", "layers=2", "paper", "cpu")
    ],
    "fanogan": [
        ",".join(filter(None, (stage, word)))
        for stage in ("", "stage=gan", "stage=encoder,gan=runs/gan")
        for word in ("", "paper", "cpu")
    ],
    "pddpm": ["", "paper", "cpu"],
    "spark": ["", "paper", "cpu"],
    "smoke": ["", *(f"variant={variant.value}" for variant in Variant)],
}
# Files with the words `paper` and `cpu`.
_SIZED = sorted(set(ARGUMENTS) - {"demo", "smoke"})
EXPERIMENTS = [(name, arg) for name, args in ARGUMENTS.items() for arg in args]


def _config(name: str, arg: str) -> config_lib.ExperimentConfig:
    return importlib.import_module(f"configs.{name}").get_config(arg)


def test_every_config_file_is_in_the_list() -> None:
    files = {path.stem for path in (ROOT / "configs").glob("[!_]*.py")}
    assert files == set(ARGUMENTS)


@pytest.mark.parametrize(("name", "arg"), EXPERIMENTS)
def test_config_builds_validates_and_serialises(name: str, arg: str) -> None:
    config = _config(name, arg)
    config_lib.validate(config)
    assert config_lib.to_json(config) == config_lib.to_json(_config(name, arg))


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_config_heading_says_what_it_needs(name: str) -> None:
    heading = importlib.import_module(f"configs.{name}").__doc__
    for word in ("Paper:", "Command:", "Hardware:", "Expected:"):
        assert word in heading


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_config_refuses_unknown_words(name: str) -> None:
    with pytest.raises(ValueError, match="'papr' is unknown"):
        _config(name, "papr")


def test_paper_settings_are_those_of_the_released_code() -> None:
    for variant, batch, dropout in (("ae", 128, 0.2), ("vae", 8, 0.1)):
        config = _config("autoencoder", f"variant={variant},paper")
        method: Any = config.method
        assert config.batch_size == batch
        assert method.dropout == dropout
        assert (method.latent_size, method.intermediate_resolution) == (128, 8)
        assert (method.optimizer.learning_rate, method.optimizer.b1) == (1e-4, 0.5)
        assert (method.norm.value, method.reduction.value) == ("none", "sum")
        assert (method.pixel_loss.value, method.kl_weight) == ("l1", 1.0)
        assert (method.residual.value, method.sample_at_test) == ("positive", True)
    assert _config("autoencoder", "variant=ae_spatial,paper").batch_size == 8


def test_the_reconstruction_of_the_first_paper_has_its_map_and_reduction() -> None:
    config = _config("autoencoder", "variant=vae_spatial,baur2018")
    method: Any = config.method
    assert (method.intermediate_resolution, method.latent_channels) == (16, 64)
    assert method.reduction.value == "mean"
    assert (method.optimizer.learning_rate, method.optimizer.b1) == (1e-4, 0.5)
    assert method.residual.value == "positive"
    beside: Any = _config("anovaegan", "bottleneck=spatial,baur2018").method
    assert (method.sample_at_test, method.dropout) == (False, 0.1)
    assert (beside.sample_at_test, beside.network.dropout) == (False, 0.1)
    later = _config("autoencoder", "baur2020")
    assert config_lib.to_json(later) == config_lib.to_json(
        _config("autoencoder", "paper")
    )


def test_published_adversarial_models_keep_their_settings() -> None:
    config = _config("anovaegan", "paper")
    method: Any = config.method
    assert config.batch_size == 128
    assert (method.network.latent_size, method.network.intermediate_resolution) == (
        128,
        8,
    )
    assert (method.critic.steps, method.critic.penalty_weight) == (5, 10.0)
    assert (method.critic.adversary.value, method.joint) == ("wgan_gp", False)
    assert (method.kl_weight, method.compat.value) == (1.0, "denner")
    assert (method.reduction.value, method.pixel_loss.value) == ("sum", "l1")
    adam = optim.OptimizerConfig(learning_rate=1e-4, b1=0.5, b2=0.9)
    assert method.optimizer == method.critic.optimizer == adam
    first: Any = _config("anovaegan", "baur2018").method
    assert (first.critic.adversary.value, first.joint) == ("log_loss", True)
    assert (first.critic.steps, first.patch_critic) == (1, False)
    assert (first.kl_weight, first.adversarial_weight) == (1.0, 1e-2)
    assert first.reduction.value == "mean"
    longer = optim.OptimizerConfig(learning_rate=1e-4, b1=0.5, b2=0.999)
    assert first.optimizer == first.critic.optimizer == longer


def test_slabs_of_two_cores_are_16_slices_per_step_like_the_other_methods() -> None:
    others = _config("autoencoder", "cpu")
    for mixer in Mixer:
        config: Any = _config("interslice_vae", f"mixer={mixer.value},cpu")
        assert config.batch_size * config.method.slabs.num_slices == others.batch_size
        assert config.total_steps == others.total_steps
        assert config.method.mixer.kind is mixer


def test_published_adversarial_autoencoders_keep_their_settings() -> None:
    for variant, batch, rate, latent, penalty, hidden in (
        ("aae", 128, 1e-4, 128, 10.0, (50, 50)),
        ("constrained_aae", 8, 1e-3, 128, 1.0, (100, 50)),
        ("constrained_ae", 8, 1e-3, 1024, 1.0, (100, 50)),
    ):
        config = _config("aae", f"variant={variant},paper")
        method: Any = config.method
        assert config.batch_size == batch
        assert method.optimizer.learning_rate == rate
        assert method.critic.optimizer.learning_rate == rate
        assert method.network.latent_size == latent
        assert method.network.intermediate_resolution == 16
        assert method.critic.penalty_weight == penalty
        assert method.critic_hidden == hidden
        assert (method.first_steps, method.critic.steps) == (20, 20)
        assert method.first_epochs == (0 if variant == "constrained_ae" else 6)
        assert (method.constraint_weight, method.compat.value) == (1.0, "denner")
        beta2 = 0.999 if variant == "constrained_ae" else 0.9
        assert (method.optimizer.b1, method.optimizer.b2) == (0.5, beta2)
        assert (method.pixel_loss.value, method.reduction.value) == ("l2", "mean")


def test_published_fanogan_keeps_its_settings() -> None:
    config = _config("fanogan", "stage=gan,paper")
    gan: Any = config.method
    second = _config("fanogan", "stage=encoder,gan=runs/gan,paper")
    encoder: Any = second.method
    assert config.batch_size == second.batch_size == 8
    assert gan.network.intermediate_resolution == 16
    assert gan.network.latent_size == 128
    assert (gan.critic.steps, gan.critic.penalty_weight) == (5, 10.0)
    assert gan.compat.value == "denner"
    adam = optim.OptimizerConfig(learning_rate=1e-3, b1=0.5, b2=0.9)
    assert gan.optimizer == gan.critic.optimizer == encoder.optimizer == adam
    assert (encoder.feature_weight, encoder.residual.value) == (1.0, "positive")


def test_published_mixture_and_context_models_keep_their_settings() -> None:
    for word, size, steps in (("paper", 128, 3), ("spatial,paper", 1, 150)):
        config = _config("gmvae", word)
        method: Any = config.method
        assert (config.batch_size, method.optimizer.learning_rate) == (8, 5e-5)
        assert (method.latent_size, method.num_components) == (size, 9)
        assert (method.intermediate_resolution, method.free_bits) == (8, 1.0)
        assert method.compat.value == "denner"
        restoration = method.score.restoration
        assert method.score.kind.value == "restoration"
        assert (restoration.num_steps, restoration.sampled) == (steps, True)
        assert (restoration.step_size, restoration.tv_weights) == (1e-3, (1.8,))
        assert (method.residual.value, method.sample_at_test) == ("positive", True)
    for variant, rate, residual in (("ce", 1e-3, "positive"), ("cevae", 1e-4, "abs")):
        config = _config("context", f"variant={variant},paper")
        method = config.method
        assert (config.batch_size, method.optimizer.learning_rate) == (8, rate)
        assert (method.residual.value, method.compat.value) == (residual, "denner")


def test_both_stages_of_fanogan_share_their_networks() -> None:
    for word in ("", "paper", "cpu"):
        first: Any = _config("fanogan", f"stage=gan,{word}").method
        config = _config("fanogan", f"stage=encoder,gan=runs/gan,{word}")
        second: Any = config.method
        assert (first.network, first.critic_norm) == (
            second.network,
            second.critic_norm,
        )
        assert config.train.warm_start == [
            config_lib.WarmStart("runs/gan", -1, name, name)
            for name in ("generator", "critic")
        ]
    for arg in ("stage=encoder", "stage=gan,gan=runs/gan"):
        with pytest.raises(ValueError, match="needs gan=WORKDIR"):
            _config("fanogan", arg)


def test_published_diffusion_models_keep_their_budget_and_noise() -> None:
    for name, film in (("ddpm", False), ("pddpm", True)):
        config = _config(name, "paper")
        method: Any = config.method
        assert (config.batch_size, config.total_steps) == (32, 19_200)
        assert config.batch_size * config.total_steps == config.reference_slices
        assert method.unet.film is film
        assert (method.optimizer.learning_rate, method.ema_decay) == (1e-4, 0.0)
        process = method.process
        assert (process.shared_noise, process.unit_variance) == (True, False)
        assert config.data.sampling is data_config.Sampling.ONE_PER_VOLUME
        assert (process.noise.value, process.prediction.value) == ("simplex", "x0")
        assert (process.schedule.value, process.pixel_loss.value) == ("cosine", "l1")
        assert method.scoring.test_steps == (499,)
        modern: Any = _config(name, "")
        assert modern.batch_size * modern.total_steps == config.reference_slices
        assert not modern.method.process.shared_noise


def test_published_pddpm_trains_on_four_boxes() -> None:
    method: Any = _config("pddpm", "paper").method
    assert (method.patch, method.stride, method.boxes.value) == (48, 0, "grid")


def test_published_anoddpm_is_the_released_code() -> None:
    config = _config("ddpm", "anoddpm,paper")
    assert (config.batch_size, config.total_steps) == (1, 300_000)
    ano: Any = config.method
    assert (ano.way.value, ano.sampler.value, ano.clip) == ("chain", "ddpm_beta", True)
    assert (ano.scoring.test_steps, ano.chain_calls) == ((249,), 0)
    assert ano.scoring.residual.value == "squared"
    process = ano.process
    assert (process.noise.value, process.train_steps) == ("simplex_3d", 800)
    assert (process.schedule.value, process.num_steps) == ("linear", 1000)
    assert (process.prediction.value, process.pixel_loss.value) == ("eps", "l2")
    assert (ano.unet.attention_levels, ano.unet.num_heads) == ((3, 4, 5), 2)
    assert (ano.ema_decay, ano.optimizer.clip_norm) == (0.9999, 1.0)
    assert ano.optimizer.learning_rate == 1e-4


@pytest.mark.parametrize("name", ["ddpm", "pddpm", "cddpm"])
def test_modern_diffusion_models_are_made_for_an_accelerator(name: str) -> None:
    config = _config(name, "")
    method: Any = config.method
    assert (config.batch_size, method.precision.value) == (128, "bfloat16")
    assert method.process.shared_noise is False
    assert method.ema_decay == (0.0 if name == "cddpm" else 0.999)


@pytest.mark.parametrize(
    ("name", "arg", "side", "expected"),
    [
        ("ddpm", "paper", 96, 34_493_313),
        ("pddpm", "paper", 96, 37_513_857),
        ("ddpm", "anoddpm,paper", 256, 131_649_793),
        ("cddpm", "paper", 96, 44_068_481 + 24_550_848),
        ("spark", "paper", 96, 37_964_305),
        ("dae", "paper", 128, 7_701_825),
        ("context", "variant=ce,paper", 128, 1_625_777),
        ("context", "variant=cevae,paper", 128, 1_756_977),
    ],
)
def test_published_models_have_their_size(
    name: str, arg: str, side: int, expected: int
) -> None:
    config = _config(name, arg)
    rows = jnp.zeros(1, jnp.int32)
    batch = types.Batch(
        image=jnp.zeros((1, side, side, 1)),
        mask=jnp.zeros((1, side, side, 1), bool),
        valid=rows > 0,
        uid=rows,
        slice_index=rows,
    )
    method = config.method.make(base.RunShape(config.total_steps, 12, 32))
    state = jax.eval_shape(method.init, jax.random.key(0), batch)
    leaves = jax.tree.leaves(state.model.params)
    assert sum(leaf.size for leaf in leaves) == expected


def test_published_pretraining_and_condition_keep_their_budget_and_settings() -> None:
    for name in ("cddpm", "spark"):
        for arg, batch in (("paper", 32), ("", 128)):
            config = _config(name, arg)
            assert config.batch_size == batch
            assert batch * config.total_steps == 460_800 == config.reference_slices
    conditioned: Any = _config("cddpm", "paper").method
    assert conditioned.scoring.test_steps == (249, 499, 749)
    assert conditioned.encoder == cddpm.EncoderConfig(512, (3, 4, 6, 3), 64, 0.05)
    assert conditioned.augment == augment.AugmentConfig()
    assert (conditioned.process.shared_noise, conditioned.unet.film) == (True, True)
    assert conditioned.optimizer == optim.OptimizerConfig(learning_rate=1e-4)
    hidden: Any = _config("spark", "paper").method
    assert (hidden.mask_ratio, hidden.decoder_width) == (0.65, 512)
    assert hidden.optimizer == optim.OptimizerConfig(
        learning_rate=1e-4, b2=0.95, weight_decay=0.05
    )


def test_the_published_context_encoders_keep_the_settings_of_the_released_code() -> (
    None
):
    for variant, rate in (("ce", 1e-3), ("cevae", 1e-4)):
        config = _config("context", f"variant={variant},paper")
        method: Any = config.method
        assert (config.batch_size, method.dropout) == (8, 0.1)
        assert (method.latent_size, method.intermediate_resolution) == (128, 8)
        assert (method.optimizer.learning_rate, method.optimizer.b1) == (rate, 0.5)
        assert (method.max_squares, method.square_side) == (3, 0)
        assert (method.weighting.value, method.kl_weight) == ("equal", 1.0)
        assert method.compat.value == "denner"
    score = method.score
    assert (score.kind.value, score.gradient.of.value) == ("gradient", "elbo")
    assert (score.gradient.scale.value, score.gradient.times_residual) == ("none", True)
    assert (score.gradient.smoothing, score.gradient.samples) == (0, 1)


def test_the_published_denoising_autoencoder_keeps_its_budget_and_settings() -> None:
    config = _config("dae", "paper")
    assert (config.batch_size, config.total_steps) == (16, 67_200)
    method: Any = config.method
    assert (method.width, method.num_levels, method.shared_shift) == (64, 4, True)
    assert (method.noise_cells, method.noise_deviation) == (16, 0.2)
    adam = method.optimizer
    assert (adam.learning_rate, adam.l2, adam.clip_norm) == (1e-4, 1e-5, 0.5)
    assert (adam.amsgrad, adam.half_period) == (True, 100 * 32)
    assert adam.schedule is optim.Schedule.COSINE_PERIODIC
    modern = _config("dae", "")
    assert modern.batch_size * modern.total_steps == config.reference_slices


def test_the_encoder_of_a_pretraining_run_fits_the_conditioned_model() -> None:
    for size in ("", "paper", "cpu"):
        words = ",".join(filter(None, (size, "encoder=runs/spark")))
        config = _config("cddpm", words)
        (entry,) = config.train.warm_start
        assert entry == config_lib.WarmStart(
            "runs/spark", -1, "spark/backbone", "encoder/backbone"
        )
        method: Any = config.method
        source: Any = _config("spark", size).method
        assert method.encoder.stage_sizes == source.stage_sizes
        assert method.encoder.width == source.width


def test_paper_and_cpu_exclude_each_other() -> None:
    for name in _SIZED:
        with pytest.raises(ValueError, match="only one of 'paper' and 'cpu'"):
            _config(name, "paper,cpu")


def test_cpu_configs_take_one_step_per_call_in_float32() -> None:
    small = [(name, "cpu") for name in _SIZED]
    for name, arg in (*small, ("ddpm", "anoddpm,cpu"), ("demo", ""), ("demo", "quick")):
        config = _config(name, arg)
        method: Any = config.method
        assert config.train.steps_per_call == 1
        assert method.precision.value == "float32"


def test_parse_reads_words_and_typed_values() -> None:
    given = _parts.parse(
        "variant=vae, cpu,fold=3", ("cpu",), {"variant": Variant, "fold": int}
    )
    assert given.words == {"cpu"}
    assert given.values == {"variant": Variant.VAE, "fold": 3}
    assert _parts.parse("") == (frozenset(), {})


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("cpuu", r"'cpuu' is unknown. Did you mean 'cpu'\?"),
        ("varaint=vae", r"Did you mean 'variant='\?"),
        ("variant=gan", "'variant=gan': expected one of ae, ae_spatial, vae"),
        ("cpu=1", "'cpu=1' is unknown"),
        ("fold", "'fold' is unknown"),
    ],
)
def test_parse_names_the_nearest_word(arg: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _parts.parse(arg, ("cpu",), {"variant": Variant, "fold": int})


def test_parse_reports_all_problems_at_once() -> None:
    with pytest.raises(ValueError, match=r"'a1'.*'b2'"):
        _parts.parse("a1,b2", ("cpu",))


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("config.lr_", "method.optimizer.learning_rate"),
        ("config.lr", "method.optimizer.learning_rate"),
        ("config.learning_rate", "method.optimizer.learning_rate"),
        ("config.batchsize", "batch_size"),
        ("config.method.kl", "method.kl_weight"),
        ("config.data.placment", "data.placement"),
        ("config.train.log_evry", "train.log_every"),
        ("config.total_stpes", "total_steps"),
    ],
)
def test_fault_A32_a_typo_names_the_nearest_field(key: str, field: str) -> None:
    message = _parts.nearest_field_error(smoke.get_config(), key)
    assert message == f"Unknown field '{key}'. Did you mean 'config.{field}'?"


def test_fault_A32_nonsense_names_no_field() -> None:
    message = _parts.nearest_field_error(smoke.get_config(), "config.qqqq")
    assert message == "Unknown field 'config.qqqq'."


def _parsed(
    *overrides: str, config: str = "autoencoder.py:cpu"
) -> config_lib.ExperimentConfig:
    argv = ["run.py", f"--config={ROOT}/configs/{config}", *overrides]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=argv
    )
    values(argv)
    return holder.value


def test_fields_are_overridable_from_the_command_line() -> None:
    config = _parsed(
        "--config.batch_size=8",
        "--config.method.optimizer.learning_rate=3e-3",
        "--config.method.variant=ae",
        "--config.method.norm=channel_affine",
        "--config.method.sample_at_test=true",
        "--config.data.placement=stream",
        "--config.data.store=some/where",
        "--config.evaluation.healthy_fpr=0.1",
    )
    method: Any = config.method
    assert config.batch_size == 8
    assert method.optimizer.learning_rate == 3e-3
    assert method.variant is Variant.AE
    assert method.norm.value == "channel_affine"
    assert method.sample_at_test is True
    assert config.data.placement is data_config.Placement.STREAM
    assert config.data.store == "some/where"
    assert config.evaluation.healthy_fpr == 0.1
    config_lib.validate(config)


def test_nested_fields_and_lists_of_steps_are_overridable() -> None:
    config = _parsed(
        "--config.method.scoring.test_steps=(249, 499, 749)",
        "--config.method.unet.multipliers=(1, 2)",
        "--config.method.process.noise=gaussian",
        "--config.method.scoring.residual=ssim",
        "--config.method.patch=60",
        config="pddpm.py:cpu",
    )
    method: Any = config.method
    assert method.scoring.test_steps == (249, 499, 749)
    assert method.unet.multipliers == (1, 2)
    assert method.process.noise.value == "gaussian"
    assert method.scoring.residual.value == "ssim"
    assert method.patch == 60
    config_lib.validate(config)
    again = _config("pddpm", "cpu")
    config_lib.fill(again, json.loads(config_lib.to_json(config)))
    assert config_lib.to_json(again) == config_lib.to_json(config)


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in _parts.field_paths(smoke.get_config())
        if path not in ("train.warm_start", "evaluation.sets")
    ],
)
def test_every_plain_field_accepts_an_override(path: str) -> None:
    value: Any = _config("autoencoder", "cpu")
    for part in path.split("."):
        value = getattr(value, part)
    text = value.name if isinstance(value, enum.Enum) else str(value)
    changed: Any = _parsed(f"--config.{path}={text}")
    for part in path.split("."):
        changed = getattr(changed, part)
    assert changed == value


def test_fault_A32_config_flags_refuse_an_unknown_field() -> None:
    with pytest.raises((KeyError, AttributeError)):
        _parsed("--config.lr_=1")


def _config_classes() -> set[type]:
    """Every dataclass that occurs in an experiment."""
    waiting: list[Any] = [_config(*experiment) for experiment in EXPERIMENTS]
    waiting += [config_lib.WarmStart(), config_lib.EvaluationSet()]
    found = set()
    while waiting:
        value = waiting.pop()
        if dataclasses.is_dataclass(value):
            found.add(type(value))
            waiting += [getattr(value, f.name) for f in dataclasses.fields(value)]
    return found


def _attributes_read() -> set[str]:
    """Attribute names that uad_jax reads, other than to check them."""

    class Reader(ast.NodeVisitor):
        def __init__(self) -> None:
            self.names: set[str] = set()

        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            if node.name != "validate":
                self.generic_visit(node)

        def visit_Attribute(self, node: ast.Attribute) -> None:
            if isinstance(node.ctx, ast.Load):
                self.names.add(node.attr)
            self.generic_visit(node)

        def visit_Subscript(self, node: ast.Subscript) -> None:
            if isinstance(node.slice, ast.Constant):  # of a stored config.json
                self.names.add(str(node.slice.value))
            self.generic_visit(node)

    reader = Reader()
    for path in [*ROOT.glob("uad_jax/**/*.py"), ROOT / "run.py"]:
        reader.visit(ast.parse(path.read_text()))
    return reader.names


def test_every_config_field_is_read_somewhere() -> None:
    read = _attributes_read()
    unread = {
        f"{cls.__name__}.{field.name}"
        for cls in _config_classes()
        for field in dataclasses.fields(cls)
        if field.name not in read
    }
    assert not unread
    assert "a_field_that_nobody_reads" not in read


def test_config_fields_are_described() -> None:
    for cls in _config_classes():
        described = cls.__doc__ or ""
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if f"{field.name}:" not in described
        ]
        assert not missing, f"{cls.__name__}: {missing}"


def test_no_config_module_hides_types_behind_strings() -> None:
    for cls in _config_classes():
        source = pathlib.Path(sys.modules[cls.__module__].__file__ or "").read_text()
        assert "from __future__ import annotations" not in source
