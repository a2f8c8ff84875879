"""The optimizer: schedule, groups, Muon on stacked matrices, clipping, and a state that resumes to the same bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from reason_rl.config import OptimConfig
from reason_rl.model.transformer import Transformer
from reason_rl.trainer.optimizer import MatrixMuon, Optimizer, is_hidden_matrix, lr_factor
from tests.reason_rl.tiny import DENSE, MOE, tiny_model

ADAMW = OptimConfig(lr=1e-2, weight_decay=0.1)
MUON = replace(ADAMW, name="muon", muon_lr=0.02)


def give_gradients(model: nn.Module, seed: int, scale: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(("schedule", "shape"), [
    ("constant", lambda progress: 1.0), ("linear", lambda progress: 1 - progress),
    ("cosine", lambda progress: (1 + math.cos(math.pi * progress)) / 2),
])  # fmt: skip
def test_the_schedule_warms_up_to_the_peak_and_then_follows_its_shape(schedule: str, shape):
    config = OptimConfig(warmup_steps=4, schedule=schedule, final_lr_share=0.2)  # type: ignore[arg-type]
    factors = [lr_factor(config, step, 20) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    for step in range(4, 20):
        wanted = 1.0 if schedule == "constant" else 0.2 + 0.8 * shape((step - 4) / 16)
        assert factors[step] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_no_update_has_a_rate_of_zero_or_above_the_peak(schedule: str):
    for warmup, steps in ((0, 1), (0, 7), (3, 3), (5, 2), (1, 2)):
        config = OptimConfig(warmup_steps=warmup, schedule=schedule)  # type: ignore[arg-type]
        assert all(0 < lr_factor(config, step, steps) <= 1 for step in range(steps))


def test_muon_takes_projections_and_experts_and_nothing_else():
    model = tiny_model(replace(MOE, num_shared_experts=1, tie_word_embeddings=False))
    taken = {name.split(".", 2)[-1] for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    assert taken == {"attention.qkv_proj.weight", "attention.o_proj.weight", "mlp.gate_up_proj", "mlp.down_proj",
                     "mlp.shared.gate_up_proj.weight", "mlp.shared.down_proj.weight"}


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(config: OptimConfig):
    model = tiny_model(replace(MOE, tie_word_embeddings=False))
    optimizer = Optimizer(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [(names[id(p)], group["weight_decay"]) for group in optimizer.adamw.param_groups for p in group["params"]]
    muon = [names[id(p)] for p in optimizer.muon.parameters] if optimizer.muon else []
    assert sorted([name for name, _ in grouped] + muon) == sorted(names.values())
    for name, decay in grouped:
        is_matrix = dict(model.named_parameters())[name].dim() > 1 and not name.startswith("embedding")
        assert decay == (0.1 if is_matrix else 0.0), name
    assert bool(muon) == (config.name == "muon")


def test_the_factor_scales_every_rate():
    for config in (ADAMW, MUON):
        model = tiny_model(DENSE)
        optimizer = Optimizer(model, config)
        give_gradients(model, 0)
        before = state_of(model)
        optimizer.step(0.0)
        assert changed(before, model) == set()
        give_gradients(model, 1)
        optimizer.step(0.5)
        assert {group["lr"] for group in optimizer.adamw.param_groups} == {0.5 * config.lr}
        if optimizer.muon:
            assert {group["lr"] for group in optimizer.muon.inner.param_groups} == {0.5 * config.muon_lr}
        assert changed(before, model) == set(dict(model.named_parameters()))


def test_muon_on_stacked_experts_is_torchs_muon_on_each_matrix():
    """Equal to the bit: the 2-D parameters are views of the stacked one."""
    generator = torch.Generator().manual_seed(0)
    stacked = nn.Parameter(torch.randn(3, 10, 6, generator=generator))
    flat = nn.Parameter(torch.randn(8, 12, generator=generator))
    single = [nn.Parameter(m.clone()) for m in (*stacked.detach().unbind(0), flat.detach())]
    ours = MatrixMuon([stacked, flat], MUON)
    theirs = torch.optim.Muon(single, lr=MUON.muon_lr, weight_decay=MUON.weight_decay, momentum=0.95)
    for _ in range(3):
        for parameter in (stacked, flat):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for parameter, gradient in zip(single, (*stacked.grad.unbind(0), flat.grad)):
            parameter.grad = gradient.clone()
        ours.step()
        theirs.step()
    for parameter, expected in zip((*stacked.unbind(0), flat), single):
        assert torch.equal(parameter, expected)


def test_muon_does_not_take_the_gradient_of_an_earlier_step_again():
    first, second = (nn.Parameter(torch.randn(4, 6)) for _ in range(2))
    muon = MatrixMuon([first, second], replace(MUON, weight_decay=0.0))
    first.grad, second.grad = torch.randn(4, 6), torch.randn(4, 6)
    muon.step()
    first.grad, second.grad = torch.randn(4, 6), None
    before = second.detach().clone()
    muon.step()
    assert torch.equal(second, before)


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_a_state_that_was_saved_and_loaded_goes_on_to_the_bit(config: OptimConfig, tmp_path):
    straight, first = tiny_model(MOE), tiny_model(MOE)
    optimizer, before = Optimizer(straight, config), Optimizer(first, config)
    for step in range(3):
        give_gradients(straight, step)
        optimizer.step(1.0)
        give_gradients(first, step)
        before.step(1.0)
    torch.save(before.state_dict(), tmp_path / "state.pt")
    resumed = Transformer(MOE, first.vocab_size)
    after = Optimizer(resumed, config)
    resumed.load_state_dict(first.state_dict())  # as on resuming: Muon must see the weights that were loaded
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 6):
        give_gradients(straight, step)
        optimizer.step(0.7)
        give_gradients(resumed, step)
        after.step(0.7)
    assert changed(state_of(straight), resumed) == set()


def test_a_saved_state_does_not_follow_the_optimizer():
    model = tiny_model(DENSE)
    optimizer = Optimizer(model, MUON)
    give_gradients(model, 0)
    optimizer.step(1.0)
    saved = optimizer.state_dict()
    copies = [{n: {k: torch.as_tensor(v).clone() for k, v in s.items()} for n, s in part.items()} for part in saved]
    give_gradients(model, 1)
    optimizer.step(1.0)
    for part, copy in zip(saved, copies):
        assert all(torch.equal(torch.as_tensor(part[n][k]), copy[n][k]) for n in copy for k in copy[n])


def test_a_state_of_another_optimizer_or_model_is_refused():
    muon, adamw = Optimizer(tiny_model(MOE), MUON).state_dict(), Optimizer(tiny_model(MOE), ADAMW).state_dict()
    with pytest.raises(ValueError, match="state of 2 optimizers, this run has 1"):
        Optimizer(tiny_model(MOE), ADAMW).load_state_dict(muon)
    with pytest.raises(ValueError, match=r"optimizer state of .* parameters, this run has"):
        Optimizer(tiny_model(DENSE), ADAMW).load_state_dict(adamw)


@pytest.mark.parametrize("limit", [0.0, 0.25, 1e6])
def test_the_norm_over_all_parameters_is_returned_and_clipped(limit: float):
    """clip_norm = 0 leaves gradients unchanged, and so does a limit above the norm."""
    model = tiny_model(DENSE)
    optimizer = Optimizer(model, replace(ADAMW, clip_norm=limit))
    seen: list[float] = []
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.append(norm_of(model)))
    give_gradients(model, 0, scale=1.0)
    before = norm_of(model)
    # 1e-5: the norm is an f32 sum of about 60,000 squares, and clip_grad_norm_ adds 1e-6 to its divisor.
    assert optimizer.step(1.0) == pytest.approx(before, rel=1e-5)
    assert seen[0] == pytest.approx(0.25 if limit == 0.25 else before, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def norm_of(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_gradient_stops_the_run_before_the_weights_change(bad: float):
    model = tiny_model(MOE)
    optimizer = Optimizer(model, MUON)
    give_gradients(model, 0)
    model.norm.weight.grad[0] = bad  # type: ignore[index]
    before = state_of(model)
    with pytest.raises(FloatingPointError, match="gradient's norm"):
        optimizer.step(1.0)
    assert changed(before, model) == set()
