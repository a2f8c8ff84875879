// Counter-based Gumbel noise, as defined in kernels/sample/philox.py: -log(-log(u)) of Philox4x32-10 words,
// in f64, rounded to f32.
//
// Two f64 logarithms per token of the vocabulary would cost more than the head's product. `gumbel_near`
// computes the noise of 16 tokens in f32, with an error below NOISE_ERROR, which rules out all but one or a
// few tokens. `gumbel` computes the exact noise of those.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/simd.h"

namespace reason_rl {

// Measured over all 2^32 words: |gumbel_near - gumbel in f64| <= 1.9e-6 in the portable build, less with
// fused multiply-adds.
constexpr float NOISE_ERROR = 1.0f / (1 << 18);

// Bit i is 1 if lane i is set.
inline uint32_t lane_bits(I32x16 which) {
    uint32_t bits = 0;
    for (int i = 0; i < REGISTERS; ++i) {
#if defined(__AVX512F__)
        bits = _mm512_movepi32_mask((__m512i)which.reg[i]);
#elif defined(__AVX2__)
        bits |= static_cast<uint32_t>(_mm256_movemask_ps((__m256)which.reg[i])) << (i * REGISTER_LANES);
#else
        for (int lane = 0; lane < REGISTER_LANES; ++lane) bits |= (which.reg[i][lane] & 1u) << (i * REGISTER_LANES + lane);
#endif
    }
    return bits;
}

// The 64-bit products of 32-bit lanes, as high and low halves.
struct Products {
    U32x16 high, low;
};
inline Products multiply_wide(U32x16 a, uint32_t b) {
    Products y;
    for (int i = 0; i < REGISTERS; ++i) {
#if defined(__AVX512F__)
        const __m512i x = (__m512i)a.reg[i], factor = _mm512_set1_epi32(static_cast<int>(b));
        // The products of the even and of the odd lanes, then a blend of their halves.
        const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
        y.high.reg[i] = (U32x16::Register)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
        y.low.reg[i] = (U32x16::Register)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
        const __m256i x = (__m256i)a.reg[i], factor = _mm256_set1_epi32(static_cast<int>(b));
        const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
        y.high.reg[i] = (U32x16::Register)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
        y.low.reg[i] = (U32x16::Register)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
        for (int lane = 0; lane < REGISTER_LANES; ++lane) {
            const uint64_t product = static_cast<uint64_t>(a.reg[i][lane]) * b;
            y.high.reg[i][lane] = static_cast<uint32_t>(product >> 32);
            y.low.reg[i][lane] = static_cast<uint32_t>(product);
        }
#endif
    }
    return y;
}

constexpr int64_t NOISE_WORDS = 4 * LANES;

// words: u32[64], numbers 4 * first_block and up of (key, position): 16 Philox blocks with the counters
// (first_block + i, position, 0, 0), i < 16.
inline void philox_words(uint32_t* words, int64_t key, int64_t position, int64_t first_block) {
    uint32_t key_a = static_cast<uint32_t>(key), key_b = static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32);
    uint32_t block[LANES];
    for (int i = 0; i < LANES; ++i) block[i] = static_cast<uint32_t>(first_block + i);
    U32x16 c0, c1 = splat(static_cast<uint32_t>(position)), c2 = splat(0u), c3 = splat(0u);
    std::memcpy(&c0, block, sizeof c0);
    for (int round = 0; round < 10; ++round) {
        const Products a = multiply_wide(c0, 0xD2511F53u), b = multiply_wide(c2, 0xCD9E8D57u);
        c0 = b.high ^ c1 ^ splat(key_a), c1 = b.low, c2 = a.high ^ c3 ^ splat(key_b), c3 = a.low;
        key_a += 0x9E3779B9u, key_b += 0xBB67AE85u;
    }
    // Interleave: word w of block i goes to words[4 * i + w].
    uint32_t lane[4][LANES];
    std::memcpy(lane[0], &c0, sizeof c0), std::memcpy(lane[1], &c1, sizeof c1);
    std::memcpy(lane[2], &c2, sizeof c2), std::memcpy(lane[3], &c3, sizeof c3);
    for (int i = 0; i < LANES; ++i)
        for (int w = 0; w < 4; ++w) words[4 * i + w] = lane[w][i];
}

// The exact noise of one word.
inline float gumbel(uint32_t word) {
    return static_cast<float>(-std::log(-std::log((static_cast<double>(word) + 0.5) * 0x1p-32)));
}

inline F32x16 to_floats(U32x16 x) {
    F32x16 y;
    for (int i = 0; i < REGISTERS; ++i) y.reg[i] = __builtin_convertvector(x.reg[i], F32x16::Register);
    return y;
}
inline F32x16 to_floats(I32x16 x) {
    F32x16 y;
    for (int i = 0; i < REGISTERS; ++i) y.reg[i] = __builtin_convertvector(x.reg[i], F32x16::Register);
    return y;
}

// log(2^e * (1 + r)) for r in [-0.293, 0.414]: the polynomial of Cephes' logf.
inline F32x16 log_from(F32x16 e, F32x16 r) {
    F32x16 p = splat(7.0376836292e-2f);
    for (float coefficient : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                              2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
        p = fma(p, r, splat(coefficient));
    const F32x16 square = r * r;
    const F32x16 log_one_plus = r + fma(p * square, r, square * -0.5f);
    return fma(e, splat(0.693147180559945f), log_one_plus);
}

// x = 2^exponent * (1 + rest) with 1 + rest in 1 / sqrt(2) .. sqrt(2).
struct Split {
    I32x16 exponent;
    F32x16 rest;
};
inline Split split(F32x16 x) {
    const I32x16 bits = bits_of<I32x16>(x), exponent = (bits - 0x3f3504f3) >> 23;
    return {exponent, bits_of<F32x16>(bits - (exponent << 23)) - 1.0f};
}

// The noise of 16 words in f32, off by less than NOISE_ERROR.
inline F32x16 gumbel_near(U32x16 words) {
    const Split u = split((to_floats(words) + 0.5f) * 0x1p-32f);
    // Near u = 1 the rest u - 1 is computed from the word, because it would be lost in the rounding of u.
    const F32x16 below_one = (to_floats(words ^ splat(0xffffffffu)) + 0.5f) * -0x1p-32f;
    const F32x16 l = splat(0.0f) - log_from(to_floats(u.exponent), select(u.exponent == 0, below_one, u.rest));
    const Split s = split(l);
    return splat(0.0f) - log_from(to_floats(s.exponent), s.rest);
}

}  // namespace reason_rl
