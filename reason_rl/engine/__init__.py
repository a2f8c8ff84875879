"""The rollout sampler: problems in, groups of completions with their logprobs out.

    blocks.py          the pool of KV blocks, with reference counts
    scheduler.py       which sequences run: admission by free blocks, preemption by recompute
    cache.py           the paged KV cache, and attention over it
    decoders.py        the next tokens of all running sequences: op by op, or in one native call
    native_decode.py   that native call, and the models that it supports
    graphs.py          an op-by-op step captured as a CUDA graph
    engine.py          the loop: admit, prefill, decode, sample, record

With the same weights, a completion depends on (run_seed, step, problem, sample) only, not on the batch, the
order, preemption or the number of processes: the noise is keyed by them, and the ops are batch-invariant.
"""

from reason_rl.engine.engine import Engine, check_fits

__all__ = ["Engine", "check_fits"]
