// Vectors of 16 numbers, bf16, and the elementary functions: the arithmetic that every CPU kernel is written
// in.
//
// `F32x16` is one register with AVX-512, two with AVX2, four on any other CPU. The operators come from the
// vector extensions of GCC and clang; intrinsics are used where the generic code would be slower.
//
// The bits of a value depend on the instruction set, never on its place in the batch. Each library is
// compiled for one instruction set (CMakeLists.txt). A loop's tail runs the same vector code on a padded
// register, not a scalar loop. The compiler must not contract a * b + c (-ffp-contract=off): multiply-adds
// are fused in fma() only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace reason_rl {

struct bf16 {
    uint16_t bits;
};

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif
constexpr int REGISTERS = 64 / REGISTER_BYTES, REGISTER_LANES = LANES / REGISTERS;

// `count` rounded up to a multiple of 16.
constexpr int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

template <class To, class From>
inline To bits_of(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class E>
struct Vec {
    typedef E Register __attribute__((vector_size(REGISTER_BYTES)));
    Register reg[REGISTERS];
};
using F32x16 = Vec<float>;
using I32x16 = Vec<int32_t>;
using U32x16 = Vec<uint32_t>;

// body(0), body(1), ... for the registers of a Vec, unrolled by hand: GCC 12 keeps `reg` in registers only if
// all its indices are constants before its loop passes run.
template <class F>
[[gnu::always_inline]] inline void each_register(F&& body) {
    body(0);
    if constexpr (REGISTERS > 1) body(1);
    if constexpr (REGISTERS > 2) body(2), body(3);
}

template <class E>
inline Vec<E> splat(E x) {
    Vec<E> y;
    each_register([&](int i) { y.reg[i] = x - typename Vec<E>::Register{}; });  // x - 0 is x, and no instruction; -0 + 0 is not -0
    return y;
}

#define RR_OPERATOR(op) \
    template <class E> inline Vec<E> operator op(Vec<E> a, Vec<E> b) { \
        each_register([&](int i) { a.reg[i] = a.reg[i] op b.reg[i]; }); \
        return a; \
    } \
    template <class E> inline Vec<E> operator op(Vec<E> a, std::type_identity_t<E> b) { return a op splat<E>(b); }
RR_OPERATOR(+) RR_OPERATOR(-) RR_OPERATOR(*) RR_OPERATOR(/) RR_OPERATOR(&) RR_OPERATOR(|) RR_OPERATOR(^)
RR_OPERATOR(<<) RR_OPERATOR(>>)
#undef RR_OPERATOR

// Comparisons set all bits of a true lane. `select` takes a lane of `a` if `which` is set there, else of `b`.
#define RR_COMPARISON(op) \
    template <class E> inline I32x16 operator op(Vec<E> a, Vec<E> b) { \
        I32x16 y; \
        each_register([&](int i) { y.reg[i] = (typename I32x16::Register)(a.reg[i] op b.reg[i]); }); \
        return y; \
    } \
    template <class E> inline I32x16 operator op(Vec<E> a, std::type_identity_t<E> b) { return a op splat<E>(b); }
RR_COMPARISON(<) RR_COMPARISON(>) RR_COMPARISON(<=) RR_COMPARISON(>=) RR_COMPARISON(==) RR_COMPARISON(!=)
#undef RR_COMPARISON

template <class E>
inline Vec<E> select(I32x16 which, Vec<E> a, Vec<E> b) {
    each_register([&](int i) { a.reg[i] = which.reg[i] ? a.reg[i] : b.reg[i]; });
    return a;
}

// Both return b if either operand is NaN.
#if defined(__AVX512F__)
inline F32x16 max(F32x16 a, F32x16 b) { return bits_of<F32x16>(_mm512_max_ps((__m512)a.reg[0], (__m512)b.reg[0])); }
inline F32x16 min(F32x16 a, F32x16 b) { return bits_of<F32x16>(_mm512_min_ps((__m512)a.reg[0], (__m512)b.reg[0])); }
#else
inline F32x16 max(F32x16 a, F32x16 b) { return select(a > b, a, b); }
inline F32x16 min(F32x16 a, F32x16 b) { return select(a < b, a, b); }
#endif

// a * b + c, rounded once with AVX-512 or FMA, twice in the portable build.
inline F32x16::Register fma(F32x16::Register a, F32x16::Register b, F32x16::Register c) {
#if defined(__AVX512F__)
    return (F32x16::Register)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (F32x16::Register)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    each_register([&](int i) { c.reg[i] = fma(a.reg[i], b.reg[i], c.reg[i]); });
    return c;
}

// ---- bf16: the upper half of an f32, rounded to nearest even. NaN stays NaN.

// Each lane's bf16 in the low 16 bits of the lane. Subnormal numbers are rounded as torch rounds them.
inline U32x16 bf16_bits_exact(F32x16 x) {
    const U32x16 bits = bits_of<U32x16>(x);
    const U32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return select((bits & 0x7fffffffu) > 0x7f800000u, (bits >> 16) | 0x40u, rounded);
}
inline U32x16 bf16_bits(F32x16 x) {  // AVX512_BF16 flushes subnormal numbers to 0
#if defined(__AVX512BF16__)
    return bits_of<U32x16>(_mm512_cvtepu16_epi32(bits_of<__m256i>(_mm512_cvtneps_pbh((__m512)x.reg[0]))));
#else
    return bf16_bits_exact(x);
#endif
}

// ---- memory: load(p) and store(p, x) move 16 elements. load(p, n) reads the first n, at most 16, and sets
// the other lanes to 0; store(p, x, n) writes the first n. bf16 is widened to f32 on load, rounded on store.

typedef uint16_t HalfRegister __attribute__((vector_size(REGISTER_BYTES / 2)));

inline F32x16 load(const float* p) {
    F32x16 x;
    each_register([&](int i) { std::memcpy(&x.reg[i], p + i * REGISTER_LANES, REGISTER_BYTES); });
    return x;
}
inline void store(float* p, F32x16 x) {
    each_register([&](int i) { std::memcpy(p + i * REGISTER_LANES, &x.reg[i], REGISTER_BYTES); });
}

inline F32x16 load(const bf16* p) {
#if defined(__AVX512F__)
    return bits_of<F32x16>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#else
    U32x16 x;
    each_register([&](int i) {
        HalfRegister half;
        std::memcpy(&half, p + i * REGISTER_LANES, sizeof half);
        x.reg[i] = __builtin_convertvector(half, U32x16::Register) << 16;
    });
    return bits_of<F32x16>(x);
#endif
}
inline void store_halves(bf16* p, U32x16 bits) {
    each_register([&](int i) {
        const HalfRegister half = __builtin_convertvector(bits.reg[i], HalfRegister);
        std::memcpy(p + i * REGISTER_LANES, &half, sizeof half);
    });
}
inline void store(bf16* p, F32x16 x) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x.reg[0]);
    std::memcpy(p, &half, sizeof half);
