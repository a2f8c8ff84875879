"""A whole run of seconds: its files, that a stopped run resumes to the same bits, and the failures that it survives."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import train
from reason_rl.config import ConfigError, load_config, parse_command_line
from reason_rl.data import TooFewProblems
from reason_rl.data.generated import GeneratedProblems
from reason_rl.model.weights import load_model
from reason_rl.parallel import world as distributed
from reason_rl.run import stage_folder as stage_folder_module
from reason_rl.run.loop import Run
from reason_rl.stages import grpo
from reason_rl.stages.grpo import Grpo
from reason_rl.stages.pretrain import Pretrain
from tests.reason_rl.run.tiny_run import (
    FAR_FROM_DEFAULT,
    ROOT,
    arguments,
    fingerprints,
    forget,
    never_stop,
    rows,
    run_apart,
    run_here,
    said,
    stage_folder,
    stop_after,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run; its stages' outputs are in stages/. Read, never written."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        never_stop(monkeypatch)
        out_dir = tmp_path_factory.mktemp("whole")
        assert run_here(out_dir) == 0
    return out_dir / "tiny"


@pytest.fixture
def with_base(finished: Path, tmp_path: Path) -> Path:
    """An out_dir with the base model and no run."""
    base = stage_folder(finished.parent, "pretrain")
    shutil.copytree(base, tmp_path / "stages" / base.name)
    return tmp_path


def test_train_py_fits_one_screen():
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) <= 64


def test_a_run_writes_its_files(finished: Path):
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.toml", "compute.json", "metrics.jsonl", "timings.jsonl", "rollouts", "tensorboard", "checkpoints",
                     "summary.json", "report.html"}
    assert {p.name for p in (finished / "rollouts" / "grpo").iterdir()} == {f"step_{s:06d}.jsonl" for s in (1, 2, 4, 5)}
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"pretrain", "grpo", "final"}
    stage = stage_folder(finished.parent, "grpo")
    assert {p.name for p in stage.iterdir()} == {"step_000002", "step_000004", "final", "rollouts"}
    assert (stage / "final" / "model.safetensors").samefile(finished / "checkpoints" / "final" / "model.safetensors")
    assert list((finished / "tensorboard").rglob("events.out.tfevents.*"))
    assert len((finished / "report.html").read_text()) > 10_000


def test_metrics_follow_the_run_step_by_step(finished: Path):
    assert [row["step"] for row in rows(finished, stage="pretrain")] == [10, 20, 24]
    assert [row["step"] for row in rows(finished, stage="grpo", phase="train")] == [1, 2, 3, 4, 5]
    assert [(row["step"], row["problems"]) for row in rows(finished, phase="eval")] == [(0, 8), (2, 6), (4, 6), (5, 8)]
    assert {row["max_abs_logprob_gap"] for row in rows(finished, stage="grpo", phase="train")} == {0.0}
    assert rows(finished, stage="grpo", phase="train")[0]["num_loss_tokens"] > 0
    assert not any(key.endswith("_s") for row in rows(finished) for key in row)
    assert [row["step"] for row in rows(finished, "timings.jsonl", "grpo", "train")] == [1, 2, 3, 4, 5]


def test_the_summary_compares_base_and_final(finished: Path):
    summary = json.loads((finished / "summary.json").read_text())
    evaluations = {row["step"]: row for row in rows(finished, phase="eval")}
    for when, step in (("base", 0), ("final", 5)):
        assert summary[f"{when}_accuracy"] == evaluations[step]["accuracy"]
        assert summary[f"{when}_mean_thinking_tokens"] == evaluations[step]["mean_thinking_tokens"]
        assert summary[f"{when}_pass_at_k"].keys() == {"1", "2", "4"}
    assert (summary["seed"], summary["heldout_problems"], summary["heldout_samples"]) == (0, 8, 2)
    assert summary["max_abs_logprob_gap"] == 0.0 and summary["wall_s"] > 0 and summary["ungraded"] == 0
    assert summary["seconds"].keys() == {"pretrain_s", "start_s", "grpo_s", "eval_s"}
    assert summary["wall_s"] == pytest.approx(sum(summary["seconds"].values()), abs=0.03)  # each is rounded to 0.01


def test_the_resolved_config_runs_the_same_run(finished: Path):
    assert load_config(finished / "config.toml") == parse_command_line(arguments(finished.parent))


def test_rl_changes_the_base_and_saves_the_result(finished: Path):
    weights = [load_model(finished / "checkpoints" / name).embedding.weight for name in ("pretrain", "final")]
    assert not torch.equal(*weights)


def test_a_finished_run_says_so_and_exits(finished: Path, capsys: pytest.CaptureFixture[str]):
    before = fingerprints(finished)
    code, text = said(capsys, lambda: run_here(finished.parent))
    assert code == 0 and "is finished" in text and "report.html" in text
    assert fingerprints(finished) == before


def test_another_config_is_refused_with_the_difference(finished: Path):
    before = fingerprints(finished)
    with pytest.raises(ConfigError, match=r"another config[\s\S]*rl\.steps: 5 -> 6") as refused:
        run_here(finished.parent, "--rl.steps=6")
    assert "optim" not in str(refused.value) and fingerprints(finished) == before


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(
    stop_at: int, finished: Path, with_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stop_after(monkeypatch, stop_at)
    code, text = said(capsys, lambda: run_here(with_base))
    if stop_at < 5:
        assert code == 130 and f"stage grpo stopped after {stop_at} of 5 steps. The same command continues" in text
        assert not (with_base / "tiny" / "summary.json").exists()
        never_stop(monkeypatch)
        code, text = said(capsys, lambda: run_here(with_base))
        assert f"Resuming from {stage_folder(with_base, 'grpo')}/step_00000{stop_at}" in text
    assert code == 0  # a stop at the last step lets the run finish
    assert fingerprints(with_base / "tiny") == fingerprints(finished)


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_bits(
    finished: Path, with_base: Path, monkeypatch: pytest.MonkeyPatch
):
    """The kill saves nothing: the log is one step ahead of the checkpoint, and its last line is torn."""
    never_stop(monkeypatch)
    real = Grpo.step

    def killed(stage, index):
        if index == 3:
            raise KeyboardInterrupt
        return real(stage, index)

    monkeypatch.setattr(Grpo, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_here(with_base)
    with (with_base / "tiny" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "phase": "train", "step": 4, "rew')
    monkeypatch.setattr(Grpo, "step", real)
    assert run_here(with_base) == 0
    assert fingerprints(with_base / "tiny") == fingerprints(finished)


def test_an_interrupted_pretraining_goes_on_to_the_same_base(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stop_after(monkeypatch, 2)
    code, text = said(capsys, lambda: run_here(tmp_path))
    assert code == 130 and "stage pretrain stopped after 20 of 24 steps" in text
    assert [path.name for path in stage_folder(tmp_path, "pretrain").iterdir()] == ["step_000020"]
    never_stop(monkeypatch)
    assert run_here(tmp_path) == 0
    base, whole = (stage_folder(out_dir, "pretrain") for out_dir in (tmp_path, finished.parent))
    assert base.name == whole.name
    assert (base / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
    assert fingerprints(tmp_path / "tiny") == fingerprints(finished)


def test_a_stop_at_the_last_update_of_pretraining_keeps_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stop_after(monkeypatch, 3)
    assert run_here(tmp_path) == 130
    assert (stage_folder(tmp_path, "pretrain") / "final").is_dir()
    assert [row["step"] for row in rows(tmp_path / "tiny", stage="grpo", phase="train")] == [1]


def refuse_work(monkeypatch: pytest.MonkeyPatch, *stages: type) -> None:
    def refuse(*given: object) -> None:
        raise AssertionError("trained again")

    for stage in stages:
        monkeypatch.setattr(stage, "step", refuse)


def test_a_stage_is_made_once_for_all_runs_that_share_it(
    finished: Path, with_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    never_stop(monkeypatch)
    refuse_work(monkeypatch, Pretrain)
    code, text = said(capsys, lambda: run_here(with_base, "--name=other", "--rl.steps=1"))
    assert code == 0 and "Stage pretrain reused" in text
    assert rows(with_base / "other", stage="pretrain") == rows(finished, stage="pretrain")
    with pytest.raises(AssertionError, match="trained again"):
        run_here(with_base, "--name=third", "--seed=1")


def test_a_run_whose_stages_are_all_made_takes_their_log_their_rollouts_and_their_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(finished.parent / "stages", tmp_path / "stages")
    never_stop(monkeypatch)
    refuse_work(monkeypatch, Pretrain, Grpo)
    assert run_here(tmp_path, "--name=second") == 0
    assert fingerprints(tmp_path / "second") == fingerprints(finished)
    with pytest.raises(AssertionError, match="trained again"):
        run_here(tmp_path, "--name=second", "--resume=never")


def test_another_run_goes_on_with_a_stage_that_one_began(
    finished: Path, with_base: Path, monkeypatch: pytest.MonkeyPatch
):
    stop_after(monkeypatch, 2)
    assert run_here(with_base, "--name=first") == 130
    never_stop(monkeypatch)
    assert run_here(with_base, "--name=second") == 0
    assert fingerprints(with_base / "second") == fingerprints(finished)  # also the rollouts of the steps that the first one took
    assert run_here(with_base, "--name=first") == 0
    assert fingerprints(with_base / "first") == fingerprints(finished)


def test_two_runs_that_want_one_stage_make_it_once(
    finished: Path, with_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The test plays the other run: it holds the lock and releases it once the stage's output exists."""
    base = stage_folder(with_base, "pretrain")
    hidden = with_base / "elsewhere"
    base.rename(hidden)
    lock = base.with_name(f"{base.name}.lock")
    held = lock.open("a")
    fcntl.flock(held, fcntl.LOCK_EX)

    def finish() -> None:
        hidden.rename(base)
        lock.unlink()
        held.close()

    never_stop(monkeypatch)
    refuse_work(monkeypatch, Pretrain)
    monkeypatch.setattr(stage_folder_module, "LOCK_POLL_S", 0.02)
    other = threading.Timer(0.5, finish)
    other.start()
    code, text = said(capsys, lambda: run_here(with_base, "--rl.steps=1"))
    other.join()
    assert code == 0 and "Another run is making this stage" in text and "Stage pretrain reused" in text
    assert not list((with_base / "stages").glob("*.lock"))


