"""`linear_grpo_loss` on a GPU: calls the launchers of linear_logprob and grpo_loss; it adds no kernel.

The loss kernel runs unchanged between forward and backward. It moves some 20 bytes per token, against 2DV
flops per token before it and 4DV after. Fusing it with the merge of the logprobs would save one launch, and
sequence-level ratios would need a second version.

The op saves memory and a product over its two ops in turn. Under ratio="token" a token's dloss/dlogprob needs
no other token's logprob, so the rows are processed in blocks whose bf16 softmax fits SOFTMAX_BYTES: forward,
loss, backward products, next block. That takes 6NDV flops for any number of tokens. The loss kernel runs over
all tokens each time; tokens of later blocks have old_logprobs for logprobs, their slopes are not used, and
the last run gives the loss and metrics of all tokens. Under ratio="sequence" all logprobs are needed first,
and a softmax beyond the budget is recomputed: 8NDV flops. So are f32 logits, whose gradients need more digits
than bf16 has.
"""

from __future__ import annotations

import torch

from kernels.ahead_of_time import Compile
from kernels.grpo_loss.function import NUMBERS
from kernels.grpo_loss.spec import CHOICES
from kernels.grpo_loss.triton_kernel import grpo_loss
from kernels.linear_logprob import function
from kernels.linear_logprob.triton_kernel import linear_logprob_bwd, linear_logprob_fwd


def linear_grpo_loss(
    loss: torch.Tensor, metrics: torch.Tensor, logprobs: torch.Tensor, dhidden: torch.Tensor, dweight: torch.Tensor,
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
    sequence_index: torch.Tensor, rollout_logprobs: torch.Tensor | None, ref_logprobs: torch.Tensor | None, temperature: float,
    choices: list[int], counts: list[int], numbers: list[float],
) -> None:
    """dhidden and dweight have no elements if no gradient is needed."""
    # Buffers; rows that have no logprob yet count with their old_logprob.
    num_rows, needs_grad = hidden.shape[0], dweight.numel() > 0
    weight = weight.to(hidden.dtype)
    entropy, dlogprob, dentropy = (torch.zeros_like(logprobs) for _ in range(3))
    stats = logprobs.new_empty(num_rows, 2)
    has_bonus = numbers[NUMBERS.index("entropy_coef")] != 0
    logprobs.copy_(old_logprobs)
    # Rows per block.
    step = num_rows
    if needs_grad and CHOICES["ratio"][choices[0]] == "token":
        step = max(1, function.SOFTMAX_BYTES // (2 * weight.shape[0]) // 128) * 128
    # Logprobs of a block, the loss over all rows, and the gradients of the block.
    for first in range(0, max(num_rows, 1), max(step, 1)):
        rows = slice(first, min(first + step, num_rows))
        softmax, tops = function.kept_softmax(hidden[rows], weight, needs_grad)
        of_rows = (hidden[rows], weight, target_ids[rows])
        linear_logprob_fwd(logprobs[rows], entropy[rows], stats[rows], softmax, tops, *of_rows, temperature)
        grpo_loss(loss, metrics, dlogprob, dentropy if has_bonus else dentropy[:0], logprobs, old_logprobs, advantages,
                  sequence_index, rollout_logprobs, ref_logprobs, entropy, choices, counts, numbers)
        if needs_grad:
            linear_logprob_bwd(dhidden[rows], dweight, dlogprob[rows], dentropy[rows], *of_rows, stats[rows], entropy[rows],
                               softmax, tops, temperature, is_added=first > 0)
        del softmax, tops  # freed before the next block's: two would take twice SOFTMAX_BYTES


def compiles() -> list[Compile]:
    """None besides those of linear, linear_logprob and grpo_loss."""
    return []
