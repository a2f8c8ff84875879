"""Other projects' kernels as sides of a case, called as their authors do, on our inputs.

Each function takes the device and returns a `Side`, or the reason why it cannot run, such as "not installed".
A package is imported only if it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from bench.cases import Inputs, Side
from bench.timing import in_words

Maker = Callable[..., Side]


def peer(package: str) -> Callable[[Maker], Callable[..., Side | str]]:
    """Wraps a maker: a reason instead of its Side if `package` is missing or fails to load, or on a CPU."""

    def wrap(make: Maker) -> Callable[..., Side | str]:
        @functools.wraps(make)
        def guarded(device: torch.device, *arguments: Any) -> Side | str:
            if importlib.util.find_spec(package) is None:
                return "not installed"
            if device.type != "cuda":
                return "CUDA only"
            try:
                return make(*arguments)
            except Exception as error:
                return f"does not load: {in_words(error)}"
        return guarded
    return wrap


@peer("liger_kernel")
def liger_rms_norm(eps: float) -> Side:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return Side(lambda x, weight: LigerRMSNormFunction.apply(x, weight.to(x.dtype), eps, 0.0, "llama", False))


@peer("liger_kernel")
def liger_swiglu() -> Side:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def call(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())
    return Side(call)


@peer("liger_kernel")
def liger_cross_entropy() -> Side:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    return Side(lambda hidden, weight, target_ids: -loss(weight, hidden, target_ids))


@peer("cut_cross_entropy")
def cut_cross_entropy() -> Side:
    from cut_cross_entropy import linear_cross_entropy

    return Side(lambda hidden, weight, target_ids: -linear_cross_entropy(hidden, weight, target_ids, reduction="none", impl="cce"))


@peer("liger_kernel")
def liger_grpo(group_size: int, clip_low: float, clip_high: float) -> Side:
    """`hidden` is group_size sequences of equal length; it takes one advantage per sequence."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", epsilon_low=clip_low, epsilon_high=clip_high)

    def call(hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, old_logprobs: torch.Tensor,
             advantages: torch.Tensor, **rest: Any) -> torch.Tensor:
        by_sequence = target_ids.view(group_size, -1)
        return loss(hidden.view(*by_sequence.shape, -1), weight, by_sequence, torch.ones_like(by_sequence),
                    advantages.view_as(by_sequence)[:, 0], old_per_token_logps=old_logprobs.view_as(by_sequence))[0]
    return Side(call)


@peer("liger_kernel")
def liger_experts() -> Side:
    from liger_kernel.ops import LigerFusedMoEFunction

    return Side(lambda x, gate_up, down, expert_ids, weights: LigerFusedMoEFunction.apply(
        x, gate_up, down, expert_ids.int(), weights))


@peer("scattermoe")
def scatter_experts() -> Side:
    """Its matrix has up before gate."""
    from scattermoe.mlp import GLUMLP

    def swap(inputs: Inputs) -> Inputs:
        gate, up = inputs["gate_up"].chunk(2, 1)
        return inputs | {"gate_up": torch.cat((up, gate), 1), "weights": inputs["weights"].to(inputs["x"].dtype)}

    def call(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> Any:
        with torch.device("meta"):
            module = GLUMLP(x.shape[1], down.shape[2], down.shape[0], expert_ids.shape[1])
        matrices = {"experts.weight": gate_up, "output_experts.weight": down}
        return torch.func.functional_call(module, matrices, (x, weights, expert_ids))
    return Side(call, prepare=swap)


@peer("flash_attn")
def flash_attention(prepare: Callable[[Inputs], Inputs] | None, select: Callable[[Any], Any]) -> Side:
    """For concatenated sequences; `prepare` adds cu_seqlens i32[S + 1] and max_length if they are missing."""
    from flash_attn import flash_attn_varlen_func

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_length: int, **rest: Any) -> Any:
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, causal=True)
    return Side(call, prepare, select)
