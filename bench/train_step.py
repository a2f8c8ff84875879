"""Time the trainer's GRPO step on a fixed workload, and TRL's GRPOTrainer if it is installed.

    python -m bench.train_step --workload W1                          ours, and TRL if installed
    python -m bench.train_step --peer trl --peer-python P --json F    TRL in another Python, record to F
    python -m bench.train_step --peer none                            only ours
    python -m bench.train_step --peer exact                           ours: exact "on", op by op, and "off"
    python -m bench.train_step --trace step.json                      only ours, and a profile of one step
    python -m bench.train_step --workload 1b --device cuda --steps 2 --warmup 1

workloads.py has the workloads and their models; TRL runs only W1 and W2. Temperature 1, no KL, one update per
step. To install TRL: `pip install trl transformers accelerate datasets`.

    step_s                     rollout, reward, loss, backward, optimizer and logging
    train_s                    packing, logprobs and update; TRL's is its step minus generation
    percent_of_gemm            the step's FLOP rate, in percent of a large product's in the same dtype and
                               process: 2 FLOPs per active weight and sampled token, 6 per trained token,
                               attention not counted. On a GPU this is the MFU
    percent_of_decode_floor    on a GPU: the least time to read the rollout's weights and keys, over its time
    peak_mb, peak_gpu_mb       main memory, verifier processes included; GPU memory
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

from bench.harness import (
    CHECKOUT,
    add_json_option,
    describe_setting,
    gemm_gflops,
    gemm_rates,
    peak_rss_bytes,
    synchronize,
    write_json,
)
from bench.workloads import PEERS_KNOW, WORKLOADS, gpu_figures, workload_config, workload_stage
from kernels.dispatch import table
from kernels.native import ISA
from reason_rl.model.transformer import num_active_parameters, num_parameters
from reason_rl.records import StepStats
from reason_rl.report.log import RunLog
from reason_rl.stages.grpo import Grpo

SHOWN = ("step_s", "rollout_s", "train_s", "rollout_tok_s", "train_tok_s", "step_tok_s", "startup_mb", "peak_mb")
OURS_ONLY = ("percent_of_gemm", "percent_of_decode_floor", "peak_gpu_mb")
PEERS = ("trl float32", "trl bfloat16")
OURS, OURS_F32 = "reason_rl", "reason_rl float32"
COMPARED = ((OURS, PEERS[0]), (OURS, PEERS[1]), (OURS_F32, PEERS[0]), ("exact on", "exact off"),
            ("exact on, op by op", "exact off"))
"""Pairs of sides whose ratios are printed if both ran."""

Record = dict[str, Any]


def timed_step(stage: Grpo, step: int, log: RunLog) -> tuple[dict[str, float], StepStats]:
    """One step and its logging -> (timings, with the logging in `step_s`; the step's stats)."""
    start = time.perf_counter()
    stats = stage.step(step)
    log.metrics("grpo", "train", step + 1, stats.metrics)
    log.timings("grpo", "train", step + 1, stats.timings)
    synchronize()  # the GPU may still run the last update
    return stats.timings | {"step_s": time.perf_counter() - start}, stats


def measure(
    workload: str, dtype: str, device: str, steps: int, warmup: int, trace: str | None = None, exact: str = "auto",
    decoder: str = "auto",
) -> Record:
    """Medians over `steps` steps after `warmup` untimed ones; the gap is the largest of all steps."""
    # The stage.
    config = workload_config(workload, dtype, device, exact, decoder)
    stage = workload_stage(config, workload)
    startup_bytes = peak_rss_bytes()
    num_prompts, prompt_tokens, group_size, new_tokens = WORKLOADS[workload]

    # The steps.
    timings, gaps = [], []
    before = stage.policy.model.head_weight.detach().clone()
    with tempfile.TemporaryDirectory() as folder, RunLog(folder) as log:
        for step in range(warmup + steps):
            seconds, stats = timed_step(stage, step, log)
            assert all(len(c.token_ids) == new_tokens for group in stats.groups for c in group.completions)
            gaps.append(float(stats.metrics["max_abs_logprob_gap"]))
            if step >= warmup:
                timings.append(seconds)
    peak_bytes = peak_rss_bytes() + sum(map(peak_rss_bytes, stage.grader.service.worker_pids()))
    assert not torch.equal(before, stage.policy.model.head_weight.detach()), "the step must change the weights"
    if trace:
        write_trace(stage, warmup + steps, trace)

    # The record.
    tokens = num_prompts * group_size * new_tokens
    active = num_active_parameters(stage.policy.sampling_model)
    flops = 2 * active * tokens + 6 * active * (tokens + num_prompts * prompt_tokens)
    median = {key: statistics.median(t[key] for t in timings) for key in ("step_s", "rollout_s", "reward_s", "train_s")}
    return {
        "impl": "reason_rl", "workload": workload, **median, "step_s_min": min(t["step_s"] for t in timings),
        "rollout_tok_s": tokens / median["rollout_s"], "train_tok_s": tokens / median["train_s"],
        "step_tok_s": tokens / median["step_s"], "startup_mb": startup_bytes / 2**20, "peak_mb": peak_bytes / 2**20,
        "percent_of_gemm": 100 * flops / median["step_s"] / 1e9 / gemm_gflops(stage.world.dtype, device),
        **gpu_figures(stage, workload, median["rollout_s"]), "max_abs_logprob_gap": max(gaps), "exact": exact,
        "decoder": decoder, "kernels": kernels_of(stage),
        "parameters": num_parameters(stage.policy.sampling_model), "active_parameters": active,
        "dtype": str(stage.world.dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "steps": steps,
    }


def kernels_of(stage: Grpo) -> str:
    """The implementations that the ops use."""
    if stage.world.device.type == "cpu":
        return ISA or "reference ops"
    return ", ".join(f"{name} {picked}" for name, _, picked, _ in table(stage.world.device, stage.world.dtype))


def write_trace(stage: Grpo, step: int, path: str) -> None:
    with torch.profiler.profile() as profiler:
        stage.step(step)
    profiler.export_chrome_trace(path)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def run_child(command: list[str]) -> Record:
    """Runs the command in a new process -> its record, the last line of stdout."""
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    record: Record = json.loads(done.stdout.strip().splitlines()[-1])
    return record


def peer_is_installed(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", "import trl"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def side_commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name of a side -> its command, ours first."""
    ours = [sys.executable, "-m", "bench.train_step", "--peer", "none", "--no-gemm", "--json"]
    same = ["--workload", options.workload, "--steps", str(options.steps), "--warmup", str(options.warmup),
            "--device", options.device]
    if options.peer == "exact":
        ways = {"exact on": ("on", "auto"), "exact on, op by op": ("on", "ops"), "exact off": ("off", "auto")}
        return {name: [*ours, *same, "--dtype", options.dtype, "--exact", exact, "--decoder", decoder]
                for name, (exact, decoder) in ways.items()}
    theirs = [options.peer_python, str(CHECKOUT / "bench/peers/trl_step.py"), *same]
    sides = {OURS: [*ours, *same, "--dtype", options.dtype], OURS_F32: [*ours, *same, "--dtype", "float32"]}
    return sides | dict(zip(PEERS, (theirs, [*theirs, "--bf16"]), strict=True))


def alternate(options: argparse.Namespace) -> Record:
    """Runs the sides in turn for several rounds -> all records, each side's medians, and the ratios."""
    # The rounds.
    commands = side_commands(options)
    records: dict[str, list[Record]] = {name: [] for name in commands}
    for round_number in range(options.rounds):
        for name, command in commands.items():
            records[name].append(run_child(command))
            print(f"round {round_number + 1}  {name:18} step {records[name][-1]['step_s']:.3f} s", flush=True)

    # Medians and ratios.
    sides = {name: over_rounds(rounds) for name, rounds in records.items()}
    pairs = [pair for pair in COMPARED if set(pair) <= set(sides)]
    ratios = {f"{ours} / {theirs}": compare(sides[ours], sides[theirs]) for ours, theirs in pairs}
    result = {"sides": sides, "ratios": ratios, "records": records}
    peers = [name for name in PEERS if name in sides]
    return result | ({"faster_peer": min(peers, key=lambda name: sides[name]["step_s"])} if peers else {})


def over_rounds(rounds: list[Record]) -> dict[str, float]:
    """Medians over the rounds; of `step_s` also the least and the most."""
    steps = [record["step_s"] for record in rounds]
    above = statistics.median(record["peak_mb"] - record["startup_mb"] for record in rounds)
    shown = (*SHOWN, *(key for key in OURS_ONLY if key in rounds[0]))
    return {key: statistics.median(record[key] for record in rounds) for key in shown} | {
        "step_s_least_round": min(steps), "step_s_most_round": max(steps), "peak_above_startup_mb": above}


def compare(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float | None]:
    """Ratios: speedups are above 1 if ours is faster, memory is below 1 if ours takes less.

    `train_speedup` compares the step minus the rollout on both sides, because TRL's step cannot be split
    further.
    """
    memory = theirs["peak_above_startup_mb"]
    return {
        "step_speedup": theirs["step_s"] / ours["step_s"],
        "rollout_speedup": ours["rollout_tok_s"] / theirs["rollout_tok_s"],
        "train_speedup": (theirs["step_s"] - theirs["rollout_s"]) / (ours["step_s"] - ours["rollout_s"]),
        "memory_ours_over_theirs": ours["peak_above_startup_mb"] / memory if memory > 0 else None,
    }


def print_sides(record: Record) -> None:
    """A line per number, a column per side; then the ratios."""
    sides: dict[str, dict[str, float]] = record["sides"]
    print(f"{'':22}" + "".join(f"{name:>19}" for name in sides))
    for key in next(iter(sides.values())):
        print(f"{key:22}" + "".join(f"{side[key]:19.4g}" if key in side else f"{'':19}" for side in sides.values()))
    for name, ratios in record["ratios"].items():
        print(f"{name:34} " + "  ".join(f"{key} {'-' if value is None else f'{value:.2f}x'}" for key, value in ratios.items()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W1")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="of ours; TRL runs in float32 and bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--exact", choices=["auto", "on", "off"], default="auto", help="run.exact of ours")
    parser.add_argument("--decoder", choices=["auto", "native", "ops"], default="auto", help="engine.decoder of ours")
    parser.add_argument("--peer", choices=["trl", "exact", "none"],
                        help="runs in turn with ours: trl (default if installed), or ours with other run.exact")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has the peer installed")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, with a peer")
    parser.add_argument("--trace", help="write a torch profiler trace of one step of ours to this file")
    parser.add_argument("--no-gemm", action="store_true", help="leave out the table of matrix product rates")
    add_json_option(parser)
    options = parser.parse_args(arguments)

    # Combinations that contradict each other.
    if options.trace and options.peer in ("trl", "exact"):
        parser.error(f"--trace profiles our step, so it cannot go with --peer {options.peer}")
    if options.peer in ("trl", "exact") and (options.exact, options.decoder) != ("auto", "auto"):
        parser.error("--exact and --decoder need --peer none")
    if options.peer == "trl" and options.workload not in PEERS_KNOW:
        parser.error(f"TRL runs the workloads {', '.join(PEERS_KNOW)}, not {options.workload}")
    if min(options.steps, options.rounds) < 1 or options.warmup < 0:
        parser.error("--steps and --rounds must be at least 1, --warmup at least 0")
    return options


def main(arguments: list[str] | None = None) -> None:
    # Ours and a peer in turn, or only ours.
    options = parse(arguments)
    is_wanted = options.peer != "none" and not options.trace and (options.workload in PEERS_KNOW or options.peer == "exact")
    has_peer = is_wanted and (options.peer == "exact" or peer_is_installed(options.peer_python))
    if has_peer:
        record = alternate(options)
        print_sides(record)
    else:
        record = measure(
            options.workload, options.dtype, options.device, options.steps, options.warmup, options.trace, options.exact,
            options.decoder)
        print("  ".join(f"{key} {record[key]:.4g}" for key in (*SHOWN, *OURS_ONLY) if key in record))
        if is_wanted:
            print("trl: not installed")

    # The record.
    rates = None if options.no_gemm else gemm_rates(options.device)
    setting = describe_setting(options.device)
    write_json({"bench": "train_step", **record, "gemm_gflops": rates, "setting": setting}, options.json)


if __name__ == "__main__":
    main()
