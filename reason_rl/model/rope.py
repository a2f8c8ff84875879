"""The cos and sin table of rotary position embedding (RoPE), by position; `kernels.rope` applies it.

A scaling stretches the context beyond the one a model was trained on. The config holds it as JSON, in Hugging
Face's `rope_scaling` format:
    linear    every frequency is divided by the factor
    llama3    only low frequencies are divided, with a smooth transition
    yarn      likewise, by turns within the original context; cos and sin are scaled too (arXiv:2309.00071)
    dynamic   changes angles only beyond max_position_embeddings, which is our limit: no scaling here
Left out, and refused: longrope and all others.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from reason_rl.config import ModelConfig
from reason_rl.records import ConfigError

ORIGINAL = "original_max_position_embeddings"
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), (ORIGINAL,)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (("factor", ORIGINAL), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
}
"""rope_type -> (required keys, optional keys)."""


def rotary_dim(config: ModelConfig) -> int:
    """R: the number of dimensions of a head that are rotated, the first ones."""
    return int(config.head_dim * config.partial_rotary_factor)


def rope_table(max_position_embeddings: int, rotary_dim: int, theta: float, scaling: str = "") -> torch.Tensor:
    """-> f32[2, max_position_embeddings, R / 2]: cos and sin of position * theta^(-2c / R), scaled.
    Computed in f64, stored in f32."""
    frequency = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    magnitude, table = 1.0, parse_scaling(scaling)
    if table["rope_type"] == "linear":
        frequency = frequency / table["factor"]
    elif table["rope_type"] == "llama3":
        frequency = _llama3(frequency, table)
    elif table["rope_type"] == "yarn":
        frequency, magnitude = _yarn(frequency, table, theta), _yarn_magnitude(table)
    angle = torch.arange(max_position_embeddings, dtype=torch.float64)[:, None] * frequency
    return (torch.stack((angle.cos(), angle.sin())) * magnitude).float()


def parse_scaling(text: str) -> dict[str, Any]:
    """rope_scaling as JSON -> the table; ValueError on an unknown type, wrong keys or values."""
    if not text:
        return {"rope_type": "default"}
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"rope_scaling must be a table as JSON, got {text!r}") from error
    if not isinstance(table, dict) or table.get("rope_type") not in SCALINGS:
        raise ConfigError(f"rope_scaling: rope_type must be one of {', '.join(SCALINGS)}, "
                         f"got {table.get('rope_type') if isinstance(table, dict) else table!r}")

    # Every required key, no unknown one.
    required, optional = SCALINGS[table["rope_type"]]
    unknown = sorted(table.keys() - {"rope_type", *required, *optional})
    if unknown or not table.keys() >= set(required):
        raise ConfigError(f"rope_scaling of type {table['rope_type']} has the keys {', '.join((*required, *optional))}; "
                         f"missing {sorted(set(required) - table.keys())}, unknown {unknown}")

    # Values: numbers above 0, but for `truncate`.
    for key, value in table.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "truncate" and not isinstance(value, bool):
            raise ConfigError(f"rope_scaling: truncate must be true or false, got {value!r}")
        if key not in ("rope_type", "truncate") and not (is_number and 0 < value < math.inf):
            raise ConfigError(f"rope_scaling: {key} must be a number above 0, got {value!r}")
    if table["rope_type"] == "llama3" and not table["low_freq_factor"] < table["high_freq_factor"]:
        raise ConfigError(f"rope_scaling: low_freq_factor = {table['low_freq_factor']} must be below "
                         f"high_freq_factor = {table['high_freq_factor']}")
    return table


def _llama3(frequency: torch.Tensor, table: dict[str, Any]) -> torch.Tensor:
    """f64[R / 2]: frequencies with up to low_freq_factor turns in the original context are divided by the
    factor, those with high_freq_factor or more are kept; in between, a mix linear in the turns."""
    turns = table[ORIGINAL] * frequency / (2 * math.pi)
    low, high = table["low_freq_factor"], table["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / table["factor"])


def _yarn(frequency: torch.Tensor, table: dict[str, Any], theta: float) -> torch.Tensor:
    """f64[R / 2]: dimensions that turn beta_fast times or more in the original context are kept, those up to
    beta_slow are divided by the factor; in between, a mix linear in the dimension."""
    half = frequency.shape[0]

    def dimension(turns: float) -> float:
        """The (fractional) dimension that turns so many times."""
        return half * math.log(table[ORIGINAL] / (turns * 2 * math.pi)) / math.log(theta)

    first, last = dimension(table.get("beta_fast", 32)), dimension(table.get("beta_slow", 1))
    if table.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float64) - first) / (last - first if last != first else 0.001)
    stretched = ramp.clamp(0, 1)
    return frequency * (1 - stretched + stretched / table["factor"])


def _yarn_magnitude(table: dict[str, Any]) -> float:
    """The factor on cos and sin: attention_factor if given, else the ratio of `scaled` at mscale and
    mscale_all_dim if both are given, else 0.1 ln(factor) + 1."""
    def scaled(scale: float) -> float:
        return 0.1 * scale * math.log(table["factor"]) + 1 if table["factor"] > 1 else 1.0

    if "attention_factor" in table:
        return float(table["attention_factor"])
    if "mscale" in table and "mscale_all_dim" in table:
        return scaled(table["mscale"]) / scaled(table["mscale_all_dim"])
    return scaled(1.0)
