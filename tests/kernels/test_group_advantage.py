"""group_advantage against plain Python loops over groups; masks, groups of one, groups without signal."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from kernels.group_advantage import OP, group_advantage, make_inputs
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.compare import same_bits
from tests.kernels.implementations import each_implementation

implementation = each_implementation(OP)

KINDS = ["std", "mean", "leave_one_out", "batch_std"]
EPS = 1e-6


def by_hand(rewards: torch.Tensor, mask: torch.Tensor, kind: str) -> tuple[list[list[float]], list[bool]]:
    """The definitions, one completion at a time, in Python floats (f64)."""
    rows = [[(r, m) for r, m in zip(row, keep)] for row, keep in zip(rewards.tolist(), mask.tolist())]
    everyone = [r for row in rows for r, m in row if m]
    advantages, signals = [], []
    for row in rows:
        kept = [r for r, m in row if m]
        has_signal = len(set(kept)) > 1
        signals.append(has_signal)
        out = []
        for position, (r, m) in enumerate(row):
            if not m or not has_signal:
                out.append(0.0)
                continue
            centered = r - statistics.fmean(kept)
            if kind == "std":
                out.append(centered / (statistics.stdev(kept) + EPS))
            elif kind == "mean":
                out.append(centered)
            elif kind == "leave_one_out":
                out.append(r - statistics.fmean([other for p, (other, k) in enumerate(row) if k and p != position]))
            else:
                out.append(centered / (statistics.stdev(everyone) + EPS))
        advantages.append(out)
    return advantages, signals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in make_inputs() if name != "large"])
def test_each_kind_is_its_definition(name: str, kind: str) -> None:
    inputs = make_inputs()[name]
    advantages, has_signal = group_advantage(**inputs, kind=kind)
    expected, signals = by_hand(inputs["rewards"], inputs["mask"], kind)
    assert advantages.dtype == torch.float32 and has_signal.tolist() == signals
    # Computed in f64, stored in f32: half an ulp of an advantage below 16 is 4.8e-7.
    torch.testing.assert_close(advantages.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_member_has_no_influence_even_if_it_is_nan(kind: str) -> None:
    rewards = torch.tensor([[1.0, 0.0, 5.0, 0.5], [0.0, 1.0, -3.0, 1.0]])
    mask = torch.tensor([[True, True, False, True], [True, True, False, True]])
    clean, clean_signal = group_advantage(rewards, mask, kind=kind)
    poisoned = rewards.masked_fill(~mask, torch.nan)
    dirty, dirty_signal = group_advantage(poisoned, mask, kind=kind)
    assert torch.equal(clean, dirty) and torch.equal(clean_signal, dirty_signal)
    without, _ = group_advantage(rewards[:, [0, 1, 3]].contiguous(), kind=kind)
    assert torch.equal(clean[:, [0, 1, 3]], without)
    assert (clean[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_exactly_zero_and_no_signal(kind: str, dtype: torch.dtype) -> None:
    # 0.1 is no binary fraction: in f64 the mean of several is rounded for some sizes, so the zero must be made exact.
    for group_size in range(2, 12):
        rewards = torch.full((2, group_size), 0.1, dtype=dtype)
        rewards[1, -1] = 0.2
        advantages, has_signal = group_advantage(rewards, kind=kind)
        assert has_signal.tolist() == [False, True]
        assert (advantages[0] == 0).all() and (advantages[1] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_one_ulp_apart_are_signal(kind: str) -> None:
    base = torch.tensor(0.3)
    rewards = torch.stack([base, torch.nextafter(base, torch.tensor(1.0))])[None]
    advantages, has_signal = group_advantage(rewards, kind=kind)
    assert has_signal.tolist() == [True]
    assert advantages[0, 0] < 0 < advantages[0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_no_or_one_unmasked_member_have_no_signal(kind: str) -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[False, False, False], [False, True, False], [True, False, True]])
    advantages, has_signal = group_advantage(rewards, mask, kind=kind)
    assert has_signal.tolist() == [False, False, True]
    assert (advantages[:2] == 0).all() and advantages[2].tolist() != [0.0, 0.0, 0.0]
    nothing, signal = group_advantage(rewards, torch.zeros_like(mask), kind=kind)
    assert (nothing == 0).all() and not signal.any()


@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out"])
def test_groups_do_not_see_each_other(kind: str) -> None:
    inputs = make_inputs()["graded_in_part"]
    whole, _ = group_advantage(**inputs, kind=kind)
    alone = [group_advantage(inputs["rewards"][b : b + 1], inputs["mask"][b : b + 1], kind=kind)[0] for b in range(32)]
    assert same_bits(whole, torch.cat(alone))


def test_std_is_the_sample_standard_deviation() -> None:
    advantages, _ = group_advantage(torch.tensor([[0.0, 1.0]]), kind="std")
    # The sample std of (0, 1) is sqrt(1/2), the population's 1/2; eps = 1e-6 moves the fifth decimal of neither.
    assert math.isclose(advantages[0, 1].item(), 0.5 / math.sqrt(0.5), rel_tol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 1), (1030, 1), (600, 2), (47, 123), (3, 1025), (2, 5000), (1, 66_000)], ids=str)
def test_any_number_and_size_of_groups(shape: tuple[int, int], kind: str) -> None:
    """Against the reference: more groups than one program takes, groups too large for one; rewards far from zero."""
    generator = torch.Generator().manual_seed(1)
    rewards, mask = 1000 + torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < 0.9
    got = group_advantage(rewards, mask, kind)
    want = group_advantage(rewards.double(), mask, kind, impl="reference")
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-7, atol=1e-9)  # computed in f64, rounded once to f32
    assert all(same_bits(a, b) for a, b in zip(got, group_advantage(rewards, mask, kind), strict=True))


@pytest.mark.skipif(IS_INTERPRETED, reason="as many programs as the interpreter takes minutes for")
def test_a_batch_of_more_groups_than_programs_has_one_std() -> None:
    rewards = torch.randn(300_000, 2, generator=torch.Generator().manual_seed(1)) + 5
    got, _ = group_advantage(rewards, kind="batch_std")
    want, _ = group_advantage(rewards.double(), kind="batch_std", impl="reference")
    torch.testing.assert_close(got.double(), want, rtol=1e-7, atol=1e-9)


def test_no_groups_give_no_advantages() -> None:
    for kind in KINDS:
        advantages, has_signal = group_advantage(torch.zeros(0, 4), kind=kind)
        assert advantages.shape == (0, 4) and has_signal.shape == (0,)


def test_it_compiles_whole(implementation: str) -> None:
    """Below the public op, whose check for finite rewards reads values on the CPU."""
    if implementation == "reference":
        pytest.skip("plain torch")
    run = OP.choose(torch.empty(0)).run
    compiled = torch.compile(lambda rewards, mask: run(rewards, mask, "batch_std", EPS), fullgraph=True, backend="aot_eager")
    inputs = make_inputs()["odd_group"].values()
    assert all(same_bits(a, b) for a, b in zip(compiled(*inputs), run(*inputs, "batch_std", EPS), strict=True))


def test_float64_rewards_give_float64_advantages() -> None:
    advantages, _ = group_advantage(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    assert advantages.dtype == torch.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_unmasked_reward_that_is_not_finite_raises_and_is_named(bad: float) -> None:
    rewards = torch.zeros(3, 4)
    rewards[2, 1] = bad
    with pytest.raises(ValueError, match=r"rewards\[2, 1\]"):
        group_advantage(rewards)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_without_the_check_a_reward_that_is_not_finite_shows_in_its_group(bad: float, kind: str) -> None:
    """A GPU cannot raise without a sync: the advantages must then not hide it, even if the other rewards are equal."""
    rewards = torch.tensor([[0.5, bad, 0.5], [0.0, 1.0, 2.0], [1.0, 1.0, bad]])
    mask = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    advantages, has_signal = OP.choose(torch.empty(0)).run(rewards, mask, kind, EPS)
    assert has_signal.tolist() == [True, True, False] and not advantages[0].isfinite().any()
    assert (advantages[2] == 0).all() and (kind == "batch_std" or advantages[1].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_is_a_mask_of_all(kind: str) -> None:
    rewards = make_inputs()["odd_group"]["rewards"]
    for got, want in zip(group_advantage(rewards, kind=kind), group_advantage(rewards, rewards == rewards, kind), strict=True):
        assert same_bits(got, want)


def test_wrong_inputs_raise_with_expected_and_actual() -> None:
    rewards = torch.zeros(3, 4)
    for arguments, words in (
        ({"rewards": rewards[0]}, r"rewards must be f32\|f64\[B, G\], got f32\[4\]"),
        ({"rewards": rewards.long()}, r"got i64\[3, 4\]"),
        ({"rewards": rewards[:, :0]}, "G >= 1"),
        ({"rewards": rewards, "mask": torch.ones(3, 5).bool()}, r"mask must be bool\[3, 4\], got bool\[3, 5\]"),
        ({"rewards": rewards, "mask": torch.ones(3, 4)}, r"got f32\[3, 4\]"),
        ({"rewards": rewards, "kind": "median"}, "kind must be one of .*'median'"),
        ({"rewards": rewards, "eps": 0.0}, "eps must be above 0"),
        ({"rewards": rewards, "impl": "abacus"}, "impl must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            group_advantage(**arguments)


def test_the_reference_can_be_asked_for_by_name() -> None:
    inputs = make_inputs()["pairs"]
    by_name, _ = group_advantage(**inputs, impl="reference")
    assert torch.equal(by_name, OP.choose(inputs["rewards"], "reference").run(**inputs, kind="std", eps=EPS)[0])
