"""Refusals: bad input is one clear error before any work and leaves no files; a wait for another run can be stopped."""

from __future__ import annotations

import fcntl
import importlib.util
from pathlib import Path

import pytest
import torch

from reason_rl.config import ConfigError
from reason_rl.run import stage_folder
from reason_rl.run.folder import describe_source
from reason_rl.stages.pretrain import Pretrain
from tests.reason_rl.run.tiny_run import never_stop, run_apart, run_here, stop_after

BAD = [
    (["--rl.stepz=3"], "rl.stepz.*did you mean 'rl.steps'"),
    (["--model.init_from=nowhere"], "no checkpoint folder at nowhere"),
    (["--task.name=programm"], "unknown task.name 'programm'"),
    (["--task.name=nowhere:Double"], "task.name = 'nowhere:Double': importing 'nowhere' failed: ModuleNotFoundError"),
    (["--task.name=tests.reason_rl.run.own_tasks:Double"], "Double is a Task and not a CorpusTask .*: set model.init_from"),
    (["--task.heldout_share=0"], "heldout.*share is 0.0: raise it"),
    (["--task.rl_share=0"], "train problems of task 'program'"),
    (["--sampling.max_tokens=60"], "max_position_embeddings = 64 less sampling.max_tokens = 60 leaves 4"),
    (["--engine.num_blocks=3"], "needs 4 KV blocks of 16, but engine.num_blocks = 3"),
    (["--reward.custom=nowhere:f"], "importing 'nowhere' failed"),
    (["--reward.custom=tests.reason_rl.run.train_rewards:absent"], "no function 'absent'"),
    (["--model.max_position_embeddings=24", "--sampling.max_tokens=12"], r"a corpus document has \d+ tokens"),
    (["--run.wandb_project=x"], "needs the wandb package"),
    (["--run.device=cuda:7"], "sees no CUDA device"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_input_is_one_clear_error_before_any_work_and_leaves_no_trace(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if "cuda" in more[0] and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    if "wandb" in more[0] and importlib.util.find_spec("wandb"):
        pytest.skip("needs a machine without wandb")
    monkeypatch.setattr(Pretrain, "step", None)
    never_stop(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        run_here(tmp_path, *more)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.toml"}


def test_the_commands_errors_are_one_line_and_no_traceback(tmp_path: Path):
    done = run_apart(tmp_path, "--rl.stepz=3")
    assert done.returncode == 1 and done.stderr.startswith("train.py: unknown config key rl.stepz")
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_a_bug_in_the_users_code_keeps_its_traceback(tmp_path: Path):
    """Only a ConfigError is turned into one line: a ValueError of a forker's own code must name its file and line."""
    done = run_apart(tmp_path, "--task.name=tests.reason_rl.run.own_tasks:Broken")
    assert done.returncode == 1 and "Traceback" in done.stderr and "own_tasks.py" in done.stderr
    assert done.stderr.rstrip().endswith("ValueError: invalid literal in the user's own code")


def test_waiting_for_another_runs_stage_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stop_after(monkeypatch, 1)
    assert run_here(tmp_path) == 130  # which makes the stage's folder
    (folder,) = (tmp_path / "stages").iterdir()
    stop_after(monkeypatch, 2)
    monkeypatch.setattr(stage_folder, "LOCK_POLL_S", 0.01)
    with folder.with_name(f"{folder.name}.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run_here(tmp_path) == 130


def test_a_run_is_one_processs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A second one would replace the log that the first one appends to."""
    stop_after(monkeypatch, 1)
    assert run_here(tmp_path) == 130 and not (tmp_path / "tiny" / ".lock").exists()
    with (tmp_path / "tiny" / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process is at work on the run in .*tiny"):
            run_here(tmp_path)
    assert run_here(tmp_path) == 130


def test_without_git_the_source_is_unknown_and_nothing_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert describe_source() == {"commit": "", "tree": ""}
