"""The stages of a recipe, one page each.

    base.py       the interface of a stage, and the arguments it gets
    pretrain.py   a base model from random weights: next-token prediction on a synthetic corpus
    grpo.py       reinforcement learning with verifiable rewards: the page to read first
    heldout.py    evaluation on held-out problems
"""

from reason_rl.stages.base import Stage
from reason_rl.stages.grpo import Grpo
from reason_rl.stages.pretrain import Pretrain

STAGES: dict[str, type[Stage]] = {stage.kind: stage for stage in (Pretrain, Grpo)}

__all__ = ["STAGES", "Stage"]
