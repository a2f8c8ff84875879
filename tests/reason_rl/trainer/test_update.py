"""One update: loss and gradients do not depend on the microbatches, masked completions give no gradient, and on
policy the ratio is 1.

Gradients are compared in float64 models, where two orders of a sum of about a thousand terms differ by about 1e-15 of
the largest: 1e-12 then means exact. test_optimizer.py tests the optimizer's steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from kernels.grpo_loss import LossInputs, LossSpec, grpo_loss
from reason_rl.config import ModelConfig, OptimConfig, RLConfig
from reason_rl.model.scoring import token_logprobs
from reason_rl.model.transformer import Transformer
from reason_rl.parallel.fsdp import rank_share
from reason_rl.parallel.world import World
from reason_rl.records import Group, Microbatch
from reason_rl.rl.advantages import compute_advantages
from reason_rl.rl.packing import idle_microbatch, pack_documents, pack_samples, select_samples
from reason_rl.trainer.optimizer import Optimizer
from reason_rl.trainer.policy import Policy
from reason_rl.trainer.update import fill_logprobs, policy_update, supervised_update
from tests.reason_rl.tiny import (
    CPU,
    DENSE,
    MOE,
    VOCAB_SIZE,
    WORLD,
    different_bits,
    graded,
    hand_made_group,
    make_engine,
    packed,
    problem,
    samples_of,
    sampling,
    tiny_model,
)

T = TypeVar("T")
SPEC = LossSpec()
SPECS = {
    "token": SPEC, "sequence": LossSpec(normalizer="sequence"), "gspo": LossSpec(ratio="sequence", normalizer="sequence"),
    "constant": LossSpec(normalizer="constant", constant_length=30), "cispo": LossSpec(surrogate="cispo"),
    "kl and entropy": LossSpec(kl_coef=0.1, entropy_coef=0.01),
}
GROUPS = [hand_made_group(i, 4 + 3 * i, [5, 1, 9, 3]) for i in range(3)]


def policy_of(model: Transformer, optimizer: object, world: World = WORLD) -> Policy:
    """A stand-in for Policy with the attributes that an update uses."""
    return SimpleNamespace(model=model, optimizer=optimizer, world=world, updated=lambda: None)  # type: ignore[return-value]


class Catcher:
    """A fake optimizer: keeps the gradients and changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gradients: dict[str, torch.Tensor] = {}

    def step(self, factor: float) -> float:
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None, name
            self.gradients[name], parameter.grad = parameter.grad, None
        return 1.0


def wide_model(config: ModelConfig) -> Transformer:
    return tiny_model(config, dtype=torch.float64).double()


def widened(packs: Sequence[Microbatch]) -> list[Microbatch]:
    return [replace(pack, **{name: value.double() for name, value in vars(pack).items()
                             if isinstance(value, torch.Tensor) and value.is_floating_point()}) for pack in packs]


def policy_gradients(
    model: Transformer, packs: Sequence[Microbatch], spec: LossSpec = SPEC, world: World = WORLD, temperature: float = 1.0
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    catcher = Catcher(model)
    metrics = policy_update(policy_of(model, catcher, world), packs, spec, temperature, lr_factor=1.0)
    return catcher.gradients, metrics


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance * float(a[name].abs().max()), msg=name)


def with_reference(packs: list[Microbatch], spec: LossSpec) -> list[Microbatch]:
    if not spec.kl_coef:
        return packs
    return fill_logprobs(wide_model(replace(DENSE, rope_theta=500.0)), packs, WORLD, temperature=1.0, name="ref_logprobs")


@pytest.mark.parametrize("name", SPECS)
def test_the_policy_gradient_does_not_depend_on_the_cut(name: str):
    model = wide_model(MOE if name == "token" else DENSE)
    whole, *cuts = [with_reference(widened(packed(GROUPS, budget)), SPECS[name]) for budget in (10**6, 30, 1)]
    expected, metrics = policy_gradients(model, whole, SPECS[name])
    assert len(whole) == 1 and len(cuts[-1]) == 12
    for packs in cuts:
        gradients, again = policy_gradients(model, packs, SPECS[name])
        assert_same(expected, gradients, 1e-12)
        assert again == pytest.approx(metrics, rel=1e-12)


