"""The claim of test_engine_bits.py on a GPU, for an environment in which every op of the model has a batch-invariant kernel there.

Torch's own CUDA kernels promise no bits: while the reference is all there is on CUDA, this file skips and names the ops.
"""

from __future__ import annotations

import pytest
import torch

from kernels.__main__ import import_ops
from kernels.dispatch import table
from reason_rl.config import EngineConfig
from reason_rl.engine import Engine
from reason_rl.rl.packing import pack_samples
from reason_rl.trainer.step import token_logprobs
from tests.reason_rl.tiny import DENSE, MOE, problem, samples_of, sampling, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
NEEDED = ("add_rms_norm", "attention", "linear", "linear_logprob", "moe_experts", "moe_route", "paged_attention", "rms_norm",
          "rope", "sample", "swiglu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("num_sequences", [1, 2, 3, 7, 8, 9, 11, 64, 65, 256])
def test_the_engines_logprobs_are_the_trainers_on_a_gpu(num_sequences: int, config: object, dtype: torch.dtype):
    import_ops()
    plain = [name for name, _, picked, _ in table(CUDA, dtype) if name in NEEDED and picked == "reference"]
    if plain:
        pytest.skip(f"torch's own kernels promise no bits, and run here for {', '.join(plain)}")
    model = tiny_model(config, dtype=dtype).to(CUDA)  # type: ignore[arg-type]
    group_size = 4 if num_sequences % 4 == 0 else 1
    problems = [problem(i, (5, 16, 31, 129)[i % 4]) for i in range(num_sequences // group_size)]
    groups = Engine(model, EngineConfig(), 7).generate(problems, group_size, sampling(), step=0)
    for tokens in (1 << 20, 150):
        for pack in pack_samples(samples_of(groups), tokens):
            assert pack.rollout_logprobs is not None
            logprob = token_logprobs(model, pack.to(CUDA))[0].detach().cpu()
            assert torch.equal(logprob.view(torch.int32), pack.rollout_logprobs.view(torch.int32))
