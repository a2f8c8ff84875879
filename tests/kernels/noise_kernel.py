"""A Triton kernel that only test_sample.py launches: the noise of kernels/sample/triton_noise.py for given words and keys."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sample.triton_noise import gumbel, gumbel_near, philox_words


@triton.jit
def noise_kernel(near, exact, words, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + i).to(tl.uint32)
    tl.store(near + i, gumbel_near(word))
    tl.store(exact + i, gumbel(word))


@triton.jit
def words_kernel(out, keys, positions, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox_words(tl.load(keys + i), tl.load(positions + i), i)
    tl.store(out + 4 * i, w0.to(tl.int64))
    tl.store(out + 4 * i + 1, w1.to(tl.int64))
    tl.store(out + 4 * i + 2, w2.to(tl.int64))
    tl.store(out + 4 * i + 3, w3.to(tl.int64))
