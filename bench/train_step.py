"""Time the trainer's own GRPO step on a fixed workload, beside TRL's GRPOTrainer where it is installed.

    python -m bench.train_step --workload W1                          ours alone
    python -m bench.train_step --workload W1 --peer trl --json FILE   ours and TRL in turn, `--rounds` times each
    python -m bench.train_step --trace step.json                      where the time goes, for chrome://tracing

Model of both: Qwen3-MoE shape, V64 D128 I128 L4 H4 K2 C32 E8 top-2, tied, 1.78 M parameters (0.6 M active). Work of one step:
    W1   16 prompts of   6 tokens x  8 completions of exactly  64 tokens
    W2    4 prompts of 256 tokens x 16 completions of exactly 128 tokens
Temperature 1, no KL, one update a step; rollout, reward, loss, backward, optimizer and logging are all in the step time.
TRL lives in an environment of its own (`pip install trl transformers accelerate datasets`); --peer-python names its Python.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch

from bench.harness import CHECKOUT, add_json_option, describe_setting, gemm_rates, peak_rss_bytes, write_json
from reason_rl.config import Config, load_config
from reason_rl.data import char_tokenizer
from reason_rl.model.transformer import Transformer, num_active_parameters, num_parameters
from reason_rl.session import Session, build_session
from reason_rl.trainer.distributed import init_world
from reason_rl.trainer.metrics import RunLog
from reason_rl.types import Problem
from train import grpo_step

WORKLOADS = {"W1": (16, 6, 8, 64), "W2": (4, 256, 16, 128)}
"""prompts, tokens a prompt, completions a prompt, tokens a completion"""
SHOWN = ("step_s", "rollout_s", "train_s", "rollout_tok_s", "step_tok_s", "startup_mb", "peak_mb")


def workload_config(workload: str, dtype: str, device: str) -> Config:
    num_prompts, prompt_tokens, group_size, new_tokens = WORKLOADS[workload]
    return load_config(None, [
        f"--rl.prompts_per_step={num_prompts}", f"--rl.group_size={group_size}", "--rl.updates_per_step=1",
        "--rl.drop_no_signal=false", f"--sampling.max_tokens={new_tokens}", f"--model.max_positions={prompt_tokens + new_tokens}",
        "--model.num_layers=4", "--model.expert_size=128", "--model.expert_bias=false", "--optim.lr=1e-6",
        "--reward.accuracy=0", "--reward.format=0", f"--run.dtype={dtype}", f"--run.device={device}",
        f"--engine.max_num_seqs={num_prompts * group_size}", "--optim.microbatch_tokens=65536"])


def workload_session(config: Config, workload: str) -> Session:
    """A random model that never stops early, on random prompts; the reward counts a completion's distinct characters."""
    prompt_tokens = WORKLOADS[workload][1]
    tokenizer, world = char_tokenizer(), init_world(config.run)
    session = build_session(config, world, tokenizer, Transformer(config.model, 64).initialise(0))

    def draw(step: int, count: int, round_number: int, exclude: Collection[int]) -> list[Problem]:
        rng = random.Random(f"bench/{step}/{round_number}")
        prompts = ["".join(rng.choices("0123456789+", k=prompt_tokens)) for _ in range(count)]
        return [Problem(step * count + i, "bench", text, tuple(tokenizer.encode(text)), "") for i, text in enumerate(prompts)]

    session.draw_problems = draw
    session.stop_ids = ()
    session.rewards = {"custom": lambda problem, text: float(len(set(text)))}
    return session


