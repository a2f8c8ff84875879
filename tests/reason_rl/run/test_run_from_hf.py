"""RL that starts from a Hugging Face folder ends in a Hugging Face folder of the same kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reason_rl.data import char_tokenizer
from reason_rl.model.weights import load_model
from tests.reason_rl.run.tiny_run import never_stop, rows, run_here, stage_folder

transformers = pytest.importorskip("transformers")

SIDE = {"tokenizer_config.json": '{"chat_template": "{{ messages[0].content }}"}', "generation_config.json": '{"temperature": 0.6}',
        "chat_template.jinja": "{{ messages }}"}


def dots1_folder(folder: Path) -> dict[str, object]:
    """Written by transformers, random weights, the tokenizer ours -> its config.json."""
    tokenizer = char_tokenizer()
    config = transformers.AutoConfig.for_model(
        "dots1", vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, moe_intermediate_size=20, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        first_k_dense_replace=1, routed_scaling_factor=1.5, norm_topk_prob=True, max_position_embeddings=64, attention_bias=True,
        eos_token_id=[tokenizer.eos_id, 3], initializer_range=0.2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save(folder)
    for name, text in SIDE.items():
        (folder / name).write_text(text)
    values: dict[str, object] = json.loads((folder / "config.json").read_text())
    return values


def test_a_run_from_a_hugging_face_folder_ends_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    never_stop(monkeypatch)
    before = dots1_folder(tmp_path / "dots")
    assert run_here(tmp_path, f"--model.init_from={tmp_path / 'dots'}", "--rl.steps=2", "--eval.every=0", "--eval.pass_at_k=0",
                    "--run.exact=on", "--rl.routing_replay=true", "--run.checkpoint_every=1") == 0
    steps = rows(tmp_path / "tiny", stage="grpo", phase="train")
    assert len(steps) == 2 and {row["max_abs_logprob_gap"] for row in steps} == {0.0}
    for folder in (stage_folder(tmp_path, "grpo") / "step_000001", tmp_path / "tiny" / "checkpoints" / "final"):
        assert {file: (folder / file).read_text() for file in SIDE} == SIDE
        after = json.loads((folder / "config.json").read_text())
        spelled = ("rope_parameters", "rope_theta", "rope_scaling", "dtype", "torch_dtype", "sliding_window")  # otherwise
        kept, wanted = ({key: value for key, value in values.items() if key not in spelled} for values in (after, before))
        assert kept == wanted | {"head_dim": 16}
    trained, _ = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    start = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dots", dtype=torch.float32)
    moved = {name for name, value in trained.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert moved == {name for name, _ in trained.named_parameters()}
    ours = load_model(folder)
    assert torch.equal(ours.blocks[1].mlp.gate_up_proj, trained.state_dict()["model.layers.1.mlp.experts.gate_up_proj"])  # type: ignore[union-attr]
