"""bench/train_step.py: the figures of a measurement, and that each ratio has the direction of its name."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import train_step, workloads
from reason_rl.config import ModelConfig
from reason_rl.model.transformer import Transformer, num_active_parameters, num_parameters

SIDES = {
    "reason_rl": {"step_s": 0.5, "rollout_s": 0.3, "rollout_tok_s": 3000.0, "startup_mb": 100.0, "peak_mb": 150.0},
    "trl float32": {"step_s": 2.0, "rollout_s": 1.2, "rollout_tok_s": 1000.0, "startup_mb": 300.0, "peak_mb": 500.0},
    "trl bfloat16": {"step_s": 1.0, "rollout_s": 0.7, "rollout_tok_s": 1500.0, "startup_mb": 300.0, "peak_mb": 300.0},
}
FAKE = """
import json, pathlib, sys
record, count = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
number = int(count.read_text()) + 1 if count.exists() else 0
count.write_text(str(number))
print("a library's chatter")
print(json.dumps(record | {"step_s": record["step_s"] * (1, 3, 1)[number]}))
"""


def test_a_measurement_holds_every_figure_shown_and_changes_the_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(train_step.WORKLOADS, "tiny", (2, 4, 4, 6))
    seen, build = [], train_step.workload_stage

    def remembered(*arguments: object) -> object:
        seen.append(build(*arguments))  # type: ignore[arg-type]
        seen.append({name: value.detach().clone() for name, value in seen[0].policy.model.named_parameters()})
        return seen[0]

    monkeypatch.setattr(train_step, "workload_stage", remembered)
    record = train_step.measure("tiny", "float32", "cpu", steps=1, warmup=0)
    for key in train_step.SHOWN:
        assert math.isfinite(record[key]) and record[key] > 0, key
    tokens = 2 * 4 * 6
    for part in ("rollout", "train", "step"):
        assert record[f"{part}_tok_s"] == tokens / record[f"{part}_s"]
    assert record["step_s"] > record["rollout_s"] + record["train_s"]  # reward and logging are in it too
    assert record["max_abs_logprob_gap"] == 0.0
    stage, before = seen
    assert any(not torch.equal(before[name], value) for name, value in stage.policy.model.named_parameters())


def test_the_decode_floor_by_hand(monkeypatch: pytest.MonkeyPatch):
    """2 prompts of 3 tokens x 2 completions of 3 tokens, so two decode steps of 4 sequences. Each step reads
    the keys of 2 x 3 prompt tokens; the first also reads 1 generated token a sequence, the second 2."""
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", (2, 3, 2, 3))
    config = ModelConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                         num_experts=16,
                         num_experts_per_tok=2, moe_intermediate_size=4)
    model = Transformer(config, 10)
    experts = 16 * 3 * 4 * 8
    # Embedding, qkv, out, router; the norms of the stream, before and after the layer's two halves; those of q and k.
    rest = 10 * 8 + 16 * 8 + 8 * 8 + 16 * 8 + 3 * 8 + 2 * 4
    num_bytes = 4 * (2 * (rest + experts * 4 * 2 / 16) + (2 * 6 + 4 * (1 + 2)) * 2 * 1 * 4)
    assert workloads.decode_floor_s(model, "tiny", 1e3) == pytest.approx(num_bytes / 1e3)
    head = Transformer(replace(config, tie_word_embeddings=False), 10)  # reads the head
    assert workloads.decode_floor_s(head, "tiny", 1e3) == pytest.approx(num_bytes / 1e3)


@pytest.mark.parametrize(("name", "millions", "active"), [("W1", 1.78, 0.6), ("1b", 3719, 888)])
def test_the_workloads_models_have_the_documented_sizes(name: str, millions: float, active: float):
    config = workloads.workload_config(name, "float32", "cpu")
    with torch.device("meta"):
        model = Transformer(config.model, workloads.VOCAB_SIZES.get(name, 64))
    assert num_parameters(model) / 1e6 == pytest.approx(millions, rel=0.01)
    assert num_active_parameters(model) / 1e6 == pytest.approx(active, rel=0.05)


def test_logging_is_part_of_the_step(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]

    def passes(seconds: float, value: object = None) -> object:
        now[0] += seconds
        return value

    class SlowLog:
        def metrics(self, *_: object) -> None:
            passes(2.0)

        def timings(self, *_: object) -> None:
            passes(4.0)

    stats = argparse.Namespace(metrics={}, timings={"step_s": 1.0, "train_s": 0.5})
    stage = argparse.Namespace(step=lambda index: passes(1.0, stats))
    monkeypatch.setattr(train_step.time, "perf_counter", lambda: now[0])
    assert train_step.timed_step(stage, 0, SlowLog())[0] == {"step_s": 7.0, "train_s": 0.5}  # type: ignore[arg-type]


def test_sides_take_turns_and_ratios_follow_their_names(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    rest = dict.fromkeys(train_step.SHOWN, 1.0)
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    commands = {name: [sys.executable, str(script), json.dumps(rest | side), str(tmp_path / name)] for name, side in SIDES.items()}
    monkeypatch.setattr(train_step, "side_commands", lambda options: commands)
    record = train_step.alternate(argparse.Namespace(rounds=3))
    rounds = [line.split("step")[0].split(maxsplit=2)[2].strip() for line in capsys.readouterr().out.splitlines()]
    assert rounds == list(SIDES) * 3
    ours = record["sides"]["reason_rl"]
    assert (ours["step_s"], ours["step_s_least_round"], ours["step_s_most_round"]) == (0.5, 0.5, 1.5)
    plain, half = record["ratios"]["reason_rl / trl float32"], record["ratios"]["reason_rl / trl bfloat16"]
    # Ours and theirs: 0.5 and 2 s a step; 3000 and 1000 tokens a second; 0.2 and 0.8 s without the rollout;
    # 50 and 200 MB.
    assert plain == pytest.approx(
        {"step_speedup": 4.0, "rollout_speedup": 3.0, "train_speedup": 4.0, "memory_ours_over_theirs": 0.25})
    assert half["step_speedup"] == 2.0 and half["memory_ours_over_theirs"] is None  # its peak was at start-up
    assert record["faster_peer"] == "trl bfloat16"
    json.dumps(record, allow_nan=False)
    train_step.print_sides(record)
    shown = capsys.readouterr().out
    assert all(key in shown for key in (*train_step.SHOWN, *SIDES)) and "step_speedup 4.00x" in shown


def test_the_children_run_what_was_asked_for():
    options = train_step.parse(["--workload", "W2", "--device", "cuda", "--steps", "5", "--peer-python", "other/python"])
    for name, command in train_step.side_commands(options).items():
        words = " ".join(command)
        assert "--device cuda" in words and "--workload W2" in words and "--steps 5" in words, name
    assert "--peer none" in " ".join(train_step.side_commands(options)["reason_rl"])  # otherwise it would run its peer
    assert "--dtype float32" in " ".join(train_step.side_commands(options)["reason_rl float32"])


def test_exact_mode_is_timed_on_and_off():
    commands = train_step.side_commands(train_step.parse(["--peer", "exact", "--dtype", "bfloat16"]))
    ways = {name: (words[words.index("--exact") + 1], words[words.index("--decoder") + 1]) for name, words in commands.items()}
    assert ways == {"exact on": ("on", "auto"), "exact on, op by op": ("on", "ops"), "exact off": ("off", "auto")}
    assert all("--dtype bfloat16" in " ".join(command) for command in commands.values())


def test_a_failing_side_ends_with_its_own_error(tmp_path: Path):
    with pytest.raises(RuntimeError, match="no such thing"):
        train_step.run_child([sys.executable, "-c", "import sys; sys.exit('no such thing')"])


@pytest.mark.parametrize("arguments", [
    ["--trace", "x.json", "--peer", "trl"], ["--steps", "0"], ["--workload", "1b", "--peer", "trl"]])
def test_impossible_arguments_are_refused(arguments: list[str]):
    with pytest.raises(SystemExit):
        train_step.parse(arguments)


@pytest.mark.parametrize(("arguments", "says_so"), [([], True), (["--peer", "none"], False), (["--trace", "x"], False)])
def test_without_the_peer_ours_is_shown_alone(
        arguments: list[str], says_so: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(train_step, "measure", lambda *_: dict.fromkeys((*train_step.SHOWN, *train_step.OURS_ONLY), 1.0))
    train_step.main([*arguments, "--no-gemm", "--peer-python", "no/such/python"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step_s 1") and lines[1:] == ["trl: not installed"] * says_so
