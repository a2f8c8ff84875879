"""TRL's GRPOTrainer on the workloads of bench/train_step.py; prints one JSON line with the same fields.

`python -m bench.train_step --peer trl` runs it with a Python that has trl, transformers, accelerate and
datasets. It imports nothing of this project. Every completion has exactly the workload's length, because the
end token is forbidden before. A step's time is the wall-clock between the ends of two optimizer steps:
generation, reward, loss and update. `train_s` is the step's time minus its generation.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

WORKLOADS = {"W1": (16, 6, 8, 64), "W2": (4, 256, 16, 128)}
ALPHABET = ["<pad>", "<eos>", *"0123456789+-*/()=<>,.:!? abcdefghijklmnopqrstuvwxyz"]


def peak_mb() -> float:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))


def build_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(ALPHABET)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def build_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, tie_word_embeddings=True))


class StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.ends.append(time.perf_counter())


def distinct_characters(completions: list[str], **kwargs: object) -> list[float]:
    return [float(len(set(text))) for text in completions]


def main() -> None:
    # Options and prompts.
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W1")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    num_prompts, prompt_tokens, group_size, new_tokens = WORKLOADS[options.workload]
    rng = random.Random(0)
    prompts = Dataset.from_dict({"prompt": ["".join(rng.choices("0123456789+", k=prompt_tokens)) for _ in range(4096)]})

    # TRL's trainer on the workload.
    clock = StepClock()
    trainer = GRPOTrainer(
        model=build_model(), reward_funcs=distinct_characters, train_dataset=prompts, processing_class=build_tokenizer(),
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=options.device == "cpu", bf16=options.bf16,
            per_device_train_batch_size=num_prompts * group_size, num_generations=group_size,
            max_completion_length=new_tokens, max_steps=options.warmup + options.steps,
            beta=0.0, temperature=1.0, learning_rate=1e-6, gradient_checkpointing=False, save_strategy="no",
            logging_strategy="no", disable_tqdm=True, report_to=[], generation_kwargs={"min_new_tokens": new_tokens}))

    # Time generation by itself.
    generate_s: list[float] = []
    generated: list[int] = []
    plain_generate = trainer.model.generate

    def timed_generate(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        output = plain_generate(*args, **kwargs)
        generate_s.append(time.perf_counter() - start)
        generated.append(int(output.shape[0] * new_tokens))
        return output

    trainer.model.generate = timed_generate
    startup = peak_mb()
    trainer.train()

    # Medians over the steps after the warm-up.
    step_s = [b - a for a, b in zip(clock.ends, clock.ends[1:])][max(0, options.warmup - 1):]
    rollout = statistics.median(generate_s[options.warmup:])
    step = statistics.median(step_s)
    tokens = num_prompts * group_size * new_tokens
    assert generated and generated[-1] == tokens, f"expected {tokens} tokens a step, TRL sampled {generated[-1:]}"
    print(json.dumps({
        "impl": "trl", "workload": options.workload, "dtype": "bfloat16 autocast" if options.bf16 else "float32",
        "step_s": step, "step_s_min": min(step_s), "rollout_s": rollout, "train_s": step - rollout,
        "rollout_tok_s": tokens / rollout, "train_tok_s": tokens / (step - rollout),
        "step_tok_s": tokens / step, "startup_mb": startup, "peak_mb": peak_mb(),
        "threads": torch.get_num_threads(), "steps": options.steps}))


if __name__ == "__main__":
    main()
