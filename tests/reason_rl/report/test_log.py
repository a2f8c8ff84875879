"""The run's log: what reaches disk, what a resumed run keeps, what the readers forgive."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reason_rl.report.log import RunLog, finite, read_jsonl, rollout_path, rollout_steps


def write_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.metrics("rl", step, {"reward": step / 7})
        log.timings("rl", step, {"step_s": 0.5})
        if step % 2 == 0:
            log.metrics("eval", step, {"split": "heldout", "accuracy": step / 9})
            log.rollouts(step, [{"step": step, "text": f"sample of {step}", "logprobs": [-0.1]}])


def start(folder: Path) -> RunLog:
    log = RunLog(folder, tensorboard=False)
    for step in range(0, 40, 20):
        log.metrics("pretrain", step, {"loss": 2.0 - step / 100})
    log.metrics("eval", 0, {"split": "heldout", "accuracy": 0.1})
    return log


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_line_is_on_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    log.metrics("rl", 1, {"reward": 0.25})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"phase": "rl", "step": 1, "reward": 0.25}]
    log.close()


def test_nan_and_infinities_become_null_at_any_depth(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.metrics("eval", 0, {"a": float("nan"), "pass_at_k": {"1": float("inf")}, "t": torch.tensor(float("-inf"))})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"phase": "eval", "step": 0, "a": None, "pass_at_k": {"1": None}, "t": None}
    assert "NaN" not in line and "Infinity" not in line


def test_a_resumed_run_writes_the_files_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    write_steps(whole, 1, 8)
    whole.close()
    cut = start(tmp_path / "cut")
    write_steps(cut, 1, 6)
    cut.close()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "rl", "step": 7, "rew')  # killed while writing
    resumed = RunLog(tmp_path / "cut", tensorboard=False, resume_step=3)
    assert rollout_steps(tmp_path / "cut") == [2]
    write_steps(resumed, 4, 8)
    resumed.close()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_resuming_at_step_zero_keeps_pretraining_and_the_base_evaluation(tmp_path: Path) -> None:
    log = start(tmp_path)
    write_steps(log, 1, 4)
    log.close()
    RunLog(tmp_path, tensorboard=False, resume_step=0).close()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(r["phase"], r["step"]) for r in rows] == [("pretrain", 0), ("pretrain", 20), ("eval", 0)]


def test_a_fresh_log_leaves_nothing_of_an_older_run(tmp_path: Path) -> None:
    log = start(tmp_path)
    write_steps(log, 1, 4)
    log.close()
    RunLog(tmp_path, tensorboard=False).close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [] and rollout_steps(tmp_path) == []


def test_the_reader_leaves_out_a_torn_last_line_and_names_a_damaged_middle_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_jsonl(path) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_separators_of_unicode_lines_do_not_tear_a_rollout(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.rollouts(1, [{"text": "a\u2028b\u0085c\nd"}])
    assert read_jsonl(rollout_path(tmp_path, 1)) == [{"text": "a\u2028b\u0085c\nd"}]


def test_values_may_not_shadow_phase_or_step(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log, pytest.raises(ValueError, match="step"):
        log.metrics("rl", 1, {"step": 3})


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match="got object"):
        finite({"a": object()})


def test_wandb_asked_for_but_absent_is_a_clear_error_before_files_change(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = start(tmp_path)
    log.close()
    before = contents(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` raise ImportError
    with pytest.raises(ValueError, match=r"run\.wandb_project = 'mine'.*pip install wandb"):
        RunLog(tmp_path, tensorboard=False, wandb_project="mine")
    assert contents(tmp_path) == before


def test_wandb_gets_each_phase_with_its_own_step_and_a_resumed_run_its_old_id(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    ids: list[str | None] = []

    def init(**arguments: object) -> SimpleNamespace:
        ids.append(arguments["id"])  # type: ignore[arg-type]
        return SimpleNamespace(id="abc", define_metric=lambda *a, **k: None, log=seen.append, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # type: ignore[arg-type]
    with RunLog(tmp_path, tensorboard=False, wandb_project="p") as log:
        log.metrics("eval", 3, {"split": "heldout", "accuracy": 0.5, "pass_at_k": {"2": 0.75}, "none": None})
    RunLog(tmp_path, tensorboard=False, wandb_project="p", resume_step=3).close()
    assert seen == [{"eval/step": 3, "eval/accuracy": 0.5, "eval/pass_at_k/2": 0.75}]
    assert ids == [None, "abc"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_hides_what_a_resume_dropped_and_keeps_pretraining(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps(phase: str, tag: str) -> list[int]:
        events = EventAccumulator(str(tmp_path / "tensorboard" / phase))
        events.Reload()
        return [event.step for event in events.Scalars(tag)]

    with RunLog(tmp_path) as log:
        log.metrics("pretrain", 500, {"loss": 1.0})
        for step in (1, 2, 3):
            log.metrics("rl", step, {"reward": 0.1 * step})
    with RunLog(tmp_path, resume_step=1) as log:
        log.metrics("rl", 2, {"reward": 0.2})
    assert steps("rl", "reward") == [1, 2]
    assert steps("pretrain", "loss") == [500]
