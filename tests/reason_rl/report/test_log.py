"""The run's log: its writes to disk, the lines that `restore` keeps and removes, and the damage that readers accept."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reason_rl.report.files import atomic_folder, atomic_write_text, finite, read_jsonl
from reason_rl.report.log import METRICS, TIMINGS, RunLog, read_log, rollout_path, rollout_steps

STAGES = ("pretrain", "grpo", "grpo-2")


def write_steps(log: RunLog, stage: str, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.metrics(stage, "train", step, {"reward": step / 7})
        log.timings(stage, "train", step, {"step_s": 0.5})
        if step % 2 == 0:
            log.metrics(stage, "eval", step, {"split": "heldout", "accuracy": step / 9})
            log.rollouts(stage, step, [{"step": step, "text": f"sample of {step}", "logprobs": [-0.1]}])


def start(folder: Path) -> RunLog:
    """A log with a finished pretraining and the evaluation before the first GRPO step."""
    log = RunLog(folder, tensorboard=False)
    for step in range(20, 60, 20):
        log.metrics("pretrain", "train", step, {"loss": 2.0 - step / 100})
    log.metrics("grpo", "eval", 0, {"split": "heldout", "accuracy": 0.1})
    return log


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_line_is_on_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    log.metrics("grpo", "train", 1, {"reward": 0.25})
    assert read_jsonl(tmp_path / METRICS) == [{"stage": "grpo", "phase": "train", "step": 1, "reward": 0.25}]
    log.close()


def test_nan_and_infinities_become_null_at_any_depth(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.metrics("grpo", "eval", 0, {
            "a": float("nan"), "pass_at_k": {"1": float("inf")}, "t": torch.tensor(float("-inf"))})
    line = (tmp_path / METRICS).read_text(encoding="utf-8")
    assert json.loads(line) == {"stage": "grpo", "phase": "eval", "step": 0, "a": None, "pass_at_k": {"1": None}, "t": None}
    assert "NaN" not in line and "Infinity" not in line


def test_a_resumed_run_writes_the_files_of_an_uninterrupted_one(tmp_path: Path) -> None:
    with start(tmp_path / "whole") as whole:
        write_steps(whole, "grpo", 1, 8)
    with start(tmp_path / "cut") as cut:
        write_steps(cut, "grpo", 1, 3)
        saved = json.loads(json.dumps(cut.history("grpo")))  # as a checkpoint holds it
        write_steps(cut, "grpo", 4, 6)
    with (tmp_path / "cut" / METRICS).open("a", encoding="utf-8") as file:
        file.write('{"stage": "grpo", "phase": "train", "step": 7, "rew')  # killed while writing
    with RunLog(tmp_path / "cut", tensorboard=False) as resumed:
        resumed.restore("grpo", saved)
        assert rollout_steps(tmp_path / "cut", "grpo") == [2]
        write_steps(resumed, "grpo", 4, 8)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_history_holds_every_line_of_one_stage(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        write_steps(log, "grpo", 1, 2)
        history = log.history("grpo")
    assert [(line["phase"], line["step"]) for line in history[METRICS]] == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    assert [line["step"] for line in history[TIMINGS]] == [1, 2] and set(history) == {METRICS, TIMINGS}


@pytest.mark.parametrize(("stage", "left"), [("pretrain", []), ("grpo", ["pretrain"]), ("grpo-2", ["pretrain", "grpo"])])
def test_restore_removes_the_stage_and_all_stages_after_it(tmp_path: Path, stage: str, left: list[str]) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for name in STAGES:
            write_steps(log, name, 1, 4)
        log.restore(stage, {})
        for name in (METRICS, TIMINGS):
            assert list(dict.fromkeys(line["stage"] for line in read_log(tmp_path, name))) == left
        assert [name for name in STAGES if rollout_steps(tmp_path, name)] == left
        log.metrics(stage, "train", 1, {"loss": 1.0})  # the log goes on in the rewritten file
    assert [line["stage"] for line in read_log(tmp_path, METRICS)][-1] == stage


def test_restore_writes_the_history_of_a_stage_that_another_run_trained(tmp_path: Path) -> None:
    with start(tmp_path / "first") as first:
        history = first.history("pretrain")
    with RunLog(tmp_path / "second", tensorboard=False) as second:
        second.restore("pretrain", history)
        assert second.history("pretrain") == history
    with pytest.raises(ValueError, match=r"expected lines of stage 'grpo', got lines of \['pretrain'\]"):
        second.restore("grpo", history)


def test_opening_a_log_drops_a_torn_line_and_keeps_the_rest(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        write_steps(log, "grpo", 1, 4)
    before = contents(tmp_path)
    with (tmp_path / TIMINGS).open("a", encoding="utf-8") as file:
        file.write('{"stage": "grpo", "ph')
    RunLog(tmp_path, tensorboard=False).close()
    assert contents(tmp_path) == before


def test_the_reader_drops_a_torn_last_line_and_names_a_damaged_middle_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_jsonl(path) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_a_log_line_without_a_stage_is_named(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"phase": "rl", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: expected the keys .*, got none for \['stage'\]"):
        read_log(tmp_path, METRICS)


def test_unicode_line_separators_do_not_split_a_rollout(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.rollouts("grpo", 1, [{"text": "a\u2028b\u0085c\nd"}])
    assert read_jsonl(rollout_path(tmp_path, "grpo", 1)) == [{"text": "a\u2028b\u0085c\nd"}]


def test_values_may_not_shadow_stage_phase_or_step(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log, pytest.raises(ValueError, match=r"must not hold \['step'\]"):
        log.metrics("grpo", "train", 1, {"step": 3})


def test_an_unknown_phase_is_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log, pytest.raises(ValueError, match="got 'rl'"):
        log.metrics("grpo", "rl", 1, {})  # type: ignore[arg-type]


def test_a_value_that_is_not_json_is_named() -> None:
    with pytest.raises(ValueError, match="got object"):
        finite({"a": object()})


def test_an_atomic_write_is_on_disk_before_its_name_and_leaves_no_scratch_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    atomic_write_text(tmp_path / "x.txt", "é\n")
    assert (tmp_path / "x.txt").read_bytes() == "é\n".encode() and calls == ["fsync", "rename", "fsync"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(tmp_path / "x.txt", "new \ud800")
    assert contents(tmp_path) == {"x.txt": b"old"}


def test_an_atomic_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for number in ("1", "2"):
        with atomic_folder(tmp_path / "out") as folder:
            (folder / number).write_text(number)
            assert not (tmp_path / "out" / number).exists()
    assert contents(tmp_path) == {"out/2": b"2"}


def test_a_failed_atomic_folder_keeps_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as folder:
        (folder / "2").write_text("2")
        raise RuntimeError
    assert contents(tmp_path) == {"out/1": b"1"}


def test_wandb_asked_for_but_absent_is_a_clear_error_before_files_change(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path).close()
    before = contents(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` raise ImportError
    with pytest.raises(ValueError, match=r"run\.wandb_project = 'mine'.*pip install wandb"):
        RunLog(tmp_path, tensorboard=False, wandb_project="mine")
    assert contents(tmp_path) == before


class FakeWandb:
    """Records every call of a W&B run."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.axes: list[tuple[str, str]] = []
        self.ids: list[Any] = []

    def init(self, **arguments: Any) -> SimpleNamespace:
        self.ids.append(arguments["id"])
        return SimpleNamespace(id="abc", log=self.logged.append, finish=lambda: None,
                               define_metric=lambda name, step_metric: self.axes.append((name, step_metric)))


