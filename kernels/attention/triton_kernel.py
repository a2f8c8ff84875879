"""Attention on a GPU: the launchers under their schemas' names, and their specialisations for
ahead_of_time.py."""

from __future__ import annotations

from typing import Any

import torch

from kernels.ahead_of_time import Compile, pointer
from kernels.attention import triton_backward as backward
from kernels.attention import triton_forward as forward
from kernels.attention.tiles import forward_config, key_config, padded_head, paged_config, query_config
from kernels.attention.triton_backward import attention_bwd
from kernels.attention.triton_forward import attention_fwd, paged_attention

__all__ = ["attention_bwd", "attention_fwd", "compiles", "paged_attention"]

F32, I32, I64 = torch.float32, torch.int32, torch.int64
TENSORS = {
    F32: ("stats", "delta", "part_sums", "prefix_sums", "prefix_stats"),
    I32: ("tiles", "parts", "wholes", "readers", "merges"), I64: ("table", "lens", "prefix_index", "order", "starts")}
INTEGERS = ("num_tokens", "num_parts", "num_blocks", "width")
FORMS = ((128, torch.bfloat16, 4), (32, torch.bfloat16, 2), (32, F32, 2), (256, torch.bfloat16, 4))
"""Head dim, dtype and query heads per kv head: of a large model, of the default one, and the largest head dim
(packed only)."""


def _compile(
    name: str, kernel: Any, dtype: torch.dtype, options: dict[str, Any], may_spill: bool, is_product: bool = True
) -> Compile:
    of = {tensor: kind for kind, tensors in TENSORS.items() for tensor in tensors}
    arguments = {
        arg: "fp32" if arg.endswith("scale") else "i32" if arg in INTEGERS else pointer(of.get(arg, dtype))
        for arg in kernel.arg_names if arg not in options}
    return Compile(name, dtype, kernel, arguments, options, is_product, may_spill)


def forms(head_dim: int, dtype: torch.dtype, repeat: int, capability: int = 90) -> list[Compile]:
    """The specialisations of one model: the packed kernels, then the paged ones for sm_`capability`."""
    # The tiles fit sm_90 at C 128 in bf16; elsewhere a few registers spill.
    may_spill, shape = head_dim > 32 or dtype == F32, {"K": 8, "R": repeat, "C": head_dim, "UPCAST": False}
    query, paged = query_config(head_dim, dtype), paged_config(head_dim, dtype, repeat, capability)
    split = forward_config(head_dim, dtype)["BLOCK_M"] // query["BLOCK_M"]
    return [_compile(f"{name} C{head_dim}", kernel, dtype, options | shape, may_spill) for name, kernel, options in (
        ("attention_fwd", forward.attention_fwd_kernel, forward_config(head_dim, dtype)),
        ("attention_bwd query", backward.attention_bwd_query_kernel, query | {"SPLIT": split}),
        ("attention_bwd key", backward.attention_bwd_key_kernel, key_config(head_dim, dtype)),
        ("paged_attention prefix", forward.paged_attention_fwd_kernel, paged | {"IS_PREFIX": True}),
        ("paged_attention own", forward.paged_attention_fwd_kernel, paged | {"IS_PREFIX": False}))]


def compiles() -> list[Compile]:
    found = [form for head_dim, dtype, repeat in FORMS for form in forms(head_dim, dtype, repeat)[: 3 if head_dim == 256 else None]]
    merge = {"K": 8, "C": 128, "STRIP": 32, "BLOCK_N": 128, "BLOCK_C": padded_head(128), "num_warps": 4}
    return [*found, _compile("attention_bwd merge C128", backward.attention_bwd_merge_kernel, torch.bfloat16, merge, False, False)]