def test_the_policy_gradient_does_not_depend_on_the_cut_in_f32():
    """5e-6 of the largest entry: f32 sums of about a hundred terms in another order."""
    model = tiny_model(MOE)
    expected, _ = policy_gradients(model, packed(GROUPS, 10**6))
    gradients, _ = policy_gradients(model, packed(GROUPS, 20))
    assert_same(expected, gradients, 5e-6)


DOCUMENTS = [(hand_made_group(i, 1, [3 + 4 * i]).completions[0].token_ids, i % 3) for i in range(6)]


def test_the_supervised_gradient_does_not_depend_on_the_cut():
    model, seen = wide_model(DENSE), []
    for budget in (10**6, 20, 1):
        catcher = Catcher(model)
        metrics = supervised_update(policy_of(model, catcher), pack_documents(DOCUMENTS, budget), lr_factor=1.0)  # type: ignore[arg-type]
        seen.append((catcher.gradients, metrics))
    for gradients, metrics in seen[1:]:
        assert_same(seen[0][0], gradients, 1e-12)
        assert metrics == pytest.approx(seen[0][1], rel=1e-12)


@dataclass(frozen=True)
class LoneRank(World):
    """One rank of several without the others, to test its share of the gradient."""

    def gather(self, value: T) -> list[T]:
        return [value]


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_of_the_ranks_gradients_is_the_gradient(size: int):
    """FSDP takes the mean over ranks; a rank without work joins with an idle microbatch."""
    model = wide_model(DENSE)
    packs = widened(packed(GROUPS[:2], 40))
    assert len(packs) == 2
    expected, _ = policy_gradients(model, packs)
    ranks = [LoneRank(rank, size, CPU, torch.float64) for rank in range(size)]
    gradients = []
    for rank in ranks:
        (local,) = rank_share(packs, rank, packs[0])
        assert (local is packs[0]) == (rank.rank in (0, 2))
        if rank.rank < 2:
            gradients.append(policy_gradients(model, packs, world=rank)[0])
    mean = {name: sum(g[name] for g in gradients) / size for name in expected}
    assert_same(expected, mean, 1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [SPEC, LossSpec(kl_coef=0.1), LossSpec(ratio="sequence", normalizer="sequence")])
def test_an_idle_microbatch_gives_gradients_of_zero(spec: LossSpec):
    """Every parameter has a gradient, so that all ranks' collectives match, and each is exactly 0."""
    model = tiny_model(MOE)
    (like,) = packed(GROUPS[:1], 10**6)
    idle = replace(idle_microbatch(like), ref_logprobs=torch.zeros(0) if spec.kl_coef else None)
    logprob, entropy, _ = token_logprobs(model, idle)
    assert logprob.numel() == entropy.numel() == 0
    inputs = LossInputs(
        old_logprobs=torch.zeros(0), advantages=torch.zeros(0), sequence_index=idle.sequence_index, num_sequences=0,
        total_loss_tokens=5, total_sequences=2, rollout_logprobs=torch.zeros(0), ref_logprobs=idle.ref_logprobs)
    loss, _ = grpo_loss(logprob, inputs, spec, entropy)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def rollouts(model: Transformer, temperature: float = 1.0, **cut: float) -> list[Group]:
    problems = [problem(i, 9 + i) for i in range(4)]
    return [graded(g) for g in make_engine(model).generate(problems, 4, sampling(12, temperature=temperature, **cut), step=0)]


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("config", [MOE, DENSE])
def test_on_policy_the_ratio_is_exactly_one(config: ModelConfig, temperature: float):
    model = tiny_model(config)
    packs = packed(rollouts(model, temperature), 60)
    _, metrics = policy_gradients(model, packs, temperature=temperature)
    assert metrics["ratio_max"] == metrics["ratio_min"] == 1.0 and metrics["max_abs_logprob_gap"] == 0.0
    assert metrics["approx_kl"] == 0.0 and metrics["clip_low_fraction"] == metrics["clip_high_fraction"] == 0.0
    assert metrics["ess"] == 1.0