def measure(workload: str, dtype: str, device: str, steps: int, warmup: int, trace: str | None) -> dict[str, object]:
    config = workload_config(workload, dtype, device)
    session = workload_session(config, workload)
    startup_bytes = peak_rss_bytes()
    num_prompts, _, group_size, new_tokens = WORKLOADS[workload]
    timings = []
    before = session.model.head_weight.detach().clone()
    with tempfile.TemporaryDirectory() as folder, RunLog(folder) as log:
        for step in range(warmup + steps):
            stats = grpo_step(session, step)
            log.metrics("rl", step + 1, stats.metrics)
            log.timings("rl", step + 1, stats.timings)
            assert all(len(c.token_ids) == new_tokens for group in stats.groups for c in group.completions)
            if step >= warmup:
                timings.append(stats.timings)
        if trace:
            with torch.profiler.profile() as profiler:
                grpo_step(session, warmup + steps)
            profiler.export_chrome_trace(trace)
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    assert not torch.equal(before, session.model.head_weight.detach()), "the step must change the weights"
    tokens = num_prompts * group_size * new_tokens
    median = {key: statistics.median(t[key] for t in timings) for key in ("step_s", "rollout_s", "reward_s", "train_s")}
    return {
        "impl": "reason_rl", "workload": workload, **median, "step_s_min": min(t["step_s"] for t in timings),
        "rollout_tok_s": tokens / median["rollout_s"], "step_tok_s": tokens / median["step_s"],
        "startup_mb": startup_bytes / 2**20, "peak_mb": peak_rss_bytes() / 2**20,
        "max_abs_logprob_gap": max(float(stats.metrics["max_abs_logprob_gap"]), 0.0),
        "parameters": num_parameters(session.weights.model), "active_parameters": num_active_parameters(session.weights.model),
        "dtype": str(session.world.dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "steps": steps,
    }


def run_child(command: list[str]) -> dict[str, object]:
    """A fresh process, so that neither side warms the other's memory; its last line is its record."""
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    record: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return record


def peer_is_installed(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", "import trl"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def alternate(options: argparse.Namespace) -> dict[str, object]:
    """ours, TRL fp32, TRL bf16, ours, ... -> every record, and TRL's medians over ours."""
    ours = [sys.executable, "-m", "bench.train_step", "--workload", options.workload, "--dtype", options.dtype,
            "--steps", str(options.steps), "--warmup", str(options.warmup), "--json"]
    theirs = [options.peer_python, str(Path("bench/peers/trl_step.py")), "--workload", options.workload,
              "--steps", str(options.steps), "--warmup", str(options.warmup)]
    commands = {"reason_rl": ours, "trl float32": theirs, "trl bfloat16": [*theirs, "--bf16"]}
    records: dict[str, list[dict[str, object]]] = {name: [] for name in commands}
    for round_number in range(options.rounds):
        for name, command in commands.items():
            records[name].append(run_child(command))
            print(f"round {round_number + 1}  {name:14} step {records[name][-1]['step_s']:.3f} s", flush=True)

    def median(name: str, key: str) -> float:
        return statistics.median(float(str(record[key])) for record in records[name])

    faster = min(("trl float32", "trl bfloat16"), key=lambda name: median(name, "step_s"))
    ratios = {
        name: {"step": median(name, "step_s") / median("reason_rl", "step_s"),
               "rollout_tok_s": median("reason_rl", "rollout_tok_s") / median(name, "rollout_tok_s"),
               "peak_mb_above_startup": (median("reason_rl", "peak_mb") - median("reason_rl", "startup_mb"))
               / (median(name, "peak_mb") - median(name, "startup_mb"))}
        for name in ("trl float32", "trl bfloat16")
    }
    return {"records": records, "ratios": ratios, "faster_peer": faster}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W1")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--peer", choices=["trl"], help="alternate with this peer")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has the peer installed")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs, with --peer")
    parser.add_argument("--trace", help="write a torch profiler trace of one step to this file")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.peer and not peer_is_installed(options.peer_python):
        print(f"{options.peer}: not installed for {options.peer_python}")
        options.peer = None
    if options.peer:
        record = alternate(options)
        for name, values in record["ratios"].items():  # type: ignore[attr-defined]
            print(f"{name:14} / ours: " + "  ".join(f"{key} {value:.2f}x" for key, value in values.items()))
    else:
        record = measure(options.workload, options.dtype, options.device, options.steps, options.warmup, options.trace)
        print("  ".join(f"{key} {record[key]:.4g}" for key in SHOWN))
    rates = gemm_rates(options.device)
    setting = describe_setting(options.device)
    write_json({"bench": "train_step", "ops": "torch reference", **record, "gemm_gflops": rates, "setting": setting}, options.json)


if __name__ == "__main__":
    main()
