"""configs/gsm8k.toml end to end on a small random Qwen3-MoE folder: trained, exported, read by transformers, measured."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

import train
from kernels.attention import attention, plan_segments
from kernels.native import cpu_unsupported_reason
from reason_rl.config import ModelConfig, load_config, parse_command_line
from reason_rl.data import Tokenizer, load_problems
from reason_rl.eval import __main__ as command
from reason_rl.model.scoring import token_logprobs
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import load_model
from tests.reason_rl.run.tiny_run import ROOT, never_stop, rows
from tests.reason_rl.tiny import CPU, VOCAB_SIZE, hand_made_group, packed

transformers = pytest.importorskip("transformers")

PRESET = ROOT / "configs" / "gsm8k.toml"
END = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = ("{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
SMALLER = ["--rl.steps=2", "--rl.prompts_per_step=2", "--rl.group_size=4", "--sampling.max_tokens=32", "--reward.overlong_buffer=8",
           "--eval.problems=2", "--eval.final_problems=4", "--run.num_threads=1", "--device=cpu", "--dtype=float32"]
SIGNAL = ["--reward.custom=tests.reason_rl.run.train_rewards:by_hash", "--optim.lr=1e-3"]
"""Random weights answer nothing right: without a reward that differs there would be no update, and at 1e-6 hardly one."""


def write_data(folder: Path, num_train: int, num_test: int) -> Path:
    """In GSM8K's own format."""
    folder.mkdir()
    for name, numbers in (("train", range(num_train)), ("test", range(num_train, num_train + num_test))):
        lines = [{"question": f"Anna picks {n + 3} apples a day and eats {n % 3}. How many does she have after {n % 5 + 2} days?",
                  "answer": f"She keeps {n + 3}-{n % 3}=<<{n + 3}-{n % 3}={n + 3 - n % 3}>>{n + 3 - n % 3} a day.\n"
                            f"#### {(n + 3 - n % 3) * (n % 5 + 2):,}"} for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("REASON_RL_DATA")
    return Path(given) / "gsm8k" if given else write_data(tmp_path_factory.mktemp("data") / "gsm8k", 40, 12)


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by transformers: a tokenizer trained on the data's text, a chat template, a context of 40,960."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = (data / "train.jsonl").read_text().splitlines()[:300]
    inner.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    made = tmp_path_factory.mktemp("model")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END[2], pad_token=END[0])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(made)
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=40, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        max_position_embeddings=40_960, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2)
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def finished(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two steps of the preset with smaller sizes."""
    out_dir = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, "train.py", str(PRESET), f"--model.init_from={folder}", f"--task.path={data}", f"--run.out_dir={out_dir}",
         *SMALLER, *SIGNAL],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}, capture_output=True, text=True, timeout=600,
        check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Task gsm8k" in done.stdout
    return out_dir / "gsm8k"


def test_two_steps_of_the_preset_are_taken_on_the_data(finished: Path, data: Path):
    steps = rows(finished, stage="grpo", phase="train")
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["num_loss_tokens"] > 0 and row["grad_norm"] > 0 and row["max_abs_logprob_gap"] == 0 for row in steps)
    sample = rows(finished / "rollouts/grpo", "step_000001.jsonl")[0]
    questions = [json.loads(line)["question"] for line in (data / "train.jsonl").read_text().splitlines()]
    assert sample["prompt"].startswith("<|im_start|>user\n") and sample["prompt"].endswith("<|im_start|>assistant\n")
    assert any(question in sample["prompt"] for question in questions)


def logits_of(model: Transformer, ids: list[int]) -> torch.Tensor:
    """f32[T, V]"""
    plan = plan_segments(torch.tensor([(0, len(ids), 0, 0)], dtype=torch.int32), len(ids), CPU)
    with torch.no_grad():
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), lambda layer, q, k, v: attention(q, k, v, plan)).hidden
        return hidden @ model.head_weight.T


def test_the_result_is_a_folder_that_transformers_reads_with_equal_logits(finished: Path, folder: Path):
    final = finished / "checkpoints" / "final"
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        final, output_loading_info=True, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    assert not report["missing_keys"] and not report["unexpected_keys"] and theirs.config.max_position_embeddings == 40_960
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "How many are 3 apples and 4?"}], add_generation_prompt=True,
                                        return_dict=False)
    ours = logits_of(load_model(final), ids)
    # Logits up to about 10 in float32, two layers, with another order of sums.
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits[0], rtol=0, atol=2e-5)
    before = logits_of(load_model(folder), ids)
    assert float((ours - before).abs().max()) > 1e-3  # it has learnt something


def test_prompts_are_what_transformers_makes_of_them(finished: Path):
    config, final = load_config(finished / "config.toml"), finished / "checkpoints" / "final"
    ours, theirs = Tokenizer.load(config.model.init_from), transformers.AutoTokenizer.from_pretrained(final)
    for problem in load_problems(config, ours).heldout(3):
        asked = problem.prompt.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        messages = [{"role": "user", "content": asked}]
        assert tuple(theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)) == problem.prompt_ids


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def test_its_checkpoint_is_measured_on_its_own_task(finished: Path, tmp_path: Path):
    assert command.main([str(finished / "checkpoints/final"), "--problems=3", "--samples=2", f"--out={tmp_path / 'e'}"]) == 0
    setting = summary_of(tmp_path / "e")["setting"]
    assert (setting["task.name"], setting["task.template"], setting["sampling.max_tokens"]) == ("gsm8k", "chat", 32)
    row = json.loads((tmp_path / "e" / "problems.jsonl").read_text().splitlines()[0])
    assert row["prompt"].startswith("<|im_start|>user\n") and row["num_samples"] == 2 and row["answer"].replace(",", "").isdigit()


def test_a_folder_is_measured_by_the_preset_and_what_is_measured_filters_problems(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data, out = write_data(tmp_path / "small", 9, 3), tmp_path / "e"
    arguments = [f"--config={PRESET}", f"--task.path={data}", "--samples=2", "--max-tokens=8", "--device=cpu", "--dtype=float32"]
    assert command.main([str(folder), *arguments, f"--out={out}"]) == 0
    assert summary_of(out)["problems"] == 3  # all that are held out
    assert command.main([str(folder), *arguments, "--split=all", f"--out={out}all"]) == 0
    assert summary_of(Path(f"{out}all"))["problems"] == 12
    assert command.main([str(folder), *arguments, "--split=all", "--problems=13", f"--out={out}more"]) == 1
    assert "of task 'gsm8k' has 12" in capsys.readouterr().err
    written = [json.loads(line) for line in Path(f"{out}all/problems.jsonl").read_text().splitlines()]
    rng, rates = random.Random(0), tmp_path / "rates.jsonl"
    for row in written:  # a random model is never right
        row["num_right"] = rng.randint(0, 2)
    rates.write_text("".join(json.dumps(row) + "\n" for row in written))
    config = load_config(PRESET, [f"--task.path={data}", f"--task.pass_rates={rates}", "--task.min_pass_rate=0.4",
                                  "--task.max_pass_rate=0.6"])
    problems = load_problems(config, Tokenizer.load(folder))
    ids = [problem.problem_id for problem in problems.all_known()]
    taken, held = set(ids[: problems.num_train]), set(ids[problems.num_train :])
    assert taken == {row["problem_id"] for row in written if row["num_right"] == 1} - held and 0 < len(taken) < 9
    (data / "test.jsonl").write_text((data / "test.jsonl").read_text().replace("3 days", "three days"))
    assert command.main([str(folder), *arguments, f"--out={out}"]) == 1 and "prompts: " in capsys.readouterr().err


@pytest.mark.parametrize(("more", "message"), [
    ([], "no checkpoint folder at path/to/model"), (["--task.path=nowhere"], "task.path names no file: 'nowhere'"),
    (["--task.template=r1"], "task.template must be one of"), ([*SMALLER, "--sampling.max_tokens=40950"], "leaves 10"),
])  # fmt: skip
def test_a_key_of_the_preset_that_is_missing_or_wrong_is_one_clear_error(
    more: list[str], message: str, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    never_stop(monkeypatch)
    given = [f"--model.init_from={folder}", f"--task.path={data}", *more] if more else []
    with pytest.raises(ValueError, match=re.escape(message)):
        train.main(parse_command_line([str(PRESET), f"--run.out_dir={tmp_path}", "--device=cpu", *given]))
    assert not list(tmp_path.iterdir())


def kept_for_backward(config: ModelConfig) -> tuple[int, int]:
    """(bytes, packed tokens) of a forward pass in bf16, without the weights' storage."""
    model = Transformer(config, VOCAB_SIZE, torch.bfloat16).initialise(0)
    (pack,) = packed([hand_made_group(0, 32, [64, 100])])
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(model, pack)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), pack.num_tokens


@pytest.mark.skipif(bool(cpu_unsupported_reason(CPU)), reason="the reference ops keep more")
def test_a_layer_keeps_the_bytes_of_the_presets_comment():
    config = ModelConfig(num_hidden_layers=1, hidden_size=192, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
                         num_experts=1, intermediate_size=640, qk_norm="none", max_position_embeddings=256)
    (one, num_tokens), (two, _) = kept_for_backward(config), kept_for_backward(replace(config, num_hidden_layers=2))
    expected = 2 * (4 * 192 + 3 * 640 + 2 * 6 * 32 + 2 * 2 * 32)
    # 2 %: attention also keeps two f32 a row and head.
    assert (two - one) / num_tokens == pytest.approx(expected, rel=0.02)
