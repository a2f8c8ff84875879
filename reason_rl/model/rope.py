"""The angles of rotary position embedding, as a table per position; `kernels.rope` turns the heads by them.

Scalings stretch a context past the one that a model was trained on. They are Hugging Face's tables, kept as JSON in the config:
linear (every frequency over a factor), llama3 (the low frequencies alone, smoothly), yarn (arXiv:2309.00071: by how often a
dimension turns within the original context, and cos and sin times an attention factor) and dynamic, which changes the angles only
past the context of config.json: that is our limit, so it is the default here. Left out, and refused: longrope and all others.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from reason_rl.config import ModelConfig

ORIGINAL = "original_max_position_embeddings"
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), (ORIGINAL,)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (("factor", ORIGINAL), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
}
"""A scaling's keys: those it needs, and those it may have."""


def rotary_dim(config: ModelConfig) -> int:
    """R, the dimensions of a head that are turned."""
    return int(config.head_dim * config.partial_rotary_factor)


def rope_table(max_position_embeddings: int, rotary_dim: int, theta: float, scaling: str = "") -> torch.Tensor:
    """-> f32[2, max_position_embeddings, R / 2]: cos and sin of position * theta^(-2c / R), scaled. Worked out in f64."""
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
    """The table in a config's rope_scaling; every wrong one is a ValueError that says what is wrong."""
    if not text:
        return {"rope_type": "default"}
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"rope_scaling must be a table as JSON, got {text!r}") from error
    if not isinstance(table, dict) or table.get("rope_type") not in KEYS:
        raise ValueError(f"rope_scaling: rope_type must be one of {', '.join(KEYS)}, "
                         f"got {table.get('rope_type') if isinstance(table, dict) else table!r}")
    needed, optional = KEYS[table["rope_type"]]
    wrong = sorted(table.keys() - {"rope_type", *needed, *optional})
    if wrong or not table.keys() >= set(needed):
        raise ValueError(f"rope_scaling of type {table['rope_type']} has the keys {', '.join((*needed, *optional))}; "
                         f"missing {sorted(set(needed) - table.keys())}, unknown {wrong}")
    for key, value in table.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "truncate" and not isinstance(value, bool):
            raise ValueError(f"rope_scaling: truncate must be true or false, got {value!r}")
        if key not in ("rope_type", "truncate") and not (is_number and 0 < value < math.inf):
            raise ValueError(f"rope_scaling: {key} must be a number above 0, got {value!r}")
    if table["rope_type"] == "llama3" and not table["low_freq_factor"] < table["high_freq_factor"]:
        raise ValueError(f"rope_scaling: low_freq_factor = {table['low_freq_factor']} must be below "
                         f"high_freq_factor = {table['high_freq_factor']}")
    return table


def _llama3(frequency: torch.Tensor, table: dict[str, Any]) -> torch.Tensor:
    """f64[R / 2]: over the factor where fewer than low_freq_factor turns fit the original context, as they are from
    high_freq_factor on, a line of the turns in between."""
    turns = table[ORIGINAL] * frequency / (2 * math.pi)
    low, high = table["low_freq_factor"], table["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / table["factor"])


def _yarn(frequency: torch.Tensor, table: dict[str, Any], theta: float) -> torch.Tensor:
    """f64[R / 2]: as it is for dimensions that turn more than beta_fast times within the original context, over the factor for
    those below beta_slow, a ramp over the dimensions in between."""
    half = frequency.shape[0]

    def dimension(turns: float) -> float:
        return half * math.log(table[ORIGINAL] / (turns * 2 * math.pi)) / math.log(theta)

    first, last = dimension(table.get("beta_fast", 32)), dimension(table.get("beta_slow", 1))
    if table.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float64) - first) / (last - first if last != first else 0.001)
    stretched = ramp.clamp(0, 1)
    return frequency * (1 - stretched + stretched / table["factor"])


def _yarn_magnitude(table: dict[str, Any]) -> float:
    """What cos and sin are multiplied by: given, or 0.1 ln(factor) + 1, or the ratio of two such (mscale over mscale_all_dim)."""
    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(table["factor"]) + 1 if table["factor"] > 1 else 1.0

    if "attention_factor" in table:
        return float(table["attention_factor"])
    if "mscale" in table and "mscale_all_dim" in table:
        return grown(table["mscale"]) / grown(table["mscale_all_dim"])
    return grown(1.0)
