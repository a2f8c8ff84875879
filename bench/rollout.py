"""Time the engine's rollout: tokens per second of each decoder.

native: several tokens per C++ call, on a CPU. ops: op by op. graphs: CUDA graphs of decode steps, on a GPU.

    python -m bench.rollout                        workload W1 of bench.train_step, each decoder in turn
    python -m bench.rollout --workload W2 --dtype float32 --decoder native --json rollout.json

`percent_of_gemm` is the model's FLOP rate (2 FLOPs per active weight and token, attention not counted) in
percent of the rate of a large product, measured in the same run. On a GPU there is also
`percent_of_decode_floor` (workloads.py). Each decoder runs in a new process. The command fails if they draw
different tokens or logprobs.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time

import torch

from bench.harness import add_json_option, describe_setting, gemm_gflops, peak_rss_bytes, write_json
from bench.train_step import Record, run_child
from bench.workloads import WORKLOADS, gpu_figures, workload_config, workload_stage
from kernels.native import cpu_unsupported_reason
from reason_rl.model.transformer import num_active_parameters


def measure(options: argparse.Namespace) -> Record:
    """Medians over the rounds of one decoder; all rounds sample the same problems."""
    # The engine.
    has_graphs = options.decoder == "graphs"
    config = workload_config(options.workload, options.dtype, options.device, with_graphs=has_graphs,
                             decoder="ops" if has_graphs else options.decoder)
    stage = workload_stage(config, options.workload)
    startup_bytes = peak_rss_bytes()
    problems = stage.problems.train(0, config.rl.prompts_per_step)

    # The rounds.
    seconds, groups = [], []
    for _ in range(options.warmup + options.rounds):
        start = time.perf_counter()
        groups = stage.engine.generate(problems, config.rl.group_size, stage.sampling, step=0)
        seconds.append(time.perf_counter() - start)
    peak_bytes = peak_rss_bytes()

    # The record; the hash is equal for all decoders.
    drawn = [(c.token_ids, c.logprobs) for group in groups for c in group.completions]
    tokens = sum(len(ids) for ids, _ in drawn)
    median = statistics.median(seconds[options.warmup :])
    gflops = 2 * num_active_parameters(stage.policy.sampling_model) * tokens / median / 1e9
    return {
        "decoder": options.decoder, "dtype": str(stage.world.dtype).removeprefix("torch."), "rollout_s": median,
        "rollout_s_min": min(seconds[options.warmup :]), "rollout_tok_s": tokens / median, "startup_mb": startup_bytes / 2**20,
        "peak_mb": peak_bytes / 2**20, "gflops": gflops,
        "percent_of_gemm": 100 * gflops / gemm_gflops(stage.world.dtype, options.device),
        **gpu_figures(stage, options.workload, median),
        "drawn_sha256": hashlib.sha256(repr(drawn).encode()).hexdigest()}


def measure_each(options: argparse.Namespace) -> list[Record]:
    """Every decoder that can run on the device, each in a new process."""
    reason = cpu_unsupported_reason(torch.device(options.device))
    if reason:
        print(f"native: {reason}")
    rows = []
    graphs = ("graphs",) if torch.device(options.device).type == "cuda" else ()
    for decoder in (*(() if reason else ("native",)), "ops", *graphs):
        command = [sys.executable, "-m", "bench.rollout", "--decoder", decoder]
        for name in ("workload", "dtype", "device", "rounds", "warmup"):
            command += [f"--{name}", str(getattr(options, name))]
        rows.append(run_child([*command, "--json"])["decoders"][0])
        show(rows[-1])
    return rows


def show(row: Record) -> None:
    print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {str(value)[:12]}" for key, value in row.items()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W1")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decoder", choices=["all", "native", "ops", "graphs"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.warmup < 0:
        parser.error("--rounds must be at least 1, --warmup at least 0")
    if options.decoder == "graphs" and torch.device(options.device).type != "cuda":
        parser.error(f"--decoder graphs needs CUDA graphs, so it cannot go with --device {options.device}")

    # Measure, compare the drawn tokens, record.
    if options.decoder == "all":
        rows = measure_each(options)
    else:
        rows = [measure(options)]
        show(rows[0])
    if len({row["drawn_sha256"] for row in rows}) != 1:
        sys.exit("bench.rollout: the decoders drew different tokens or logprobs")
    write_json({"bench": "rollout", "workload": options.workload, "decoders": rows, "setting": describe_setting(options.device)},
               options.json)


if __name__ == "__main__":
    main()
