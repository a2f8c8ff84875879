"""bench/peers/ops.py against fake packages that follow the real ones' documentation: the layouts and the
order of the arguments that we pass."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import attention, linear_grpo_loss, linear_logprob, moe, rms_norm, swiglu
from bench.cases import Case, Setup, Side, as_tuple, error_of, in_double
from bench.peers import ops

CPU = torch.device("cpu")
CUDA = SimpleNamespace(type="cuda")
TINY = Setup(CPU, "tiny")


class Package:
    """Replaces sys.modules[name]; imports from it return values of `things`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, **things: Any) -> None:
        module = ModuleType(name)
        vars(module).update(things)
        monkeypatch.setitem(sys.modules, name, module)
        top = name.split(".")[0]
        monkeypatch.setitem(sys.modules, top, sys.modules.get(top) or ModuleType(top))
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: module if wanted == top else find(wanted))


def assert_side_is_right(side: Side | str, case: Case) -> None:
    """Its first output equals the reference's within a few roundings of f32."""
    assert isinstance(side, Side), side
    inputs = case.make()
    given = side.select(side.call(**(side.prepare(inputs) if side.prepare else inputs)))
    error = error_of([given], [as_tuple(case.exact(**in_double(inputs)))[0]])
    assert error is not None and error < 1e-6


def test_a_peer_that_is_missing_broken_or_on_the_wrong_device_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ops.liger_swiglu(CUDA) == "not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert ops.liger_swiglu(CPU) == "CUDA only"
    said = ops.liger_swiglu(CUDA)
    assert isinstance(said, str) and said.startswith("does not load: ModuleNotFoundError")


def test_ligers_norm_and_activation(monkeypatch: pytest.MonkeyPatch):
    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, casting: str, in_place: bool) -> torch.Tensor:
        assert (offset, casting, in_place) == (0.0, "llama", False)
        return F.rms_norm(x, weight.shape, weight, eps)
    Package(monkeypatch, "liger_kernel.ops.rms_norm", LigerRMSNormFunction=SimpleNamespace(apply=norm))
    assert_side_is_right(ops.liger_rms_norm(CUDA, rms_norm.EPS), rms_norm.cases(TINY)[0])
    Package(monkeypatch, "liger_kernel.ops.swiglu", LigerSiLUMulFunction=SimpleNamespace(apply=lambda a, b: F.silu(a) * b))
    assert_side_is_right(ops.liger_swiglu(CUDA), swiglu.cases(TINY)[0])


def test_the_fused_cross_entropies(monkeypatch: pytest.MonkeyPatch):
    def loss(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options == {"reduction": "none", "impl": "cce"}
        return F.cross_entropy(hidden @ weight.T, ids, reduction="none")

    class Liger:
        def __init__(self, **options: Any) -> None:
            assert options == {"reduction": "none", "accum_dtype": torch.float32}

        def __call__(self, weight: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(hidden @ weight.T, ids, reduction="none")
    (case,) = linear_logprob.cases(TINY)
    Package(monkeypatch, "cut_cross_entropy", linear_cross_entropy=loss)
    assert_side_is_right(ops.cut_cross_entropy(CUDA), case)
    Package(monkeypatch, "liger_kernel.transformers", LigerFusedLinearCrossEntropyLoss=Liger)
    assert_side_is_right(ops.liger_cross_entropy(CUDA), case)


def test_ligers_grpo_gets_its_advantages_by_sequence(monkeypatch: pytest.MonkeyPatch):
    class Liger:
        def __init__(self, **options: Any) -> None:
            self.low, self.high = 1 - options["epsilon_low"], 1 + options["epsilon_high"]
            assert options["loss_type"] == "dapo" and options["beta"] == 0 and not options["use_ref_model"]

        def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
                     advantages: torch.Tensor, old_per_token_logps: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
            """hidden [B, T, D], ids, mask and old logprobs [B, T], advantages [B]"""
            logprobs = (hidden @ weight.T).log_softmax(-1).gather(2, ids[..., None])[..., 0]
            ratio, advantages = (logprobs - old_per_token_logps).exp(), advantages[:, None]
            loss = -torch.minimum(ratio * advantages, ratio.clamp(self.low, self.high) * advantages)
            return (loss * mask).sum() / mask.sum(), []
    Package(monkeypatch, "liger_kernel.chunked_loss", LigerFusedLinearGRPOLoss=Liger)
    (case,) = linear_grpo_loss.cases(TINY)
    sequences, spec = linear_grpo_loss.SHAPES["tiny"][0][0][0], linear_grpo_loss.SPEC
    assert_side_is_right(ops.liger_grpo(CUDA, sequences, spec.clip_low, spec.clip_high), case)


def test_the_mixtures_of_experts(monkeypatch: pytest.MonkeyPatch):
    def by_token(x: torch.Tensor, first: Any, down: Any, ids: torch.Tensor, weights: torch.Tensor, act: Any) -> torch.Tensor:
        rows = [sum(w * (down[e] @ act(first[e] @ token)) for e, w in zip(chosen.tolist(), each, strict=True))
                for token, chosen, each in zip(x, ids, weights, strict=True)]
        return torch.stack(rows)

    def apply(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert ids.dtype == torch.int32
        return by_token(x, gate_up, down, ids, weights, lambda h: F.silu(h.chunk(2)[0]) * h.chunk(2)[1])

    class Experts(torch.nn.Module):
        def __init__(self, count: int, in_size: int, out_size: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(count, out_size, in_size))

    class GLUMLP(torch.nn.Module):
        def __init__(self, input_size: int, hidden_size: int, num_experts: int, top_k: int) -> None:
            super().__init__()
            self.experts = Experts(num_experts, input_size, 2 * hidden_size)
            self.output_experts = Experts(num_experts, hidden_size, input_size)

        def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            """The second half of the first product is the gate."""
            return by_token(x, self.experts.weight, self.output_experts.weight, ids, weights,
                            lambda h: F.silu(h.chunk(2)[1]) * h.chunk(2)[0])
    case = moe.cases(TINY)[0]
    Package(monkeypatch, "liger_kernel.ops", LigerFusedMoEFunction=SimpleNamespace(apply=apply))
    assert_side_is_right(ops.liger_experts(CUDA), case)
    Package(monkeypatch, "scattermoe.mlp", GLUMLP=GLUMLP)
    assert_side_is_right(ops.scatter_experts(CUDA), case)


def test_flash_attention_of_whole_sequences_and_of_groups_without_a_shared_prompt(monkeypatch: pytest.MonkeyPatch):
    def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds_q: torch.Tensor, bounds_k: torch.Tensor, most_q: int,
               most_k: int, causal: bool) -> torch.Tensor:
        assert causal and torch.equal(bounds_q, bounds_k) and most_q == most_k == int(bounds_q.diff().max())
        outputs = []
        for start, end in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True):
            parts = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            outputs.append(F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outputs)
    Package(monkeypatch, "flash_attn", flash_attn_varlen_func=varlen)
    causal, _, packed = attention.cases(TINY)
    assert_side_is_right(ops.flash_attention(CUDA, None, lambda out: out), causal)
    shared = packed.sides["not shared"]
    assert isinstance(shared, Side)
    assert_side_is_right(ops.flash_attention(CUDA, shared.prepare, shared.select), packed)