def test_a_drift_between_sampler_and_trainer_is_printed_once_and_the_run_goes_on(
    with_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = grpo.policy_update

    def drifts(*given, **more):
        return real(*given, **more) | {"max_abs_logprob_gap": 0.25}

    never_stop(monkeypatch)
    monkeypatch.setattr(grpo, "policy_update", drifts)
    code, text = said(capsys, lambda: run_here(with_base, "--rl.steps=2"))
    assert code == 0 and " ".join(text.split()).count("differ by 0.25 nats on policy") == 1
    assert {row["max_abs_logprob_gap"] for row in rows(with_base / "tiny", stage="grpo", phase="train")} == {0.25}


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_a_run_that_breaks_off_closes_its_log(error: type[BaseException], with_base: Path, monkeypatch: pytest.MonkeyPatch):
    runs = []

    def breaks(run, stage) -> None:
        runs.append(run)
        raise error

    never_stop(monkeypatch)
    monkeypatch.setattr(Run, "complete", breaks)
    with pytest.raises(error):
        run_here(with_base)
    assert all(file.closed for file in runs[0].log._files.values())


def test_dynamic_sampling_goes_on_when_the_problems_run_out(with_base: Path, monkeypatch: pytest.MonkeyPatch):
    real = GeneratedProblems.train

    def few(problems, step, count, round=0, exclude=()):
        if round:
            raise TooFewProblems("none left")
        return real(problems, step, count, round, exclude)

    never_stop(monkeypatch)
    monkeypatch.setattr(GeneratedProblems, "train", few)
    assert run_here(with_base, "--rl.dynamic_sampling=3", "--rl.steps=1",
                    "--reward.custom=tests.reason_rl.run.train_rewards:always_raises") == 0
    assert rows(with_base / "tiny", stage="grpo", phase="train")[0]["ungraded"] == 16


def test_resume_never_starts_a_new_run_that_can_itself_be_resumed(
    finished: Path, with_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(finished, with_base / "tiny")
    stop_after(monkeypatch, 2)  # the base model is reused, so it asks in RL alone
    code, text = said(capsys, lambda: run_here(with_base, "--resume=never"))
    assert code == 130 and f"train.py {with_base}/tiny-2/config.toml continues from here" in text
    never_stop(monkeypatch)
    assert train.main(load_config(with_base / "tiny-2" / "config.toml")) == 0
    assert fingerprints(with_base / "tiny-2") == fingerprints(finished) == fingerprints(with_base / "tiny")
    assert run_here(with_base, "--resume=never", "--rl.steps=0") == 0 and (with_base / "tiny-3").is_dir()


def test_rl_can_start_from_any_checkpoint_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    never_stop(monkeypatch)
    assert run_here(tmp_path, f"--model.init_from={finished / 'checkpoints/pretrain'}") == 0
    assert not list((tmp_path / "stages").glob("pretrain-*"))
    assert rows(tmp_path / "tiny", stage="grpo", phase="train") == rows(finished, stage="grpo", phase="train")


@pytest.mark.parametrize(("reward", "counted"), [("raises_at_times", "some"), ("nan_at_times", "some"), ("always_raises", "all")])
def test_a_broken_reward_leaves_completions_ungraded_and_the_run_goes_on(
    reward: str, counted: str, with_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    never_stop(monkeypatch)
    code, text = said(capsys, lambda: run_here(
        with_base, f"--reward.custom=tests.reason_rl.run.train_rewards:{reward}", "--rl.steps=2"))
    cause = {"raises_at_times": "RuntimeError: no idea", "nan_at_times": "returned nan", "always_raises": "never any idea"}[reward]
    assert code == 0 and " ".join(text.split()).count("could not be graded") == 1 and cause in " ".join(text.split())
    steps = rows(with_base / "tiny", stage="grpo", phase="train")
    assert len(steps) == 2
    assert json.loads((with_base / "tiny" / "summary.json").read_text())["ungraded"] == sum(row["ungraded"] for row in steps)
    assert all(row["ungraded"] == 16 if counted == "all" else 0 < row["ungraded"] < 16 for row in steps)
    if counted == "all":
        assert all(row["num_loss_tokens"] == 0 and row["reward"] is None for row in steps)
    else:
        assert all(row["max_abs_logprob_gap"] == 0 for row in steps)
        samples = rows(with_base / "tiny" / "rollouts" / "grpo", "step_000001.jsonl")
        assert {s["advantage"] for s in samples if not s["is_graded"]} == {0.0}


@pytest.mark.parametrize("more", [
    ["--loss.kl_coef=0.05"], ["--rl.old_logprobs=recompute", "--loss.importance=tis", "--sampling.top_p=0.9"],
    ["--rl.dynamic_sampling=2", "--rl.drop_truncated=true"], ["--loss.ratio=sequence", "--loss.normalizer=sequence"],
    ["--loss.normalizer=constant", "--rl.advantage=mean", "--rl.drop_no_signal=false"],
    ["--rl.num_minibatches=16"], ["--dtype=bfloat16", "--optim.name=muon"],
    ["--model.num_experts=1", "--model.intermediate_size=24"], ["--run.exact=on", "--dtype=bfloat16"],
    ["--rl.routing_replay=true", "--run.exact=on"],
    ["--rl.routing_replay=true", "--model.num_experts=1", "--model.intermediate_size=24"],
    ["--engine.decoder=ops"], FAR_FROM_DEFAULT,
], ids=lambda more: more[0])  # fmt: skip
def test_every_way_of_training_stops_and_goes_on_to_the_same_bits(
    more: list[str], with_base: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two steps against one step, a stop, and one step: the resume restores reference policy, optimizer and all else."""
    never_stop(monkeypatch)
    quick = [*more, "--rl.steps=2", "--eval.every=0", "--eval.final_problems=2", "--eval.pass_at_k=0", "--pretrain.steps=4"]
    assert run_here(with_base, *quick) == 0
    assert {row["max_abs_logprob_gap"] for row in rows(with_base / "tiny", stage="grpo", phase="train")} == {0.0}
    whole = fingerprints(with_base / "tiny")
    forget(with_base, "grpo")
    stop_after(monkeypatch, 1)
    assert run_here(with_base, *quick) == 130
    never_stop(monkeypatch)
    assert run_here(with_base, *quick) == 0
    assert fingerprints(with_base / "tiny") == whole


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_checkpoint_is_one_clear_error_before_any_work(
    damage: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    never_stop(monkeypatch)
    shutil.copytree(finished / "checkpoints" / "final", tmp_path / "given")
    (tmp_path / "given" / damage).write_bytes(b"\x00 not it")
    with pytest.raises(ValueError, match=rf"given/{damage} is (damaged|not a readable)"):
        run_here(tmp_path, f"--model.init_from={tmp_path / 'given'}")
    assert not (tmp_path / "tiny").exists()


def test_a_given_models_own_context_is_what_prompts_must_fit(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    never_stop(monkeypatch)
    with pytest.raises(ValueError, match=r"max_position_embeddings = 64 less sampling\.max_tokens = 60"):
        run_here(tmp_path, f"--model.init_from={finished / 'checkpoints' / 'final'}", "--model.max_position_embeddings=4096",
                 "--sampling.max_tokens=60")


def test_a_damaged_step_checkpoint_names_the_way_out(with_base: Path, monkeypatch: pytest.MonkeyPatch):
    stop_after(monkeypatch, 3)
    assert run_here(with_base) == 130
    (stage_folder(with_base, "grpo") / "step_000003" / "trainer.pt").write_bytes(b"torn")
    never_stop(monkeypatch)
    with pytest.raises(ValueError, match=r"step_000003: trainer\.pt is damaged.*delete the folder"):
        run_here(with_base)
    shutil.rmtree(stage_folder(with_base, "grpo") / "step_000003")
    assert run_here(with_base) == 0


@pytest.mark.long
def test_ctrl_c_saves_and_leaves_and_the_same_command_goes_on_to_the_same_bits(finished: Path, with_base: Path):
    process = run_apart(with_base, start=True)
    metrics = with_base / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"stage": "grpo"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 130) and "Asked to stop: finishing this step and saving" in text, text
    assert "Traceback" not in text
    if process.returncode == 130:  # a machine that was slow to deliver the signal may have finished first
        assert "continues from here" in text
        assert run_apart(with_base).returncode == 0
    assert fingerprints(with_base / "tiny") == fingerprints(finished)


def test_exact_mode_off_trains_on_torchs_own_products(with_base: Path, monkeypatch: pytest.MonkeyPatch):
    never_stop(monkeypatch)
    assert run_here(with_base, "--run.exact=off", "--rl.steps=1", "--rl.num_minibatches=1", "--loss.kl_coef=0.05") == 0
    (row,) = rows(with_base / "tiny", stage="grpo", phase="train")
    assert row["max_abs_logprob_gap"] < 1e-4
    assert row["kl"] < 1e-6  # the reference policy is computed as the policy is
    with pytest.raises(ConfigError, match=r"cannot go with run\.exact='off'"):
        run_here(with_base, "--run.exact=off", "--engine.decoder=native")


def test_a_run_goes_on_in_the_dtype_it_began_in(with_base: Path, monkeypatch: pytest.MonkeyPatch):
    """run.dtype = "auto" may mean another dtype on another machine, or once the native kernels are built."""
    stop_after(monkeypatch, 1)
    monkeypatch.setattr(distributed, "has_fast_bf16", lambda: False)
    assert run_here(with_base, "--dtype=auto") == 130
    assert json.loads((with_base / "tiny" / "compute.json").read_text())["compute"]["dtype"] == "float32"
    never_stop(monkeypatch)
    monkeypatch.setattr(distributed, "has_fast_bf16", lambda: True)
    assert run_here(with_base, "--dtype=auto") == 0
    assert json.loads((with_base / "tiny" / "summary.json").read_text())["dtype"] == "float32"
    assert run_here(with_base, "--dtype=auto", "--name=other", "--rl.steps=1") == 0
    assert json.loads((with_base / "other" / "summary.json").read_text())["dtype"] == "bfloat16"
