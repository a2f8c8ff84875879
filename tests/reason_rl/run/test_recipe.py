"""Recipes: refusals before any work, the inputs of a stage's key, and a run of three stages that stops and resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from reason_rl.config import Config, ConfigError, dump_config, load_config
from reason_rl.model.weights import load_model
from reason_rl.run import recipe
from reason_rl.run.recipe import key_of, plan_recipe
from reason_rl.stages.grpo import Grpo
from reason_rl.stages.pretrain import Pretrain
from tests.reason_rl.run.tiny_run import arguments, fingerprints, never_stop, rows, run_here, stop_after

THREE = """
[[stage]]
kind = "pretrain"
[[stage]]
kind = "grpo"
name = "first"
[stage.rl]
steps = 2
[[stage]]
kind = "grpo"
name = "second"
[stage.rl]
steps = 3
[stage.optim]
lr = 5e-4
"""


def with_stages(out_dir: Path, stages: str, *more: str) -> list[str]:
    """The tiny run's command line with these [[stage]] tables."""
    given = arguments(out_dir, *more)
    toml = Path(given[0])
    toml.write_text(toml.read_text(encoding="utf-8") + stages, encoding="utf-8")
    return given[1:]


def keys(config: Config) -> dict[str, str]:
    found: dict[str, str] = {}
    for stage in plan_recipe(config):
        found[stage.name] = key_of(stage, "float32", "", found[stage.after.name] if stage.after else "")
    return found


def test_without_stages_a_recipe_is_pretraining_then_grpo(tmp_path: Path):
    assert [(stage.name, stage.after.name if stage.after else None) for stage in plan_recipe(load_config())] == [
        ("pretrain", None), ("grpo", "pretrain")]


