"""The config: the order of overrides, refusals and their messages, and that a written config reads back equal."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import tomllib
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.grpo_loss import spec
from reason_rl.config import (
    Config,
    ConfigError,
    config_difference,
    dump_config,
    load_config,
    parse_command_line,
    table_of,
)
from reason_rl.config import checks as config_checks
from reason_rl.config import load as config_load
from reason_rl.config import reward as config_reward
from reason_rl.config import schema as config_schema
from reason_rl.config import task as config_task

DOTTED = [f"{name}.{key}" for name, section in table_of(Config()).items() for key in section]


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert "\n" not in str(error.value), "one line"
    return str(error.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- precedence


def test_nothing_given_is_the_defaults():
    assert load_config() == Config() == parse_command_line([])


def test_a_file_goes_over_the_defaults_and_an_override_over_the_file(tmp_path: Path):
    path = write(tmp_path, "[rl]\nsteps = 7\ngroup_size = 4\n[run]\nseed = 5\n")
    got = load_config(path, ["--rl.steps=9"])
    assert (got.rl.steps, got.rl.group_size, got.run.seed) == (9, 4, 5)
    assert got.rl.prompts_per_step == Config().rl.prompts_per_step


def test_the_last_override_wins():
    assert load_config(None, ["--rl.steps=1", "--rl.steps=2"]).rl.steps == 2


def test_a_section_given_in_part_keeps_its_own_defaults():
    # pretrain_optim's defaults are not OptimConfig's: a given key must not reset the others to the class's.
    got = load_config(None, ["--pretrain_optim.lr=0.5", "--loss.clip_low=0.1"])
    assert got.pretrain_optim == dataclasses.replace(Config().pretrain_optim, lr=0.5)
    assert got.loss == dataclasses.replace(Config().loss, clip_low=0.1)
    assert got.optim == Config().optim


def test_the_command_line_takes_both_ways_of_giving_a_value(tmp_path: Path):
    path = write(tmp_path, "[rl]\nsteps = 7\n")
    got = parse_command_line(["--rl.steps", "8", str(path), "--rl.group-size=4", "--name=a=b", "--optim.lr", "1e-3"])
    assert (got.rl.steps, got.rl.group_size, got.run.name, got.optim.lr) == (8, 4, "a=b", 1e-3)


def test_shorthands_set_the_common_keys():
    got = parse_command_line(["--device", "cpu", "--dtype=float32", "--seed", "3", "--name", "x", "--resume", "never"])
    assert (got.run.device, got.run.dtype, got.run.seed, got.run.name, got.run.resume) == (
        "cpu", "float32", 3, "x", "never")
    assert set(config_load.SHORTHANDS.values()) <= set(DOTTED)


# --- types


@pytest.mark.parametrize(("override", "value"), [
    ("run.tensorboard=false", False), ("run.tensorboard=True", True), ("rl.steps=1e2", 100), ("rl.steps=3.0", 3),
    ("optim.lr=1", 1.0), ("run.name=12", "12"), ("run.name=true", "true"), ("run.wandb_project=", ""),
])  # fmt: skip
def test_an_override_becomes_the_fields_type(override: str, value: object):
    section, key = override.split("=")[0].split(".")
    got = getattr(getattr(load_config(None, [f"--{override}"]), section), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(("override", "wanted"), [
    ("rl.steps=many", "int"), ("rl.steps=1.5", "int"), ("rl.steps=true", "int"), ("rl.steps=", "int"),
    ("rl.steps=[1]", "int"), ("rl.steps=null", "int"), ("rl.steps=" + "1" * 5000, "int"), ("optim.lr=fast", "float"),
    ("optim.lr=false", "float"), ("run.tensorboard=1", "bool"), ("run.tensorboard=yes", "bool"),
    ("optim.lr=NaN", "finite"), ("optim.lr=Infinity", "finite"), ("optim.lr=1e999", "finite"),
])  # fmt: skip
def test_a_wrong_type_names_key_and_wanted_type(override: str, wanted: str):
    message = refused(f"--{override}")
    assert message.startswith(f"{override.split('=')[0]} must be ") and wanted in message


@pytest.mark.parametrize(("line", "wanted"), [
    ("name = 3", "run.name must be str, got 3"), ("seed = [1]", r"run.seed must be int, got \[1\]"),
    ("num_threads = {a = 1}", "run.num_threads must be int"), ("tensorboard = 1", "run.tensorboard must be bool"),
    ("device = ['cpu']", "run.device must be str"), ("dtype = 32", "run.dtype must be one of"),
])  # fmt: skip
def test_a_wrong_type_in_the_file_is_refused_too(tmp_path: Path, line: str, wanted: str):
    with pytest.raises(ConfigError, match=wanted):
        load_config(write(tmp_path, f"[run]\n{line}\n"))


def literal_fields() -> list[tuple[str, tuple[str, ...]]]:
    found = []
    for section in dataclasses.fields(Config):
        hints = typing.get_type_hints(type(getattr(Config(), section.name)))
        choices = {key: typing.get_args(hint) for key, hint in hints.items()}
        found += [(f"{section.name}.{key}", words) for key, words in choices.items() if words and f"{section.name}.{key}" in DOTTED]
    return found


@pytest.mark.parametrize(("dotted", "choices"), literal_fields())
def test_a_choice_takes_its_words_and_refuses_others_by_listing_them(dotted: str, choices: tuple[str, ...]):
    assert dotted and choices
    for choice in choices:
        got = load_config(None, [f"--{dotted}={choice}"])
        section, key = dotted.split(".")
        assert getattr(getattr(got, section), key) == choice
    assert refused(f"--{dotted}=nonsense") == f"{dotted} must be one of {list(choices)}, got 'nonsense'"


# --- unknown keys


@pytest.mark.parametrize(("override", "nearest"), [
    ("rl.group_sizes=4", "'rl.group_size'"), ("rl.stpes=4", "'rl.steps'"),
    ("model.num_hidden_layer=2", "'model.num_hidden_layers'"),
    ("samplin.top_k=4", "'sampling'"), ("sed=1", "'seed'"), ("divice=cpu", "'device'"),
    ("optim.learning_rate=1", "known"),
])  # fmt: skip
def test_an_unknown_key_names_the_nearest(override: str, nearest: str):
    message = refused(f"--{override}")
    assert override.split("=")[0].split(".")[0] in message and nearest in message


def test_an_unknown_key_in_the_file_names_the_nearest(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"unknown config key rl\.grup_size; did you mean 'rl\.group_size'"):
        load_config(write(tmp_path, "[rl]\ngrup_size = 4\n"))
    with pytest.raises(ConfigError, match=r"unknown config section \[modell\]; did you mean 'model'"):
        load_config(write(tmp_path, "[modell]\nnum_layers = 4\n"))


def test_a_key_in_place_of_a_section_is_refused_even_with_an_override(tmp_path: Path):
    path = write(tmp_path, "rl = 3\n")
    for overrides in ([], ["--rl.steps=4"]):
        with pytest.raises(ConfigError, match=r"\[rl\] must be a table of keys, got 3"):
            load_config(path, overrides)


def test_a_missing_file_lists_its_neighbours(tmp_path: Path):
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no config file at .*rum\.toml; there are .*run\.toml"):
        load_config(tmp_path / "rum.toml")
    with pytest.raises(ConfigError, match="no config file at"):
        load_config(tmp_path / "nowhere" / "run.toml")


def test_an_error_in_toml_or_utf8_names_the_path(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML"):
        load_config(write(tmp_path, "[rl\n"))
    (tmp_path / "run.toml").write_bytes(b'[run]\nname = "\xff"\n')
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML"):
        load_config(tmp_path / "run.toml")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--rl.steps"], "--rl.steps needs a value"), (["--rl.steps", "--seed=1"], "--rl.steps needs a value"),
    (["a.toml", "b.toml"], "one config file at most, got a.toml and b.toml"),
    (["--steps=3"], "an override reads --section.key=value"),
])  # fmt: skip
def test_a_malformed_command_line_is_a_clear_error(arguments: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        parse_command_line(arguments)


# --- impossible values


@pytest.mark.parametrize(("overrides", "words"), [
    ("rl.group_size=1", "rl.group_size must be at least 2 with rl.advantage='std', got 1"),
    ("rl.group_size=1 rl.advantage=mean", "at least 2 with rl.advantage='mean'"),
    ("rl.group_size=1 rl.advantage=leave_one_out", "at least 2 with rl.advantage='leave_one_out'"),
    ("rl.group_size=1 rl.advantage=batch_std", "at least 2 with rl.advantage='batch_std'"),
    ("rl.prompts_per_step=3 rl.group_size=3 rl.num_minibatches=2", "= 9 must be divisible by rl.num_minibatches = 2"),
    ("model.num_attention_heads=6 model.num_key_value_heads=4",
     "model.num_attention_heads = 6 must be divisible by model.num_key_value_heads = 4"),
    ("model.num_attention_heads=2 model.num_key_value_heads=4",
     "model.num_attention_heads = 2 must be divisible by model.num_key_value_heads = 4"),
    ("model.num_experts=4 model.num_experts_per_tok=5", "at most model.num_experts = 4, got 5"),
    ("model.head_dim=33", "model.head_dim must be even (RoPE rotates pairs), got 33"),
    ("sampling.max_tokens=256", "leaves no room for a prompt in model.max_position_embeddings = 256"),
    ("sampling.temperature=0", "sampling.temperature must be above 0 for RL"),
    ("sampling.temperature=-1 rl.steps=0", "sampling.temperature must be at least 0, got -1"),
    ("sampling.top_k=5", "needs loss.importance='tis' or 'icepop'"),
    ("sampling.top_p=0.9", "needs loss.importance='tis' or 'icepop'"),
    ("sampling.min_p=0.1 rl.old_logprobs=recompute", "needs loss.importance='tis' or 'icepop'"),
    ("pretrain.direct_share=0.8 pretrain.worked_share=0.3", "must be at most 1, got 0.8 + 0.3"),
    ("task.heldout_share=0.5 task.rl_share=0.5", "must leave problems for the corpus, got 0.5 + 0.5"),
    ("task.min_level=9", "task.min_level = 9 is above task.max_level = 8"),
    ("pretrain.min_level=9", "pretrain.min_level = 9 is above task.max_level = 8"),
    ("reward.overlong=1 reward.overlong_buffer=0", "reward.overlong_buffer must be in 1..80"),
    ("reward.overlong=1 reward.overlong_buffer=81", "reward.overlong_buffer must be in 1..80"),
    ("run.name=", "run.name must be the name of a folder in runs/, and not stages"), ("run.name=stages", "got 'stages'"),
    ("run.name=..", "run.name must be the name of a folder"),
    ("run.name=a/b", "run.name must be the name of a folder"),
    ("run.device=gpu", "run.device must be auto, cpu, cuda or cuda:<number>, got 'gpu'"),
    ("run.device=cuda:", "run.device must be auto"),
    ("loss.clip_low=2", "loss.clip_low must be in [0, 1], got 2"),
    ("loss.dual_clip=0.5", "loss.dual_clip must be 0 (off) or above 1, got 0.5"),
])  # fmt: skip
def test_what_cannot_run_is_refused_before_work_starts(overrides: str, words: str):
    assert words in refused(*(f"--{o}" for o in overrides.split()))


@pytest.mark.parametrize("overrides", [
    "sampling.temperature=0 rl.steps=0",
    "sampling.max_tokens=256 model.init_from=checkpoint",
    "sampling.top_k=5 rl.old_logprobs=recompute loss.importance=icepop",
    "sampling.top_p=0.9 loss.importance=tis",
    "sampling.max_tokens=8 reward.overlong_buffer=16",
    "pretrain.direct_share=0.7 pretrain.worked_share=0.3",
    "model.num_experts=1 model.intermediate_size=64",
    "model.intermediate_size=64",
    "run.device=cuda:1",
])  # fmt: skip
def test_what_can_run_passes(overrides: str):
    load_config(None, [f"--{o}" for o in overrides.split()])


BELOW = [(key, bad) for keys, bads in [
    (config_checks.POSITIVE, (0, -1)), (config_checks.NOT_NEGATIVE, (-1,)),
    (config_checks.SHARES, (-1, 2)), (config_checks.BETAS, (-1, 1)),
] for key in keys for bad in bads]  # fmt: skip


@pytest.mark.parametrize(("dotted", "value"), BELOW)
def test_each_range_is_checked(dotted: str, value: int):
    assert refused(f"--{dotted}={value}").startswith(f"{dotted} must be ")


def test_every_number_of_the_config_has_a_range_or_a_reason_to_have_none():
    ranged = {*config_checks.POSITIVE, *config_checks.NOT_NEGATIVE, *config_checks.BETAS, *config_checks.SHARES}
    free = {"task.max_level"}  # checked to be above min_level
    free |= {k for k in DOTTED if k.startswith("reward.")}  # weights may punish
    free |= {k for k in DOTTED if k.startswith("loss.")}  # LossSpec checks its own
    numbers = set()
    for dotted in DOTTED:
        section, key = dotted.split(".")
        if type(getattr(getattr(Config(), section), key)) in (int, float):
            numbers.add(dotted)
    assert not ranged - numbers and numbers == (ranged | free) & numbers, sorted(numbers - ranged - free)


# --- round trips


def test_the_dump_of_any_config_loads_to_an_equal_one(tmp_path: Path):
    marks = "a\"b\\c\t\u00e9\U0001f600\x7f"
    config = load_config(None, ["--optim.eps=1e-30", "--optim.lr=12345678.9", f"--run.wandb_project={marks}"])
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert load_config(write(tmp_path, dump_config(Config()))) == Config()


@given(text=st.text(), number=st.floats(1e-300, 1e300), count=st.integers(0, 2**63))
def test_any_text_and_number_survives_the_dump(text: str, number: float, count: int):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates cannot be written to a file
        return
    run = dataclasses.replace(Config().run, wandb_project=text, seed=count)
    config = dataclasses.replace(Config(), run=run, optim=dataclasses.replace(Config().optim, lr=number))
    assert config_load._build(tomllib.loads(dump_config(config))) == config


def test_the_difference_names_each_changed_key_and_nothing_else():
    old, new = Config(), load_config(None, ["--rl.steps=3", "--run.name=x"])
    assert config_difference(old, new) == ["run.name: 'program' -> 'x'", f"rl.steps: {old.rl.steps} -> 3"]
    assert config_difference(old, Config()) == []


# --- help texts

SELF_EXPLAINING = {
    "seed", "tensorboard", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_experts_per_tok", "qk_norm", "tie_word_embeddings", "rope_theta", "rms_norm_eps", "max_level", "steps",
    "tokens_per_step", "muon_lr", "beta1", "beta2", "out_dir", "eps", "warmup_steps", "final_lr_share", "top_k",
    "top_p", "min_p", "max_tokens", "accuracy", "format", "prompts_per_step", "group_size", "samples",
    "final_samples", "temperature", "router_score", "importance_low", "importance_high", "custom_weight",
}  # fmt: skip


@pytest.mark.parametrize("module", [config_schema, config_reward, config_task, spec], ids=["config", "reward", "task", "loss"])
def test_every_field_has_a_docstring_or_a_self_explaining_name(module: object):
    tree = ast.parse(inspect.getsource(module))
    silent = []
    for node in (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name != "Config"):
        for statement, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and not documented:
                silent.append(f"{node.name}.{ast.unparse(statement.target)}")
    assert not [name for name in silent if name.split(".")[1] not in SELF_EXPLAINING]