def test_recomputed_old_logprobs_are_the_engines_record_to_the_bit():
    model = tiny_model(MOE)
    for pack in fill_logprobs(model, packed(rollouts(model), 60), WORLD, temperature=1.0, name="old_logprobs"):
        assert pack.old_logprobs is not None and pack.rollout_logprobs is not None
        assert different_bits(pack.old_logprobs, pack.rollout_logprobs) == 0 and not pack.old_logprobs.requires_grad


def test_of_several_ranks_each_fills_its_own_share():
    model = tiny_model(DENSE)
    packs = packed(GROUPS, 1)
    filled = fill_logprobs(model, packs, LoneRank(1, 3, CPU, torch.float32), temperature=1.0, name="ref_logprobs")
    assert [pack.ref_logprobs is not None for pack in filled] == [i % 3 == 1 for i in range(12)]


def test_a_gap_above_the_limit_stops_the_update_and_the_weights_stay():
    model = tiny_model(MOE)
    packs = packed(rollouts(model), 10**6)
    wrong = [replace(pack, rollout_logprobs=pack.rollout_logprobs - 0.01) for pack in packs]  # type: ignore[operator]
    optimizer, before = Optimizer(model, OptimConfig()), {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"by 0\.01 nats on policy, more than rl\.max_logprob_gap = 0\.001"):
        policy_update(policy_of(model, optimizer), wrong, SPEC, 1.0, lr_factor=1.0, max_gap=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.adamw.state
    metrics = policy_update(policy_of(model, optimizer), wrong, SPEC, 1.0, lr_factor=1.0, max_gap=0.02)
    assert metrics["max_abs_logprob_gap"] == pytest.approx(0.01, abs=1e-6)
    assert "logprob_gap_max" not in metrics, "one name for one thing"


def test_exact_mode_allows_no_gap_at_all():
    model = tiny_model(MOE)
    packs = packed(rollouts(model), 10**6)
    optimizer = Optimizer(model, OptimConfig())
    nearly = [replace(pack, rollout_logprobs=torch.nextafter(pack.rollout_logprobs, torch.tensor(1.0)))  # type: ignore[arg-type]
              for pack in packs]
    with pytest.raises(FloatingPointError, match=r"on policy, but run\.exact='on' requires 0"):
        policy_update(policy_of(model, optimizer), nearly, SPEC, 1.0, lr_factor=1.0, max_gap=0.0)
    assert not optimizer.adamw.state
    metrics = policy_update(policy_of(model, optimizer), packs, SPEC, 1.0, lr_factor=1.0, max_gap=0.0)
    assert metrics["max_abs_logprob_gap"] == 0.0


def test_broken_weights_never_reach_the_optimizer():
    model = tiny_model(DENSE)
    packs = packed(rollouts(model), 10**6)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    before = model.embedding.weight.clone()
    with pytest.raises(FloatingPointError):
        policy_update(policy_of(model, Optimizer(model, OptimConfig())), packs, SPEC, 1.0, lr_factor=1.0, max_gap=1e-3)
    assert torch.equal(model.embedding.weight, before)


@pytest.mark.parametrize("why", ["ungraded", "truncated"])
def test_a_completion_that_takes_no_part_gets_no_gradient(why: str):
    """Its tokens do not matter: the packs, and so the gradients, are the same to the bit."""
    def group(extra: Sequence[int]) -> Group:
        made = graded(hand_made_group(0, 6, [4, 5, 3]), [1.0, 0.0, 0.7])
        odd = replace(made.completions[1], token_ids=tuple(extra), finish_reason="length" if why == "truncated" else "stop")
        score = replace(made.scores[1], is_graded=why != "ungraded")
        return replace(made, completions=(made.completions[0], odd, made.completions[2]),
                       scores=(made.scores[0], score, made.scores[2]))

    model, seen = tiny_model(MOE), []
    for tokens in ([1, 2, 3, 4, 5], [9, 9, 9, 9, 9]):
        groups = [group(tokens)]
        estimate = compute_advantages(groups, RLConfig(drop_truncated=True), CPU)
        packs = pack_samples(select_samples(groups, estimate.mask), estimate.advantages, 10**6)
        assert sum(pack.num_loss_tokens for pack in packs) == 7
        seen.append(policy_gradients(model, packs)[0])
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert any(g.any() for g in seen[0].values())


def test_advantages_of_zero_give_gradients_of_zero():
    model = tiny_model(MOE)
    gradients, _ = policy_gradients(model, packed(GROUPS, 30, advantage=0.0))
    assert not any(g.any() for g in gradients.values())


def test_the_router_learns_from_the_policy_gradient():
    """Scores are gathered from the router's logits; a replayed or detached score would give no gradient."""
    gradients, _ = policy_gradients(tiny_model(MOE), packed(GROUPS, 10**6))
    assert all(g.abs().max() > 1e-6 for name, g in gradients.items() if name.endswith("router"))


def test_kl_to_the_policy_itself_is_zero_and_to_another_pulls_towards_it():
    model, other = tiny_model(DENSE), tiny_model(DENSE, seed=5)
    spec, packs = LossSpec(kl_coef=1.0), packed(rollouts(model), 80, advantage=0.0)
    same = fill_logprobs(model, packs, WORLD, temperature=1.0, name="ref_logprobs")
    gradients, metrics = policy_gradients(model, same, spec)
    assert metrics["kl"] == 0.0 and not any(g.any() for g in gradients.values())
    away = fill_logprobs(other, packs, WORLD, temperature=1.0, name="ref_logprobs")
    optimizer = Optimizer(model, OptimConfig(lr=1e-3))
    kls = [policy_update(policy_of(model, optimizer), away, spec, 1.0, lr_factor=1.0)["kl"] for _ in range(12)]
    assert kls[0] > 0 and kls[-1] < 0.8 * kls[0]


def reinforce_gradients(model: Transformer, packs: Sequence[Microbatch], weight: Any) -> dict[str, torch.Tensor]:
    """By hand: d/dw of -sum weight(pack) * advantage * logprob / N."""
    total = sum(pack.num_loss_tokens for pack in packs)
    loss = sum((-weight(pack) * pack.advantages * token_logprobs(model, pack)[0]).sum() / total for pack in packs)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    catcher = Catcher(model)
    catcher.step(1.0)
    return catcher.gradients


@pytest.mark.parametrize("cut", [{"top_p": 0.7}, {"top_k": 4}, {"min_p": 0.2}])
@pytest.mark.parametrize("old", ["rollout", "recompute"])
def test_a_truncated_sampler_is_weighed_by_its_own_probability(cut: dict[str, float], old: str):
    """The behaviour policy is softmax / kept mass, so on policy TIS weighs each token's term by its kept mass.
    1e-5 of the largest entry: weights are exponentials of f32 differences.
    """
    model = tiny_model(DENSE)
    packs = packed(rollouts(model, **cut), 80)
    filled = fill_logprobs(model, packs, WORLD, temperature=1.0, name="old_logprobs") if old == "recompute" else packs
    gradients, metrics = policy_gradients(model, filled, LossSpec(importance="tis"))
    assert metrics["ratio_max"] == metrics["ratio_min"] == 1.0
    assert metrics["max_abs_logprob_gap"] == 0.0  # of the full softmax on both sides
    assert any(float(pack.kept_logmass.min()) < -0.1 for pack in packs if pack.kept_logmass is not None)
    assert_same(reinforce_gradients(model, packs, lambda pack: pack.kept_logmass.exp()), gradients, 1e-5)


def test_a_second_update_on_the_same_rollouts_is_off_policy():
    model = tiny_model(MOE)
    packs = packed(rollouts(model), 60)
    optimizer = Optimizer(model, OptimConfig(lr=1e-3))
    first, second = (policy_update(policy_of(model, optimizer), packs, SPEC, 1.0, lr_factor=1.0) for _ in range(2))
    assert first["ratio_max"] == 1.0 and second["ratio_max"] > 1.0 > second["ratio_min"] and second["approx_kl"] > 0


def test_an_update_makes_rewarded_completions_likelier_and_is_repeatable():
    after = []
    for _ in range(2):
        model = tiny_model(MOE)
        groups = rollouts(model)
        samples = samples_of(groups)
        values = torch.tensor([[-1.0, 1.0] * len(groups[0].completions)] * len(groups))  # at least as wide as a group
        packs = pack_samples(samples, values, 60)
        policy_update(policy_of(model, Optimizer(model, OptimConfig(lr=1e-4))), packs, SPEC, 1.0, lr_factor=1.0)
        after.append(model.state_dict())
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
    gained = sum((token_logprobs(model, pack)[0].detach() - pack.rollout_logprobs) @ pack.advantages for pack in packs)
    assert gained > 0


def test_supervised_updates_lower_the_loss_from_that_of_the_uniform_guess():
    model = tiny_model(MOE, scale=1.0)
    optimizer = Optimizer(model, OptimConfig(name="muon", lr=3e-3, muon_lr=0.02))
    packs = pack_documents(DOCUMENTS, 40)
    losses = [supervised_update(policy_of(model, optimizer), packs, lr_factor=1.0)["loss"] for _ in range(25)]
    # 0.1: a fresh model's logits are of size 0.02 * sqrt(48), its loss is log(V) up to their variance.
    assert losses[0] == pytest.approx(torch.tensor(float(VOCAB_SIZE)).log().item(), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_the_expert_bias_moves_against_the_load_and_only_when_asked():
    model = tiny_model(MOE)
    packs = pack_documents(DOCUMENTS, 40)
    counts = sum(token_logprobs(model, pack, with_stats=True)[2].expert_counts for pack in packs)  # type: ignore[union-attr]
    before = torch.stack([block.mlp.expert_bias.clone() for block in model.blocks])  # type: ignore[operator, union-attr]
    supervised_update(policy_of(model, Optimizer(model, OptimConfig())), packs, lr_factor=0.0)
    assert torch.equal(torch.stack([block.mlp.expert_bias for block in model.blocks]), before)  # type: ignore[union-attr]
    supervised_update(policy_of(model, Optimizer(model, OptimConfig())), packs, lr_factor=0.0, expert_bias_rate=0.01)
    moved = torch.stack([block.mlp.expert_bias for block in model.blocks]) - before  # type: ignore[union-attr]
    load = counts.float()  # type: ignore[union-attr]
    assert torch.equal(moved.sign(), (load.mean(1, keepdim=True) - load).sign()) and moved.abs().max() < 0.0101


def test_the_balance_loss_evens_out_the_experts():
    model = tiny_model(MOE)
    optimizer = Optimizer(model, OptimConfig(lr=3e-3))
    packs = pack_documents(DOCUMENTS, 10**6)
    values = [supervised_update(policy_of(model, optimizer), packs, lr_factor=1.0, balance_coef=1.0)["balance"] for _ in range(20)]
    assert values[0] > 1.0 and values[-1] < values[0]


def test_the_z_loss_keeps_the_routers_logits_small_where_it_is_asked_for():
    packs, sizes = pack_documents(DOCUMENTS, 10**6), {}
    for coef in (0.0, 1.0):
        model = tiny_model(MOE)
        optimizer = Optimizer(model, OptimConfig(lr=3e-3))
        for _ in range(20):
            supervised_update(policy_of(model, optimizer), packs, lr_factor=1.0, z_loss_coef=coef)
        router = token_logprobs(model, packs[0], with_stats=True)[2]
        assert router is not None
        sizes[coef] = float(router.z_loss.detach()) / packs[0].num_tokens
    assert sizes[1.0] < 0.5 * sizes[0.0]
