"""The eval command end to end: it reproduces a run's numbers, continues after an interruption, and refuses bad
input in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reason_rl.eval import __main__ as command
from reason_rl.reward.grade import Grader
from reason_rl.rollout.collect import EVAL_KEY
from tests.reason_rl.run.tiny_run import ROOT, never_stop, run_here, said

EASY = ["--rl.steps=1", "--pretrain.steps=300", "--pretrain.tokens_per_step=512", "--task.min_level=1", "--task.max_level=2",
        "--task.heldout_share=0.3", "--task.rl_share=0.3", "--pretrain.direct_share=0", "--pretrain.worked_share=1",
        "--optim.lr=1e-5", "--model.num_experts=1", "--model.intermediate_size=96", "--model.hidden_size=64",
        "--reward.custom=", "--eval.final_problems=16",
        "--eval.final_samples=8"]
"""A run whose final policy is sometimes right and sometimes wrong, so that its accuracy is between 0 and 1."""
AS_THE_RUN = ["--samples=8", "--temperature=1", "--top-p=1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final checkpoint of a run. Each test evaluates it into another folder."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        never_stop(monkeypatch)
        out_dir = tmp_path_factory.mktemp("run")
        assert run_here(out_dir, *EASY) == 0
    return out_dir / "tiny" / "checkpoints" / "final"


def run(checkpoint: Path, out: Path, *more: str) -> int:
    return command.main([str(checkpoint), f"--out={out}", *more])


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def assert_reproduces(run_summary: dict[str, Any], summary: dict[str, Any]) -> None:
    for name, value in (("final_accuracy", summary["pass_at_k"]["1"]), ("final_format_rate", summary["format_rate"]),
                        ("final_mean_thinking_tokens", summary["thinking_tokens"])):
        assert value["low"] <= run_summary[name] <= value["high"], (name, run_summary[name], value)


def test_it_reproduces_the_runs_own_evaluation_within_the_interval(checkpoint: Path, tmp_path: Path):
    assert run(checkpoint, tmp_path / "e", *AS_THE_RUN) == 0
    run_summary, summary = json.loads((checkpoint.parents[1] / "summary.json").read_text()), summary_of(tmp_path / "e")
    assert 0 < run_summary["final_accuracy"] < 1 and summary["problems"] == 16  # eval.final_problems of the run
    assert_reproduces(run_summary, summary)


def test_with_the_runs_own_noise_it_gives_the_runs_own_numbers(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "EVAL_STEP", EVAL_KEY + 1)
    assert run(checkpoint, tmp_path / "e", *AS_THE_RUN) == 0
    run_summary, summary = json.loads((checkpoint.parents[1] / "summary.json").read_text()), summary_of(tmp_path / "e")
    assert [summary["pass_at_k"]["1"]["mean"], summary["format_rate"]["mean"], summary["thinking_tokens"]["mean"]] == pytest.approx(
        [run_summary[f"final_{name}"] for name in ("accuracy", "format_rate", "mean_thinking_tokens")], rel=1e-12)


@pytest.mark.long
def test_it_reproduces_a_run_of_the_default_model(tmp_path: Path):
    (tmp_path / "default.toml").write_text('[run]\nname = "default"\n')
    more = ["--pretrain.steps=300", "--rl.steps=10", "--eval.final_problems=200", "--eval.pass_at_k=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    for arguments in (["train.py", str(tmp_path / "default.toml"), f"--run.out_dir={tmp_path}", *more],
                      ["-m", "reason_rl.eval", str(tmp_path / "default/checkpoints/final"), "--samples=4", "--temperature=1",
                       "--top-p=1"]):
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    run_summary = json.loads((tmp_path / "default/summary.json").read_text())
    summary = summary_of(tmp_path / "default/evals/final-program-heldout")
    assert summary["problems"] == 200 and run_summary["final_accuracy"] > 0.05
    assert_reproduces(run_summary, summary)


def test_the_table_and_the_files_have_the_numbers_of_the_rows(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "e"
    code, text = said(capsys, lambda: run(checkpoint, out, "--problems=6", "--samples=4", "--k=1,2,4"))
    assert code == 0 and all(word in text for word in ("pass@1", "pass@4", "cons@2", "cons@4", "thinking tokens", "of 24", "95 %"))
    rows = [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {len(row["samples"]) for row in rows} == {4} and set(files(out)) == {
        "setting.json", "problems.jsonl", "summary.json"}
    summary = summary_of(out)
    assert summary["pass_at_k"].keys() == {"1", "2", "4"} and summary["cons_at_k"].keys() == {"2", "4"}
    assert summary["pass_at_k"]["1"]["mean"] == pytest.approx(sum(row["pass_rate"] for row in rows) / 6)
    assert summary["setting"]["sampling.temperature"] == 0.6 and summary["setting"]["sampling.top_p"] == 0.95
    assert summary["setting"]["sampling.max_tokens"] == 20  # the run's
    code, text = said(capsys, lambda: run(checkpoint, out, "--problems=6", "--samples=4", "--k=1,2,4", "--json"))
    assert code == 0 and json.loads(text) == summary


def test_without_out_the_results_are_in_the_runs_folder(checkpoint: Path, tmp_path: Path):
    shutil.copytree(checkpoint.parents[1], tmp_path / "tiny")
    assert command.main([str(tmp_path / "tiny/checkpoints/final"), "--problems=2", "--split=rl"]) == 0
    assert summary_of(tmp_path / "tiny/evals/final-program-rl")["problems"] == 2


def test_a_checkpoint_is_measured_by_the_keys_of_its_stage(checkpoint: Path, tmp_path: Path):
    shutil.copytree(checkpoint.parents[1], tmp_path / "tiny")
    shutil.copytree(checkpoint, tmp_path / "tiny/checkpoints/early")
    with (tmp_path / "tiny/config.toml").open("a") as file:
        for name, max_tokens in (("early", 11), ("late", 12)):
            file.write(f'[[stage]]\nkind = "grpo"\nname = "{name}"\nsampling = {{max_tokens = {max_tokens}}}\n')
    for name, max_tokens in (("early", 11), ("final", 12)):  # final: the last stage's
        assert run(tmp_path / "tiny/checkpoints" / name, tmp_path / name, "--problems=1", "--samples=1") == 0
        assert summary_of(tmp_path / name)["setting"]["sampling.max_tokens"] == max_tokens


def test_an_interrupted_evaluation_continues_and_ends_in_the_same_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--problems=9", "--samples=4", "--k=1,4", "--engine.max_num_seqs=3"]
    assert run(checkpoint, tmp_path / "whole", *arguments) == 0
    real, count = Grader.submit, [0]

    def interrupted(*given: Any) -> Any:
        count[0] += 1
        if count[0] == 18:
            raise KeyboardInterrupt
        return real(*given)

    out = tmp_path / "e"
    monkeypatch.setattr(Grader, "submit", interrupted)
    assert run(checkpoint, out, *arguments) == 130 and "the same command continues" in capsys.readouterr().err
    rows = (out / "problems.jsonl").read_text().splitlines()
    assert 0 < len(rows) <= 4 and not (out / "summary.json").exists()
    (out / "problems.jsonl").write_text("\n".join([*rows, '{"problem_id": 5, "pro']))  # killed while writing
    assert run(checkpoint, out, *arguments, "--engine.max_num_seqs=256") == 0
    assert count[0] == 18 + 4 * (9 - len(rows))  # nothing is sampled twice
    assert files(out) == files(tmp_path / "whole")


def test_a_finished_evaluation_is_read_and_not_sampled_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert run(checkpoint, tmp_path / "e", "--problems=4", "--samples=4") == 0
    before = files(tmp_path / "e")
    monkeypatch.setattr(command, "load_for_sampling", None)
    monkeypatch.chdir(checkpoint.parent)  # a relative path of the same folder
    assert run(Path("final"), tmp_path / "e", "--problems=4", "--samples=4") == 0 and files(tmp_path / "e") == before
    assert run(checkpoint, tmp_path / "e", "--problems=4", "--samples=4", "--k=2") == 0
    assert summary_of(tmp_path / "e")["pass_at_k"].keys() == {"2"}


def test_another_setting_in_the_same_folder_is_refused_with_the_difference(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(checkpoint, tmp_path / "e", "--problems=2") == 0
    before = files(tmp_path / "e")
    assert run(checkpoint, tmp_path / "e", "--problems=2", "--temperature=1", "--task.max_level=1") == 1
    err = capsys.readouterr().err
    assert "sampling.temperature: 0.6 -> 1.0" in err and "task.max_level: 2 -> 1" in err and "dtype" not in err
    shutil.copytree(checkpoint.parents[1] / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(checkpoint.parents[1] / "config.toml", tmp_path)
    other = tmp_path / "checkpoints" / "final"
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (other / "model.safetensors").write_bytes(bytes(weights))
    assert run(other, tmp_path / "e", "--problems=2") == 1 and "weights: " in capsys.readouterr().err
    assert files(tmp_path / "e") == before


def test_samples_do_not_depend_on_the_batch(checkpoint: Path, tmp_path: Path):
    for name, size in (("few", 2), ("many", 64)):
        assert run(checkpoint, tmp_path / name, "--problems=5", "--samples=3", f"--engine.max_num_seqs={size}") == 0
    assert files(tmp_path / "few") == files(tmp_path / "many")
    assert run(checkpoint, tmp_path / "other", "--problems=5", "--samples=3", "--seed=1") == 0
    assert files(tmp_path / "other")["problems.jsonl"] != files(tmp_path / "few")["problems.jsonl"]


def test_several_processes_share_the_problems_and_write_the_same_files(checkpoint: Path, tmp_path: Path):
    arguments = ["--problems=7", "--samples=2", "--device=cpu", "--dtype=float32"]
    assert run(checkpoint, tmp_path / "one", *arguments) == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reason_rl.eval",
         str(checkpoint), f"--out={tmp_path / 'two'}", *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "two") == files(tmp_path / "one")


BAD = [
    (["--k=1,8"], r"--k must be within 1..4 (--samples), got '1,8'"),
    (["--k=0"], "--k must be within 1..4"),
    (["--k=one"], "--k must be numbers like 1,4,16, got 'one'"),
    (["--samples=0"], "--samples must be at least 1, got 0"),
    (["--problems=0"], "--problems must be at least 1, got 0"),
    (["--problems=5000000"], "too few problems"),
    (["--temperature=-1"], "temperature must be at least 0, got -1.0"),
    (["--top-p=0"], "top_p must be in (0, 1], got 0.0"),
    (["--max-tokens=60"], "max_position_embeddings = 64 less sampling.max_tokens = 60 leaves 4"),
    (["--max-tokens=-5"], "max_tokens must be at least 1, got -5"),
    (["--max-tokens=0"], "max_tokens must be at least 1, got 0"),
    (["--split=all"], "task 'program' generates its problems without end"),
    (["--task=gsm8k"], "set task.path to a JSONL file"),
    (["--task.template=chat"], "the checkpoint has none"),
    (["--task=programm"], "unknown task.name 'programm'"),
    (["--task.levle=3"], "unknown config key task.levle"),
    (["--sampling.temperature=1"], "--sampling.temperature=1 has no effect on an evaluation; use --temperature"),
    (["--eval.problems=20"], "--eval.problems=20 has no effect on an evaluation; use --problems"),
    (["--eval.final-problems=20"], "--eval.final-problems=20 has no effect on an evaluation; use --problems"),
    (["--eval.every=2"], "--eval.every=2 has no effect on an evaluation"),
    (["--run.seed=2"], "use --seed"),
    (["--rl.group_size=2"], "--rl.group_size=2 has no effect on an evaluation"),
    (["--grpo.rl.group_size=2"], "--grpo.rl.group_size=2 has no effect on an evaluation"),
    (["--model.num_hidden_layers=2"], "--model.num_hidden_layers=2 has no effect on an evaluation"),
    (["--reward.custom=a:b"], "--reward.custom=a:b has no effect on an evaluation"),
    (["--config=nowhere.toml"], "no config file at nowhere.toml"),
    (["--device=tpu"], "run.device must be auto, cpu, cuda"),
    (["--dtype=int8"], "run.dtype must be one of"),
    (["--reward.verifier=code"], "needs tests among a problem's facts"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_input_is_one_line_before_any_work(
    more: list[str], message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command, "load_for_sampling", None)
    assert run(checkpoint, tmp_path / "e", *more) == 1
    err = capsys.readouterr().err
    assert err.startswith("eval: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError])
def test_an_error_while_sampling_keeps_its_traceback_and_the_finished_rows(
    error: type[Exception], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, count = Grader.submit, [0]

    def broken(*given: Any) -> Any:
        count[0] += 1
        if count[0] == 9:
            raise error("a bug")
        return real(*given)

    monkeypatch.setattr(Grader, "submit", broken)
    with pytest.raises(error, match="a bug"):
        run(checkpoint, tmp_path / "e", "--problems=6", "--samples=2", "--engine.max_num_seqs=2")
    assert len((tmp_path / "e/problems.jsonl").read_text().splitlines()) == 4


def test_an_unknown_option_is_a_usage_error(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for argument in ("--tempreature=1", "--rl.steps", "more"):
        with pytest.raises(SystemExit) as stopped:
            run(checkpoint, tmp_path / "e", argument)
        assert stopped.value.code == 2 and argument in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["nowhere", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_or_damaged_checkpoint_is_one_line(
    damage: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "given"
    if damage != "nowhere":
        shutil.copytree(checkpoint, folder)
        (folder / damage).write_bytes(b"\x00 not it")
    code = command.main([str(folder), "--task=program", "--max-tokens=20", "--problems=2", f"--out={tmp_path / 'e'}"])
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1 and err.startswith("eval: ") and "given" in err


def test_a_folder_without_rows_takes_another_setting(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(checkpoint, tmp_path / "given")
    weights = (tmp_path / "given" / "model.safetensors").rename(tmp_path / "elsewhere")
    arguments = [str(tmp_path / "given"), "--task=program", "--max-tokens=20", "--problems=2", f"--out={tmp_path / 'e'}"]
    assert command.main(arguments) == 1 and "it has no model.safetensors" in capsys.readouterr().err
    weights.rename(tmp_path / "given" / "model.safetensors")
    assert command.main(arguments) == 0
    (tmp_path / "given" / "model.safetensors").unlink()  # now the folder has rows of other weights
    assert command.main(arguments) == 1 and "another setting" in capsys.readouterr().err


def test_a_checkpoint_outside_a_run_needs_a_task(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(checkpoint, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert command.main(["model"]) == 1 and "--task NAME or --config FILE" in capsys.readouterr().err
    assert command.main(["model", "--task=program", "--task.min_level=2", "--task.max_level=2", "--problems=2"]) == 0
    setting = summary_of(tmp_path / "runs/evals/model-program-heldout")["setting"]
    assert setting["sampling.max_tokens"] == 64 - 7  # the room in the context
