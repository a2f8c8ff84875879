"""Time the rollout alone: tokens per second of the engine, natively and op by op.

    python -m bench.rollout                        workload W1 of bench.train_step, each decoder in turn
    python -m bench.rollout --workload W2 --dtype float32 --decoder native --json rollout.json

`percent_of_gemm` is the model's arithmetic (2 FLOPs a weight that a token meets, attention not counted) over the time, beside the
rate of a 2048^3 product measured in the same run. Both decoders must draw the same tokens with the same logprobs: that is checked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from bench.harness import add_json_option, describe_setting, gemm_rates, peak_rss_bytes, write_json
from bench.train_step import WORKLOADS, workload_config, workload_session
from reason_rl.engine.decoder import native_why_not
from reason_rl.model.transformer import num_active_parameters
from reason_rl.session import Session
from reason_rl.types import Group


def measure(session: Session, decoder: str, rounds: int, warmup: int) -> tuple[dict[str, Any], list[Group]]:
    """Medians over `rounds` rollouts of the same problems, and what the last one drew."""
    engine, rl = session.engine, session.config.rl
    engine.config = replace(engine.config, decoder=decoder)
    problems = session.draw_problems(0, rl.prompts_per_step, 0, ())
    seconds, groups = [], []
    for _ in range(warmup + rounds):
        start = time.perf_counter()
        groups = engine.generate(problems, rl.group_size, session.sampling, step=0)
        seconds.append(time.perf_counter() - start)
    tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    median = statistics.median(seconds[warmup:])
    return {"decoder": decoder, "rollout_s": median, "rollout_s_min": min(seconds[warmup:]), "rollout_tok_s": tokens / median,
            "gflops": 2 * num_active_parameters(session.weights.model) * tokens / median / 1e9,
            "peak_mb": peak_rss_bytes() / 2**20}, groups


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W1")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decoder", choices=["all", "native", "ops"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.warmup < 0:
        parser.error("--rounds must be at least 1, --warmup at least 0")
    session = workload_session(workload_config(options.workload, options.dtype, options.device), options.workload)
    dtype = str(session.world.dtype).removeprefix("torch.")
    rates = gemm_rates(options.device)
    reason = native_why_not(session.weights.model)
    if options.decoder == "native" and reason:
        sys.exit(f"bench.rollout: no native decoder here: {reason}")
    rows, drawn = [], []
    for decoder in ("native", "ops") if options.decoder == "all" else (options.decoder,):
        if decoder == "native" and reason:
            print(f"native: {reason}")
            continue
        row, groups = measure(session, decoder, options.rounds, options.warmup)
        row["percent_of_gemm"] = 100 * row["gflops"] / rates[dtype]
        rows.append(row)
        drawn.append([c for group in groups for c in group.completions])
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    if any(other != drawn[0] for other in drawn):
        sys.exit("bench.rollout: the decoders drew different tokens or logprobs")
    write_json({"bench": "rollout", "workload": options.workload, "dtype": dtype, "decoders": rows, "gemm_gflops": rates,
                "setting": describe_setting(options.device)}, options.json)


if __name__ == "__main__":
    main()
