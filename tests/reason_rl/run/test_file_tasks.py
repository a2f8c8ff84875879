"""Runs on problems from a file: from a checkpoint to a checkpoint, resumed, and refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reason_rl.config import ConfigError, ModelConfig
from reason_rl.data import Tokenizer, byte_tokenizer
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import save_weights
from tests.reason_rl.run.tiny_run import fingerprints, forget, never_stop, rows, run_here, stop_after

MODEL = ModelConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4,
                    moe_intermediate_size=24, max_position_embeddings=96)


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """A checkpoint with random weights and a file of problems with one bad row -> the command line that runs them."""
    model, tokenizer = Transformer(MODEL, byte_tokenizer().vocab_size).initialise(0), byte_tokenizer()
    save_weights(tmp_path / "base", model.state_dict(), MODEL, tokenizer.vocab_size, tokenizer.eos_id)
    tokenizer.save(tmp_path / "base")
    lines = [json.dumps({"problem": f"Größe {i} + {i}?", "result": str(2 * i)}) for i in range(30)]
    (tmp_path / "own.jsonl").write_text("\n".join([*lines[:9], '{"problem": ', *lines[9:]]), encoding="utf-8")
    (tmp_path / "own.toml").write_text('prompt = "Q: {problem}\\n"\ncompletion_prefix = "<think>"\n')
    return [f"--model.init_from={tmp_path}/base", "--task.name=jsonl", f"--task.path={tmp_path}/own.jsonl", "--rl.steps=3",
            "--task.prompt_field=problem", "--task.answer_field=result", f"--task.template={tmp_path}/own.toml",
            "--task.heldout_share=0.3", "--eval.final_problems=6"]


def test_a_run_on_a_file_ends_with_a_checkpoint_and_lists_the_rows_left_out(given: list[str], tmp_path: Path, monkeypatch, capsys):
    never_stop(monkeypatch)
    assert run_here(tmp_path, *given, "--task.on_bad_row=skip") == 0
    run = tmp_path / "tiny"
    (bad,) = (run / "left_out.txt").read_text().splitlines()
    assert bad.startswith(f"{tmp_path}/own.jsonl:10: it is not valid JSON") and "1 rows are left out" in capsys.readouterr().out
    (first, *_), (second, *_) = rows(run / "rollouts/grpo", "step_000001.jsonl"), rows(run / "rollouts/grpo", "step_000002.jsonl")
    assert first["prompt"].startswith("Q: Größe ") and first["prompt"].endswith("?\n<think>")
    assert first["problem_id"] != second["problem_id"]
    seen = {row["prompt"] for path in (run / "rollouts/grpo").iterdir() for row in rows(run / "rollouts/grpo", path.name)}
    assert len(seen) == 12  # three steps of four, each problem once
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["heldout_problems"], summary["max_abs_logprob_gap"]) == ("jsonl", 6, 0.0)
    assert Tokenizer.load(run / "checkpoints/final").vocab_size == 262


def test_a_run_on_a_file_that_is_stopped_goes_on_to_the_same_bits(given: list[str], tmp_path: Path, monkeypatch):
    more = [*given, "--task.on_bad_row=skip", "--rl.dynamic_sampling=1", "--run.rollout_every=1"]
    never_stop(monkeypatch)
    assert run_here(tmp_path, *more, "--name=whole") == 0
    forget(tmp_path, "grpo")
    stop_after(monkeypatch, 2)
    assert run_here(tmp_path, *more, "--name=parts") == 130
    never_stop(monkeypatch)
    assert run_here(tmp_path, *more, "--name=parts") == 0
    assert fingerprints(tmp_path / "whole") == fingerprints(tmp_path / "parts")


def test_a_run_whose_file_has_changed_does_not_resume(given: list[str], tmp_path: Path, monkeypatch, capsys):
    stop_after(monkeypatch, 2)
    assert run_here(tmp_path, *given, "--task.on_bad_row=skip") == 130
    told = ("and its config.json overrides these keys: model.expert_bias = True (it has False), "
            "model.max_position_embeddings = 64 (it has 96).")
    assert told in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "own.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"problem": "1 + 1?", "result": "2"}\n')
    never_stop(monkeypatch)
    with pytest.raises(ValueError, match="was begun with other problems than"):
        run_here(tmp_path, *given, "--task.on_bad_row=skip")


@pytest.mark.parametrize(("more", "message"), [
    ([], r"own\.jsonl:10: it is not valid JSON: .*task\.on_bad_row = 'skip'"),
    (["--model.init_from="], "task 'jsonl' reads its problems from files, so there is no corpus .* set model.init_from"),
    (["--task.path=nowhere"], "task.path names no file: 'nowhere'"),
    (["--task.on_bad_row=skip", "--task.answer_field=answer"], "too few problems"),
    (["--task.on_bad_row=skip", "--task.template=zero"], "must be one of chat, few_shot, plain, r1_zero"),
    (["--task.on_bad_row=skip", "--task.template=chat"], "the checkpoint has none: no chat_template.jinja"),
    (["--task.on_bad_row=skip", "--sampling.max_tokens=80"], "leaves 16; task.max_prompt_tokens leaves longer ones out"),
    (["--task.on_bad_row=skip", "--eval.final_problems=29"], r"asked for 29 held-out problems .* ask for fewer \(eval\.problems"),
    (["--task.on_bad_row=skip", "--rl.prompts_per_step=32"], r"ask for fewer \(rl\.prompts_per_step\)"),
    (["--task.on_bad_row=skip", "--reward.verifier=code"], "needs tests among a problem's facts"),
    (["--task.on_bad_row=skip", "--reward.verifier=countdown"], "needs numbers and target among a problem's facts"),
    (["--task.name=program", "--task.pass_rates="], "'program' generates its problems; task.path is for gsm8k, math, code, jsonl"),
    (["--model.init_from=", "--task.name=program", "--task.path="], "task.template must be 'plain' for pretraining"),
], ids=str)
def test_what_cannot_run_is_refused_before_any_work_and_leaves_no_trace(
    more: list[str], message: str, given: list[str], tmp_path: Path, monkeypatch
):
    never_stop(monkeypatch)
    before = {path.name for path in tmp_path.iterdir()} | {"tiny.toml"}
    with pytest.raises(ConfigError, match=message):
        run_here(tmp_path, *given, *more)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_model_of_bytes_is_pretrained_and_trained(tmp_path: Path, monkeypatch):
    never_stop(monkeypatch)
    assert run_here(tmp_path, "--pretrain.tokenizer=byte", "--rl.steps=1") == 0
    final = tmp_path / "tiny" / "checkpoints" / "final"
    assert Tokenizer.load(final).decode(Tokenizer.load(final).encode("é🙂")) == "é🙂"
    assert json.loads((final / "config.json").read_text())["vocab_size"] == 262
