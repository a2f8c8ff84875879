"""Each preset of configs/algorithms against its paper: values and gradients, from rewards to dloss/dlogprob.

Ours: TOML -> compute_advantages -> grpo_loss. Theirs: the paper's objective J as printed, in float64 loops over
prompts, completions and tokens, with the paper's own numbers written here, and differentiated by autograd through
scalars. loss = -J.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kernels.grpo_loss import LossInputs, LossSpec, finish_metrics, grpo_loss
from reason_rl.config import Config, load_config
from reason_rl.records import Completion, Group, Problem, Score
from reason_rl.rl.advantages import compute_advantages

PRESETS = Path(__file__).parents[3] / "configs" / "algorithms"
F64 = torch.float64


@dataclass(frozen=True)
class Batch:
    """B prompts with G completions each; token tensors f64[B][G][length]."""

    rewards: list[list[float]]
    logprobs: list[list[torch.Tensor]]
    old_logprobs: list[list[torch.Tensor]]
    ref_logprobs: list[list[torch.Tensor]]


def make_batch() -> Batch:
    """Four prompts, the second without signal. The policy's distance ranges from zero to beyond every clip."""
    rewards = [[1.0, 0.0, 1.1, 0.0, 1.0], [1.0] * 5, [0.0, 0.0, 0.1, 0.0, 1.0], [1.1, 1.0, 0.0, 1.0, 1.0]]
    moved = (0.3, 1e-4, 1.2, 0.0, 0.05)
    generator = torch.Generator().manual_seed(7)

    def normal(length: int) -> torch.Tensor:
        return torch.randn(length, generator=generator, dtype=F64)

    lengths = [[1 + (3 * b + 5 * i) % 8 for i in range(5)] for b in range(4)]
    old = [[-normal(n).abs() for n in row] for row in lengths]
    new = [[o + moved[(b + i) % 5] * normal(len(o)) for i, o in enumerate(row)] for b, row in enumerate(old)]
    ref = [[o + 0.4 * normal(len(o)) for o in row] for row in old]
    return Batch(rewards, [[x.requires_grad_() for x in row] for row in new], old, ref)


# --- the papers ------------------------------------------------------------------------------------------------------

Objective = Callable[[Batch], torch.Tensor]