def test_wandb_gets_each_stage_and_phase_with_its_own_step_and_a_resumed_run_its_old_id(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    with RunLog(tmp_path, tensorboard=False, wandb_project="p") as log:
        log.metrics("grpo", "eval", 3, {"split": "heldout", "accuracy": 0.5, "pass_at_k": {"2": 0.75}, "none": None})
        log.timings("grpo", "eval", 3, {"eval_s": 2.0})
    RunLog(tmp_path, tensorboard=False, wandb_project="p").close()
    assert wandb.logged == [{"grpo/eval/step": 3, "grpo/eval/accuracy": 0.5, "grpo/eval/pass_at_k/2": 0.75},
                            {"grpo/eval/step": 3, "grpo/eval/time/eval_s": 2.0}]
    assert wandb.axes == [("grpo/eval/*", "grpo/eval/step")] and wandb.ids == [None, "abc"]


def test_restore_sends_wandb_only_the_lines_that_the_log_did_not_hold(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    with RunLog(tmp_path / "other", tensorboard=False) as log:
        write_steps(log, "grpo", 1, 3)
        history = log.history("grpo")
    with RunLog(tmp_path / "mine", tensorboard=False, wandb_project="p") as log:
        log.metrics("grpo", "train", 1, {"reward": 1 / 7})
        log.timings("grpo", "train", 1, {"step_s": 0.5})
        wandb.logged.clear()
        log.restore("grpo", history)
    assert [(row.get("grpo/train/step"), row.get("grpo/eval/step")) for row in wandb.logged] == [
        (2, None), (None, 2), (3, None), (2, None), (3, None)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_hides_the_steps_that_restore_removed_and_keeps_the_stages_before(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps(run: str, tag: str) -> list[int]:
        events = EventAccumulator(str(tmp_path / "tensorboard" / run))
        events.Reload()
        return [event.step for event in events.Scalars(tag)]

    with RunLog(tmp_path) as log:
        log.metrics("pretrain", "train", 500, {"loss": 1.0})
        log.metrics("grpo", "train", 1, {"reward": 0.1})
        history = log.history("grpo")
        for step in (2, 3):
            log.metrics("grpo", "train", step, {"reward": 0.1 * step})
        log.metrics("grpo", "eval", 3, {"accuracy": 0.5})
        log.metrics("grpo-2", "train", 1, {"reward": 0.9})
    with RunLog(tmp_path) as log:
        log.restore("grpo", history)
        log.metrics("grpo", "train", 2, {"reward": 0.2})
        log.metrics("grpo", "eval", 2, {"accuracy": 0.6})
    assert steps("grpo/train", "reward") == [1, 2] and steps("grpo/eval", "accuracy") == [2]
    assert steps("pretrain/train", "loss") == [500]
    assert not (tmp_path / "tensorboard" / "grpo-2").exists()