@pytest.mark.parametrize(("stages", "message"), [
    ('[[stage]]\nkind = "pretran"', "kind must be one of pretrain, grpo, got 'pretran'"),
    ('[[stage]]\nname = "x"', "number 1 needs a kind"),
    ('[[stage]]\nkind = "pretrain"\n[[stage]]\nkind = "grpo"\n[[stage]]\nkind = "grpo"', "2 stages are named 'grpo'"),
    ('[[stage]]\nkind = "grpo"', "starts from weights: put a stage before it.*model.init_from"),
    ('[[stage]]\nkind = "pretrain"\n[[stage]]\nkind = "grpo"\nafter = "base"',
     "after 'base', but no earlier stage has that name; earlier stages: pretrain"),
    ('[[stage]]\nkind = "pretrain"\n[[stage]]\nkind = "pretrain"\nname = "b"\nafter = "pretrain"', "starts from random weights"),
    ('[[stage]]\nkind = "pretrain"\n[stage.pretrian]\nsteps = 1', "stage 'pretrain': unknown config section .pretrian."),
    ('[[stage]]\nkind = "pretrain"\n[stage.pretrain]\nstepz = 1', "stage 'pretrain': unknown config key pretrain.stepz"),
    ('[[stage]]\nkind = "pretrain"\n[stage.run]\nseed = 1', r"\[run\] holds for the whole recipe"),
    ('[[stage]]\nkind = "pretrain"\nname = "a/b"', "name must be a word"),
    ('[[stage]]\nkind = "pretrain"\nname = "final"', "cannot be named 'final'"),
    ('[[stage]]\nkind = "pretrain"\n[[stage]]\nkind = "grpo"\n[stage.model]\nhead_dim = 8',
     "its model.head_dim would have no effect"),
    ('[[stage]]\nkind = "pretrain"\n[[stage]]\nkind = "pretrain"\nname = "b"\n[stage.pretrain]\ntokenizer = "byte"',
     "different tokenizers"),
    ('[stage]\nkind = "pretrain"', "stages are written as"),
    ('[[stage]]\nkind = "pretrain"\n[[stage]]\nkind = "grpo"\n[stage.rl]\ngroup_size = 1', "rl.group_size must be at least 2"),
    ('[[stage]]\nkind = "pretrain"\n[[stage]]\nkind = "grpo"\n[stage.task]\nname = "nowhere:Task"', "nowhere"),
])
def test_a_recipe_that_cannot_run_is_one_clear_error_before_any_work(
    stages: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    never_stop(monkeypatch)
    monkeypatch.setattr(Pretrain, "step", None)
    with_stages(tmp_path, "\n" + stages)
    with pytest.raises(ConfigError, match=message):
        run_here(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.toml"}


def test_the_command_line_sets_a_key_for_all_stages_or_for_one(tmp_path: Path):
    path = tmp_path / "three.toml"
    path.write_text(THREE, encoding="utf-8")
    def steps(*more: str) -> list[int]:
        return [stage.config.rl.steps for stage in plan_recipe(load_config(path, more))][1:]

    assert steps() == [2, 3] and steps("--rl.steps=7") == [7, 7] and steps("--second.rl.steps=9") == [2, 9]
    assert steps("--rl.steps=7", "--second.rl.steps=9") == [7, 9]
    with pytest.raises(ConfigError, match="no stage is named 'secnd'; did you mean 'second'"):
        load_config(path, ["--secnd.rl.steps=9"])


def test_a_resolved_recipe_reads_back_equal(tmp_path: Path):
    path = tmp_path / "three.toml"
    path.write_text(THREE, encoding="utf-8")
    config = load_config(path, ["--second.rl.steps=9"])
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(("change", "changed"), [
    ("--run.name=other", set()), ("--run.out_dir=elsewhere", set()), ("--run.keep_checkpoints=5", set()),
    ("--engine.max_num_seqs=8", set()),
    ("--rl.steps=3", {"grpo"}), ("--optim.lr=1e-5", {"grpo"}), ("--loss.kl_coef=0.1", {"grpo"}),
    ("--pretrain.steps=3", {"pretrain", "grpo"}), ("--model.hidden_size=64", {"pretrain", "grpo"}),
    ("--seed=1", {"pretrain", "grpo"}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_key_changes_with_what_the_output_follows_from_and_with_nothing_else(change: str, changed: set[str]):
    before, after = keys(load_config()), keys(load_config(None, [change]))
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_key_changes_with_the_code_of_the_stages_rooms_and_with_the_users_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = keys(load_config())
    real = recipe.code_digest
    monkeypatch.setattr(recipe, "code_digest", lambda name: real(name) + (name in ("rl", "csrc")) * "edited")
    after = keys(load_config())
    assert before["pretrain"] == after["pretrain"] and before["grpo"] != after["grpo"]
    monkeypatch.setattr(recipe, "code_digest", lambda name: real(name) + (name == "trainer/update.py") * "edited")
    assert before["pretrain"] != keys(load_config())["pretrain"]
    monkeypatch.undo()

    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config(None, ["--reward.custom=my_reward_of_test_recipe:f"])
    found = []
    for source in ("def f(problem, text): return 1.0", "def f(problem, text): return 0.0"):
        (tmp_path / "my_reward_of_test_recipe.py").write_text(source, encoding="utf-8")
        found.append(keys(config))
    assert found[0]["grpo"] != found[1]["grpo"] and found[0]["pretrain"] == found[1]["pretrain"]


@pytest.mark.parametrize("kind", [Pretrain, Grpo])
def test_all_code_that_a_stage_names_exists_and_is_read(kind: type[Pretrain] | type[Grpo]):
    empty = recipe.folder_digest(Path("nowhere"))
    assert all(recipe.code_digest(name) != empty for name in kind.code)


def test_a_large_files_digest_sees_a_change_of_size_and_of_a_sampled_block(tmp_path: Path):
    path = tmp_path / "weights"
    digests = []
    for data in (bytes(300_000), bytes(300_001), b"\x01" + bytes(299_999)):
        path.write_bytes(data)
        digests.append(recipe.file_digest(path))
    assert len(set(digests)) == 3


def test_three_stages_run_in_order_each_from_the_one_before_and_a_stopped_run_goes_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    never_stop(monkeypatch)
    quick = ["--eval.every=0", "--eval.pass_at_k=0", "--eval.final_problems=4", "--eval.final_samples=1", "--pretrain.steps=12"]
    for name in ("whole", "stopped"):
        with_stages(tmp_path / name, THREE)
    assert run_here(tmp_path / "whole", *quick) == 0
    whole = tmp_path / "whole" / "tiny"
    assert list(dict.fromkeys(row["stage"] for row in rows(whole))) == ["pretrain", "first", "second"]
    assert [row["step"] for row in rows(whole, stage="second", phase="train")] == [1, 2, 3]
    ends, starts = rows(whole, stage="first", phase="eval")[-1], rows(whole, stage="second", phase="eval")[0]
    assert ends["step"] == 2 and starts["step"] == 0  # the second stage first evaluates the first one's weights

    # Stopped in every stage in turn: after 10 steps of pretraining, 1 of the first, 1 and 2 of the second.
    for num_questions in (1, 1 + 1, 1, 1):
        stop_after(monkeypatch, num_questions)
        assert run_here(tmp_path / "stopped", *quick) == 130
    never_stop(monkeypatch)
    assert run_here(tmp_path / "stopped", *quick) == 0
    assert fingerprints(tmp_path / "stopped" / "tiny") == fingerprints(whole)


def test_a_stage_with_a_checkpoint_of_its_own_takes_its_tokenizer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its tokens are bytes; the recipe's own default is characters."""
    never_stop(monkeypatch)
    quick = ["--eval.every=0", "--eval.pass_at_k=0", "--eval.final_problems=2", "--eval.final_samples=1", "--rl.steps=1"]
    assert run_here(tmp_path / "base", *quick, "--pretrain.tokenizer=byte", "--pretrain.steps=1") == 0
    folder = tmp_path / "base" / "tiny" / "checkpoints" / "pretrain"
    with_stages(tmp_path / "stage", f'[[stage]]\nkind = "grpo"\n[stage.model]\ninit_from = "{folder}"\n')
    assert run_here(tmp_path / "stage", *quick) == 0
    ends = [load_model(tmp_path / name / "tiny" / "checkpoints" / "final").embedding.weight for name in ("base", "stage")]
    assert torch.equal(*ends)


def test_a_stage_after_an_earlier_one_starts_from_that_ones_output(tmp_path: Path):
    path = tmp_path / "fork.toml"
    path.write_text(THREE.replace('name = "second"', 'name = "second"\nafter = "pretrain"'), encoding="utf-8")
    stages = {stage.name: stage for stage in plan_recipe(load_config(path))}
    assert stages["second"].after is stages["pretrain"] and stages["first"].after is stages["pretrain"]
    assert dataclasses.asdict(stages["second"].config.model) == dataclasses.asdict(stages["pretrain"].config.model)
