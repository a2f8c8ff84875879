"""A run of train.py that writes down which implementation each op chose and which kernels one RL step launched (test_train_gpu.py).

    python -m tests.gpu_run RECORD.json [arguments of train.py]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import train
from kernels.dispatch import Implementation, Op
from reason_rl.config import parse_command_line
from reason_rl.records import StepStats
from reason_rl.stages.grpo import Grpo

PROFILED_STEP = 3
"""By then what is compiled at its first use is compiled."""


def main(record_file: Path, arguments: list[str]) -> int:
    chosen: set[tuple[str, str, str, str]] = set()
    launched: set[str] = set()
    choose, step = Op.choose, Grpo.step

    def choose_and_note(op: Op, like: torch.Tensor, impl: str = "auto", variant: str = "") -> Implementation:
        found = choose(op, like, impl, variant)
        chosen.add((op.name, like.device.type, str(like.dtype).removeprefix("torch."), found.name))
        return found

    def step_and_profile(stage: Grpo, index: int) -> StepStats:
        if index != PROFILED_STEP:
            return step(stage, index)
        with torch.profiler.profile() as profiler:
            stats = step(stage, index)
        launched.update(event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
        return stats

    Op.choose, Grpo.step = choose_and_note, step_and_profile  # type: ignore[method-assign]
    code = train.main(parse_command_line(arguments))
    record_file.write_text(json.dumps({"chosen": sorted(chosen), "launched": sorted(launched)}))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