def clip(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return min(max(x, torch.tensor(low, dtype=F64)), torch.tensor(high, dtype=F64))


def group_normalized(rewards: list[float]) -> list[float]:
    """(R_i - mean) / std; zeros for a group of equal rewards, whose quotient 0/0 the papers leave open."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    return [(r - statistics.fmean(rewards)) / statistics.stdev(rewards) for r in rewards]


def grpo_objective(batch: Batch) -> torch.Tensor:
    """DeepSeekMath eq. 3 with the KL of eq. 4:
    J = E_q[ 1/G sum_i 1/|o_i| sum_t { min(rho A, clip(rho, 1-eps, 1+eps) A) - beta KL } ], eps = 0.2, beta = 0.04."""
    per_prompt = []
    for rewards, news, olds, refs in zip(batch.rewards, batch.logprobs, batch.old_logprobs, batch.ref_logprobs):
        total = torch.zeros((), dtype=F64)
        for a, new, old, ref in zip(group_normalized(rewards), news, olds, refs):
            for lp, lp_old, lp_ref in zip(new, old, ref):
                rho = (lp - lp_old).exp()
                kl = (lp_ref - lp).exp() - (lp_ref - lp) - 1
                total = total + (min(rho * a, clip(rho, 0.8, 1.2) * a) - 0.04 * kl) / len(new)
        per_prompt.append(total / len(rewards))
    return sum(per_prompt, torch.zeros((), dtype=F64)) / len(per_prompt)


def dr_grpo_objective(batch: Batch) -> torch.Tensor:
    """Dr. GRPO section 3.2: J = E_q[ 1/G sum_i sum_t min(rho A, clip(rho) A) ] with A = R - mean(R); the sum over
    tokens is divided by the generation budget (the authors' masked mean by a constant), here 80 tokens."""
    per_prompt = []
    for rewards, news, olds in zip(batch.rewards, batch.logprobs, batch.old_logprobs):
        total = torch.zeros((), dtype=F64)
        for reward, new, old in zip(rewards, news, olds):
            a = reward - statistics.fmean(rewards)
            for lp, lp_old in zip(new, old):
                rho = (lp - lp_old).exp()
                total = total + min(rho * a, clip(rho, 0.8, 1.2) * a)
        per_prompt.append(total / len(rewards) / 80)
    return sum(per_prompt, torch.zeros((), dtype=F64)) / len(per_prompt)


def dapo_objective(batch: Batch) -> torch.Tensor:
    """DAPO eq. 8: J = 1 / (sum_i |o_i|) sum_i sum_t min(r A, clip(r, 1-0.2, 1+0.28) A), over the prompts that are
    neither all right nor all wrong. The sums run over the batch, as in the authors' code; on one prompt that is eq. 8
    itself."""
    total, num_tokens = torch.zeros((), dtype=F64), 0
    for rewards, news, olds in zip(batch.rewards, batch.logprobs, batch.old_logprobs):
        if len(set(rewards)) == 1:
            continue
        for a, new, old in zip(group_normalized(rewards), news, olds):
            num_tokens += len(new)
            for lp, lp_old in zip(new, old):
                r = (lp - lp_old).exp()
                total = total + min(r * a, clip(r, 0.8, 1.28) * a)
    return total / num_tokens


def gspo_objective(batch: Batch) -> torch.Tensor:
    """GSPO eq. 5: J = E[ 1/G sum_i min(s_i A_i, clip(s_i, 1-3e-4, 1+4e-4) A_i) ], with eq. 7:
    s_i = (pi(y_i) / pi_old(y_i)) ** (1 / |y_i|)."""
    per_prompt = []
    for rewards, news, olds in zip(batch.rewards, batch.logprobs, batch.old_logprobs):
        terms = []
        for a, new, old in zip(group_normalized(rewards), news, olds):
            s = (new.sum().exp() / old.sum().exp()) ** (1 / len(new))
            terms.append(min(s * a, clip(s, 1 - 3e-4, 1 + 4e-4) * a))
        per_prompt.append(sum(terms, torch.zeros((), dtype=F64)) / len(rewards))
    return sum(per_prompt, torch.zeros((), dtype=F64)) / len(per_prompt)


def cispo_objective(batch: Batch) -> torch.Tensor:
    """MiniMax-M1 eq. 4 and 5: J = 1 / (sum_i |o_i|) sum_i sum_t sg(min(r, 1 + eps_high)) A log pi, 1 + eps_high = 5,
    no lower bound. The sums run over the batch's prompts with signal, as for DAPO."""
    total, num_tokens = torch.zeros((), dtype=F64), 0
    for rewards, news, olds in zip(batch.rewards, batch.logprobs, batch.old_logprobs):
        if len(set(rewards)) == 1:
            continue
        for a, new, old in zip(group_normalized(rewards), news, olds):
            num_tokens += len(new)
            for lp, lp_old in zip(new, old):
                weight = min(math.exp(lp.item() - lp_old.item()), 5.0)
                total = total + weight * a * lp
    return total / num_tokens


def rloo_objective(batch: Batch) -> torch.Tensor:
    """Back to Basics: gradient of J = 1/k sum_i [ R_i - 1/(k-1) sum_{j != i} R_j ] grad log pi(y_i | x), log pi(y | x)
    the sum over tokens; J itself is written with log pi in place of its gradient."""
    per_prompt = []
    for rewards, news in zip(batch.rewards, batch.logprobs):
        k = len(rewards)
        terms = [(rewards[i] - sum(rewards[j] for j in range(k) if j != i) / (k - 1)) * news[i].sum() for i in range(k)]
        per_prompt.append(sum(terms, torch.zeros((), dtype=F64)) / k)
    return sum(per_prompt, torch.zeros((), dtype=F64)) / len(per_prompt)


OBJECTIVES: dict[str, tuple[Objective, str]] = {
    "grpo": (grpo_objective, "2402.03300"),
    "dr_grpo": (dr_grpo_objective, "2503.20783"),
    "dapo": (dapo_objective, "2503.14476"),
    "gspo": (gspo_objective, "2507.18071"),
    "cispo": (cispo_objective, "2506.13585"),
    "rloo": (rloo_objective, "2402.14740"),
}


# --- ours ------------------------------------------------------------------------------------------------------------


def resolved_spec(config: Config) -> LossSpec:
    """constant_length 0 means the token budget of a completion."""
    return dataclasses.replace(config.loss, constant_length=config.loss.constant_length or config.sampling.max_tokens)


def our_loss(config: Config, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    problem = Problem(0, "test", "?", (1,), "")
    groups = []
    for rewards, olds in zip(batch.rewards, batch.old_logprobs):
        completions = tuple(
            Completion((5,) * len(old), tuple(old.tolist()), (0.0,) * len(old), "stop", 0, i)
            for i, old in enumerate(olds))
        groups.append(Group(problem, completions, tuple(Score(r, {"accuracy": r}) for r in rewards)))
    result = compute_advantages(groups, config.rl, torch.device("cpu"))
    kept = [(b, i) for b, i in result.mask.nonzero().tolist()]
    tables = batch.logprobs, batch.old_logprobs, batch.ref_logprobs
    new, old, ref = ([table[b][i] for b, i in kept] for table in tables)
    lengths = torch.tensor([len(x) for x in new])
    advantages = torch.stack([result.advantages[b, i] for b, i in kept]).double()
    inputs = LossInputs(
        old_logprobs=torch.cat(old), ref_logprobs=torch.cat(ref), advantages=advantages.repeat_interleave(lengths),
        sequence_index=torch.arange(len(kept)).repeat_interleave(lengths), num_sequences=len(kept),
        total_loss_tokens=int(lengths.sum()), total_sequences=len(kept))
    loss, metrics = grpo_loss(torch.cat(new), inputs, resolved_spec(config))
    return loss, finish_metrics(metrics)


def gradients(loss: torch.Tensor, batch: Batch) -> torch.Tensor:
    """f64[all tokens of the batch], 0 for tokens that are in no term."""
    leaves = [x for row in batch.logprobs for x in row]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return torch.cat([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)])


def test_every_preset_has_its_paper_here() -> None:
    assert {path.stem for path in PRESETS.glob("*.toml")} == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_and_its_gradient_are_the_papers(name: str) -> None:
    objective, _ = OBJECTIVES[name]
    config, batch = load_config(PRESETS / f"{name}.toml"), make_batch()
    loss, _ = our_loss(config, batch)
    expected = -objective(batch)
    # Ours: advantages stored in f32 (6e-8) and 1e-6 added to a std of some 0.5, so up to a few 1e-6 of each term.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    grad, grad_expected = gradients(loss, batch), gradients(expected, batch)
    torch.testing.assert_close(grad, grad_expected, rtol=1e-5, atol=1e-9)
    assert grad.abs().max() > 1e-3  # so that the tolerance 1e-9 above hides no term


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_a_single_prompt_is_the_papers(name: str) -> None:
    objective, _ = OBJECTIVES[name]
    whole = make_batch()
    batch = Batch(*(getattr(whole, f.name)[2:3] for f in dataclasses.fields(Batch)))
    loss, _ = our_loss(load_config(PRESETS / f"{name}.toml"), batch)
    torch.testing.assert_close(loss, -objective(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_batch_reaches_both_sides_of_every_clip(name: str) -> None:
    """Otherwise the comparison above could not detect a wrong clip."""
    config = load_config(PRESETS / f"{name}.toml")
    _, finished = our_loss(config, make_batch())
    for side in ("low", "high"):
        is_used = name != "rloo" and not (name == "cispo" and side == "low")  # CISPO bounds its weight above alone
        assert 0 < finished[f"clip_{side}_fraction"] < 0.5 if is_used else finished[f"clip_{side}_fraction"] == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_preset_opens_with_its_command_and_names_its_paper(name: str) -> None:
    text = (PRESETS / f"{name}.toml").read_text()
    assert text.startswith(f"# .venv/bin/python train.py configs/algorithms/{name}.toml\n")
    assert f"https://arxiv.org/abs/{OBJECTIVES[name][1]}" in text.split("[run]")[0]
    assert load_config(PRESETS / f"{name}.toml").run.name == name


def test_dapo_refills_groups_and_penalises_overlong_completions() -> None:
    config = load_config(PRESETS / "dapo.toml")
    assert config.rl.dynamic_sampling > 0 and config.rl.drop_no_signal
    assert config.reward.overlong == 1.0 and 5 * config.reward.overlong_buffer == config.sampling.max_tokens


def test_reinforce_takes_one_update_per_batch() -> None:
    # Without a ratio the gradient is right only for the policy that sampled.
    assert load_config(PRESETS / "rloo.toml").rl.num_minibatches == 1
