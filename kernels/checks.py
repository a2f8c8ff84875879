"""Contract checks shared by the ops. Each raises a ValueError that names the argument, expected and
actual."""

from __future__ import annotations

import torch

SHORT = {
    torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "bool",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(tensor: torch.Tensor) -> str:
    """'f32[3, 4] on cpu'"""
    return f"{SHORT.get(tensor.dtype, str(tensor.dtype))}{list(tensor.shape)} on {tensor.device}"


def check(
    op: str,
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | str, ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    like: torch.Tensor | None = None,
) -> None:
    """Entries of `shape` that are strings allow any size; they give the rank and name the dimension in the
    error."""
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if (
        isinstance(tensor, torch.Tensor) and tensor.dtype in allowed and tensor.dim() == len(shape)
        and all(isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape, strict=True))
        and (like is None or tensor.device == like.device)
    ):
        return  # formatting is for errors only: this runs thousands of times a step
    wanted = f"{'|'.join(SHORT.get(d, str(d)) for d in dict.fromkeys(allowed))}[{', '.join(map(str, shape))}]"
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{op}: {name} must be {wanted}, got {type(tensor).__name__}")
    if like is not None and tensor.device != like.device:
        wanted += f" on {like.device}"
    raise ValueError(f"{op}: {name} must be {wanted}, got {describe(tensor)}")
