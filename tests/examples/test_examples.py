"""The files of examples/ run as they are, on a tiny model and for a step or two."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

import pytest
import torch

import train
from examples.losses.sapo import TEMPERATURE_OF_NEGATIVE, sapo
from examples.tasks.reverse import Reverse
from kernels.grpo_loss import LossInputs, LossSpec, grpo_loss
from reason_rl.config import parse_command_line
from reason_rl.run.recipe import plan_recipe
from tests.reason_rl.run.tiny_run import ROOT, SETTINGS, never_stop, rows

RUNNABLE = (".toml", "reverse.py")
"""Ends of the names of files whose command needs nothing else; sapo.py has the command of sapo.toml."""
FILES = [path for room in ("tasks", "losses", "recipes") for path in sorted((ROOT / "examples" / room).iterdir()) if path.is_file()]
QUICK = {"rl.steps": 1, "pretrain.steps": 12, "reward.overlong_buffer": 10,
         "eval.every": 0, "eval.pass_at_k": 0, "eval.final_problems": 4, "eval.final_samples": 1}


def command_of(path: Path) -> list[str]:
    """The arguments of train.py in the command of the file's first lines."""
    (line,) = [line for line in path.read_text(encoding="utf-8").splitlines()[:5] if ".venv/bin/python train.py " in line]
    return line.split("train.py ")[1].split()


def run_tiny(out_dir: Path, arguments: list[str]) -> Path:
    """Runs train.py with these arguments, all sizes made tiny -> the run's folder."""
    tiny = {f"{section}.{key}": value for section, keys in tomllib.loads(SETTINGS).items() for key, value in keys.items()}
    overrides = [f"--{key}={value}" for key, value in (tiny | QUICK).items()]
    assert train.main(parse_command_line([*arguments, *overrides, f"--run.out_dir={out_dir}"])) == 0
    return out_dir / "tiny"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_opens_with_a_command_that_is_read_without_an_error(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    arguments = command_of(path)
    assert plan_recipe(parse_command_line(arguments))
    name = str(path.relative_to(ROOT).with_suffix(""))
    assert any(name in text or name.replace("/", ".") in text for text in arguments), "the command of another file"


@pytest.mark.parametrize("path", [path for path in FILES if path.name.endswith(RUNNABLE)], ids=lambda path: path.name)
def test_an_example_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    never_stop(monkeypatch)
    arguments = command_of(path)
    lines = rows(run_tiny(tmp_path, arguments), phase="train")
    planned = plan_recipe(parse_command_line(arguments))
    assert list(dict.fromkeys(line["stage"] for line in lines)) == [stage.name for stage in planned]
    assert all(line["grad_norm"] > 0 for line in lines if line["stage"] == "pretrain")


def test_reverses_thought_ends_in_the_answer_and_fits_the_default_length():
    task, rng = Reverse(), random.Random(0)
    exercise = task.draw(rng, 4, "")
    assert exercise.answer == exercise.prompt[-2::-1] and task.work(exercise).lines[-1] == exercise.answer
    assert [len(line) for line in task.work(exercise).lines] == [1, 2, 3, 4]
    default = parse_command_line([])
    longest = task.work(task.draw(rng, default.task.max_level, ""))
    assert len(task.separator.join(longest.lines)) + len(longest.answer) + 5 <= default.sampling.max_tokens  # four tags and the end


def loss_of(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    inputs = LossInputs(old_logprobs=torch.zeros(2), advantages=advantages, sequence_index=torch.zeros(2, dtype=torch.int64),
                        num_sequences=1, total_loss_tokens=2, total_sequences=1)
    loss, _ = grpo_loss(logprobs, inputs, LossSpec(surrogate="examples.losses.sapo:sapo", normalizer="token"))
    return loss


def test_sapos_gradient_is_the_plain_one_on_policy_and_fades_off_policy():
    advantages = torch.tensor([1.0, -2.0])
    found = []
    for log_ratio in (0.0, 0.5, 1.5):
        logprobs = torch.full((2,), log_ratio, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss_of(logprobs, advantages), logprobs)
        found.append(gradient / (-advantages * torch.exp(logprobs.detach()) / 2))  # over the gradient of -ratio * advantage
    torch.testing.assert_close(found[0], torch.ones(2))
    assert bool((found[0] > found[1]).all() and (found[1] > found[2]).all() and (found[2] > 0).all())
    assert float(found[2][1]) < float(found[2][0])  # faster for a negative advantage


def test_sapo_follows_its_formula_by_hand():
    loss, clips = sapo(torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]), LossSpec())
    gate = torch.sigmoid(torch.tensor(TEMPERATURE_OF_NEGATIVE)) * 4 / TEMPERATURE_OF_NEGATIVE
    torch.testing.assert_close(loss, torch.stack([torch.tensor(-3.0 * 2.0), gate]))
    assert not clips
