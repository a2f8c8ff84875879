"""reason_rl: teach a language model to reason by reinforcement learning with verifiable rewards (GRPO)."""

__version__ = "0.1.0"
