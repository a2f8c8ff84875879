"""The format reward: does the completion keep R1-Zero's template and then stop?

    <think>...</think><answer>...</answer> end

Each tag once, in this order, nothing before, between or after, not even white space. What stands inside is not judged
here: an empty thought is well formed.
"""

from __future__ import annotations

from reason_rl.records import FinishReason

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(text: str, finish_reason: FinishReason) -> float:
    """1.0 or 0.0. text: the completion without its end token; "length" means that it never came to one."""
    is_well_formed = (finish_reason == "stop"
                      and all(text.count(tag) == 1 for tag in TAGS)
                      and text.startswith("<think>")
                      and "</think><answer>" in text
                      and text.endswith("</answer>"))
    return 1.0 if is_well_formed else 0.0
