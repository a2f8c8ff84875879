"""The rollout sampler: problems in, groups of completions with their logprobs out.

    blocks.py      the pool of KV blocks: who holds which, and when one is free again
    scheduler.py   which sequences run: admission by free blocks, preemption by recompute
    cache.py       the paged KV cache, and how attention reads and writes it
    decoder.py     the next tokens of all running sequences: op by op, or in one native call
    graphs.py      such a step captured as a CUDA graph
    engine.py      the loop: admit, prefill, decode, sample, record

From the same weights a completion depends on (run_seed, step, problem, sample) alone, not on the batch, the order, preemption
or the number of processes: the noise is keyed, and every op gives a row the same bits in any batch.
"""

from reason_rl.engine.engine import Engine, check_fits

__all__ = ["Engine", "check_fits"]
