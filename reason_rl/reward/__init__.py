"""Verifiers: a completion's text and its `Problem` give a `Score`.

Third stage of a step: after the engine has sampled, before advantages are taken. Each part is a small file of its own
(accuracy, format, overlong, custom); here they are weighted by `RewardConfig` and summed. A part that raises or
returns no finite number makes its completion ungraded, with the cause; the run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from reason_rl.config import Config
from reason_rl.reward.accuracy import accuracy_reward, extract_answer
from reason_rl.reward.custom import Reward, load_reward
from reason_rl.reward.format import format_reward, thinking_tokens
from reason_rl.reward.overlong import overlong_reward
from reason_rl.types import Completion, Group, Problem, Score

__all__ = ["Reward", "extract_answer", "grade", "grade_group", "load_rewards", "thinking_tokens"]


def load_rewards(config: Config) -> dict[str, Reward]:
    """The user's own rewards by part name; raises before any work starts if one cannot be imported."""
    return {"custom": load_reward(config.reward.custom)} if config.reward.custom else {}


def grade_group(group: Group, texts: Sequence[str], config: Config,
                rewards: Mapping[str, Reward] | None = None) -> Group:
    """The group with a `Score` for each completion.

    texts: each completion decoded, without its end token.
    rewards: what `load_rewards` gave; None loads them.
    """
    if len(texts) != len(group.completions):
        raise ValueError(f"one text for each of the {len(group.completions)} completions, got {len(texts)}")
    loaded = load_rewards(config) if rewards is None else rewards
    return group.with_scores(tuple(
        grade(group.problem, text, completion, config, loaded)
        for text, completion in zip(texts, group.completions)))


def grade(problem: Problem, text: str, completion: Completion, config: Config,
          rewards: Mapping[str, Reward] | None = None) -> Score:
    """The weighted sum of all parts; never raises for what a reward does."""
    weights = config.reward
    loaded = load_rewards(config) if rewards is None else rewards
    parts: dict[str, float] = {}
    value = 0.0
    for name, weight in [("accuracy", weights.accuracy), ("format", weights.format), ("overlong", weights.overlong),
                         *((name, weights.custom_weight) for name in loaded)]:
        try:
            part = float(_part(name, problem, text, completion, config, loaded))
        except Exception as error:  # whatever a verifier does, one completion must not end the run
            return _ungraded(parts, f"{name} raised {type(error).__name__}: {error}")
        if not math.isfinite(part):
            return _ungraded(parts, f"{name} returned {part}")
        parts[name] = part
        value += weight * part
    return Score(value=value, parts=parts)


def _part(name: str, problem: Problem, text: str, completion: Completion, config: Config,
          rewards: Mapping[str, Reward]) -> float:
    match name:
        case "accuracy":
            return accuracy_reward(problem, text)
        case "format":
            return format_reward(text, completion.finish_reason)
        case "overlong":
            return overlong_reward(len(completion.token_ids), completion.finish_reason, config.sampling.max_tokens,
                                   config.reward.overlong_buffer)
        case _:
            return rewards[name](problem, text)


def _ungraded(parts: Mapping[str, float], cause: str) -> Score:
    """Value 0.0, with the parts that had been computed."""
    return Score(value=0.0, parts=dict(parts), is_graded=False, cause=cause[:200])