#else
    store_halves(p, bf16_bits(x));
#endif
}

template <class T>
inline F32x16 load(const T* p, int64_t n) {
    if (n >= LANES) return load(p);
#if defined(__AVX512F__)
    const __mmask16 first = static_cast<__mmask16>((1u << n) - 1);
    if constexpr (sizeof(T) == 4) return bits_of<F32x16>(_mm512_maskz_loadu_ps(first, p));
    else return bits_of<F32x16>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, p)), 16));
#else
    T padded[LANES] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
#endif
}

template <class T>
inline void store(T* p, F32x16 x, int64_t n) {
    if (n >= LANES) return store(p, x);
    T padded[LANES];
    store(padded, x);
#if defined(__AVX512F__)
    const __mmask16 first = static_cast<__mmask16>((1u << n) - 1);
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, first, (__m512)x.reg[0]);
    else _mm256_mask_storeu_epi16(p, first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded)));
#else
    std::memcpy(p, padded, n * sizeof(T));
#endif
}

// store() that keeps subnormal numbers, n >= 1: for roundings that torch itself does when the model runs op
// by op.
template <class T>
inline void store_as_torch(T* p, F32x16 x, int64_t n) {
    if constexpr (sizeof(T) == 4) {
        store(p, x, n);
    } else {
        T halves[LANES];
        store_halves(halves, bf16_bits_exact(x));
        std::memcpy(p, halves, (n < LANES ? n : LANES) * sizeof(T));
    }
}

