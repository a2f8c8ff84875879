"""README's surrogate and the op of docs/kernels.md work as written: the tests run the code blocks themselves."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.grpo_loss import LossInputs, grpo_loss
from reason_rl.config import load_config, parse_command_line

PAGES = [(Path(__file__).parents[1] / name).read_text(encoding="utf-8") for name in ("README.md", "docs/kernels.md")]
BLOCKS = [block for page in PAGES for block in re.findall(r"^```\w+\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]


def block_with(words: str) -> str:
    (found,) = [block for block in BLOCKS if words in block]
    return found


def command_line(block: str) -> list[str]:
    """The arguments of train.py in the block's first line."""
    return block.splitlines()[0].split("train.py ")[1].split()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_surrogate_recipe_trains_by_its_function(folder: Path, monkeypatch: pytest.MonkeyPatch):
    block = block_with("# my_surrogate.py")
    (folder / "my_surrogate.py").write_text(block)
    monkeypatch.delitem(sys.modules, "my_surrogate", raising=False)
    config = parse_command_line(command_line(block))
    logprobs = torch.tensor([0.5, -0.5], requires_grad=True)
    inputs = LossInputs(
        old_logprobs=torch.zeros(2), advantages=torch.tensor([1.0, -2.0]), sequence_index=torch.zeros(2, dtype=torch.int64),
        num_sequences=1, total_loss_tokens=2, total_sequences=1)
    loss, _ = grpo_loss(logprobs, inputs, config.loss)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    expected = -logprobs.detach().exp() * inputs.advantages / 2  # the gradient of a ratio in its logprob is the ratio
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss.detach(), expected.sum())


def test_a_surrogate_in_toml_is_the_same(folder: Path):
    (folder / "my_surrogate.py").write_text(block_with("# my_surrogate.py"))
    (folder / "run.toml").write_text('[loss]\nsurrogate = "my_surrogate:unclipped"\n')
    assert load_config(folder / "run.toml").loss.surrogate == "my_surrogate:unclipped"


def test_the_op_recipe_is_an_op(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "REGISTRY", {})
    module = types.ModuleType("relu2")
    exec(block_with("`relu2`"), vars(module))
    assert module.relu2(torch.tensor([[-1.0, 3.0]])).tolist() == [[0.0, 9.0]]
    with pytest.raises(ValueError, match=r"relu2: x must be .*\[T, D\], got f32\[2\] on cpu"):
        module.relu2(torch.zeros(2))
    assert dispatch.table(torch.device("cpu")) == [("relu2", "reference", "reference", "reference is the only one")]