// x rounded to T and widened again: the value that a later load will see.
template <class T>
inline F32x16 round_to(F32x16 x) {
    if constexpr (sizeof(T) == 4) return x;
    else return bits_of<F32x16>(bf16_bits(x) << 16);
}

// ---- lanes

inline I32x16 lane_is_below(int64_t n) {
    static constexpr int32_t PLACES[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return bits_of<I32x16>(PLACES) < static_cast<int32_t>(n < 0 ? 0 : n < LANES ? n : LANES);
}
// x in the lanes below n, `rest` in the others.
inline F32x16 keep_first(F32x16 x, int64_t n, float rest) {
    return n >= LANES ? x : select(lane_is_below(n), x, splat(rest));
}

// ---- reductions over the 16 lanes, as a fixed tree: lane i with i + 8, then i + 4, i + 2, i + 1.

typedef float Lanes8 __attribute__((vector_size(32)));
typedef float Lanes4 __attribute__((vector_size(16)));

template <class F>
inline float reduce(F32x16 x, F&& combine) {
    Lanes8 halves[2];
#if defined(__AVX512F__)
    halves[0] = (Lanes8)_mm512_castps512_ps256((__m512)x.reg[0]), halves[1] = (Lanes8)_mm512_extractf32x8_ps((__m512)x.reg[0], 1);
#else
    std::memcpy(halves, &x, sizeof halves);
#endif
    const Lanes8 eight = combine(halves[0], halves[1]);
    Lanes4 quarters[2];
    std::memcpy(quarters, &eight, sizeof quarters);
    const Lanes4 four = combine(quarters[0], quarters[1]);
    return combine(combine(four[0], four[2]), combine(four[1], four[3]));
}
inline float sum(F32x16 x) {
    return reduce(x, [](auto a, auto b) { return a + b; });
}
inline float highest(F32x16 x) {
    return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
}

// e^r for x = n ln 2 + r, |r| <= ln 2 / 2: the polynomial of degree 6 from Cephes' expf.
inline F32x16 exp_of_rest(F32x16 x, F32x16 n) {
    F32x16 r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    F32x16 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    return fma(p, r * r, r + 1.0f);
}

// e^x to within 1 ulp: e^r, scaled by 2^n. Below -87.34 (where results would be subnormal) it is exactly 0,
// above 88.72 it is infinity. NaN stays NaN.
inline F32x16 exp(F32x16 x) {
    const F32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const F32x16 clamped = min(max(x, splat(-87.5f)), splat(89.0f));
    const F32x16 shifted = fma(clamped, splat(1.44269504088896341f), magic);
    const F32x16 n = shifted - magic;
    const F32x16 p = exp_of_rest(clamped, n);
#if defined(__AVX512F__)
    F32x16 y = bits_of<F32x16>(_mm512_scalef_ps((__m512)p.reg[0], (__m512)n.reg[0]));  // p * 2^n
#else
    // 2^n as a product of two powers, so that n = 128 does not overflow before the product does.
    const I32x16 whole = bits_of<I32x16>(shifted) - 0x4B400000;
    const I32x16 half = whole >> 1;
    const F32x16 low = bits_of<F32x16>((half + 127) << 23), high = bits_of<F32x16>((whole - half + 127) << 23);
    F32x16 y = p * low * high;
#endif
    y = select(x < -87.33654f, splat(0.0f), y);
    y = select(x > 88.72284f, splat(std::numeric_limits<float>::infinity()), y);
    return select(x != x, x, y);
}

// e^x for x <= 0 (or slightly above 0 by rounding), to within 1 ulp: exactly 1 at 0, exactly 0 below -87.34;
// NaN stays NaN. About twice as fast as exp(), which also has to handle large x.
inline F32x16 exp_below(F32x16 x) {
    const F32x16 magic = splat(12583039.0f);  // 1.5 * 2^23 + 127: adding it leaves the biased exponent in the low bits
    const F32x16 shifted = fma(x, splat(1.44269504088896341f), magic);
    const F32x16 p = exp_of_rest(x, shifted - magic);
    return select(x < -87.33654f, splat(0.0f), p * bits_of<F32x16>(bits_of<I32x16>(shifted) << 23));
}

}  // namespace reason_rl
