// Sixteen numbers at a time, on any CPU, and bf16: what the kernels are written in.
//
// `F32x16` is one register where AVX-512 is, two with AVX2, four elsewhere; GCC's and clang's vector extensions give the operators.
// Only the fused multiply-add, the bf16 dot product (gemm.cpp) and the rounding to bf16 have an instruction of their own where the
// file is compiled for it. Each build is for one instruction set (CMakeLists.txt), so a value's bits depend on the machine, never
// on where in a batch it stands: no loop has a scalar tail of other code; tails go through the same vector code, padded.
// The build turns contraction off (-ffp-contract=off): a multiply-add is fused where fma() says so and nowhere else.
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
constexpr int PARTS = 64 / REGISTER_BYTES, PART_LANES = LANES / PARTS;

// `count`, rounded up to a whole number of vectors.
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
    typedef E Part __attribute__((vector_size(REGISTER_BYTES)));
    Part part[PARTS];
};
using F32x16 = Vec<float>;
using I32x16 = Vec<int32_t>;
using U32x16 = Vec<uint32_t>;

// body(0), body(1) ... for the registers of a Vec, written out: GCC 12 keeps `part` in registers only where every index is a
// constant before it looks at loops.
template <class F>
[[gnu::always_inline]] inline void each_part(F&& body) {
    body(0);
    if constexpr (PARTS > 1) body(1);
    if constexpr (PARTS > 2) body(2), body(3);
}

template <class E>
inline Vec<E> splat(E x) {
    Vec<E> y;
    each_part([&](int i) { y.part[i] = x - typename Vec<E>::Part{}; });  // x - 0 is x, and no instruction; -0 + 0 is not -0
    return y;
}

#define RR_OPERATOR(op) \
    template <class E> inline Vec<E> operator op(Vec<E> a, Vec<E> b) { \
        each_part([&](int i) { a.part[i] = a.part[i] op b.part[i]; }); \
        return a; \
    } \
    template <class E> inline Vec<E> operator op(Vec<E> a, std::type_identity_t<E> b) { return a op splat<E>(b); }
RR_OPERATOR(+) RR_OPERATOR(-) RR_OPERATOR(*) RR_OPERATOR(/) RR_OPERATOR(&) RR_OPERATOR(|) RR_OPERATOR(<<) RR_OPERATOR(>>)
#undef RR_OPERATOR

// Comparisons: all bits of a lane set where true. `select` takes the first where they are.
#define RR_COMPARISON(op) \
    template <class E> inline I32x16 operator op(Vec<E> a, Vec<E> b) { \
        I32x16 y; \
        each_part([&](int i) { y.part[i] = (typename I32x16::Part)(a.part[i] op b.part[i]); }); \
        return y; \
    } \
    template <class E> inline I32x16 operator op(Vec<E> a, std::type_identity_t<E> b) { return a op splat<E>(b); }
RR_COMPARISON(<) RR_COMPARISON(>) RR_COMPARISON(<=) RR_COMPARISON(>=) RR_COMPARISON(==) RR_COMPARISON(!=)
#undef RR_COMPARISON

template <class E>
inline Vec<E> select(I32x16 which, Vec<E> a, Vec<E> b) {
    each_part([&](int i) { a.part[i] = which.part[i] ? a.part[i] : b.part[i]; });
    return a;
}

// The second where either is NaN.
#if defined(__AVX512F__)
inline F32x16 max(F32x16 a, F32x16 b) { return bits_of<F32x16>(_mm512_max_ps((__m512)a.part[0], (__m512)b.part[0])); }
inline F32x16 min(F32x16 a, F32x16 b) { return bits_of<F32x16>(_mm512_min_ps((__m512)a.part[0], (__m512)b.part[0])); }
#else
inline F32x16 max(F32x16 a, F32x16 b) { return select(a > b, a, b); }
inline F32x16 min(F32x16 a, F32x16 b) { return select(a < b, a, b); }
#endif

inline F32x16::Part fma(F32x16::Part a, F32x16::Part b, F32x16::Part c) {  // a * b + c, rounded once where the CPU can
#if defined(__AVX512F__)
    return (F32x16::Part)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (F32x16::Part)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    each_part([&](int i) { c.part[i] = fma(a.part[i], b.part[i], c.part[i]); });
    return c;
}

// ---- bf16: the upper half of a float, rounded to nearest even; NaN stays NaN.

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_of<float>(static_cast<uint32_t>(x.bits) << 16); }

// The 16 bits of each lane's bf16, in the low half.
inline U32x16 bf16_bits_exact(F32x16 x) {
    const U32x16 bits = bits_of<U32x16>(x);
    const U32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return select((bits & 0x7fffffffu) > 0x7f800000u, (bits >> 16) | 0x40u, rounded);
}
inline U32x16 bf16_bits(F32x16 x) {  // by the CPU's instruction where it has one: that takes subnormal numbers for 0
#if defined(__AVX512BF16__)
    return bits_of<U32x16>(_mm512_cvtepu16_epi32(bits_of<__m256i>(_mm512_cvtneps_pbh((__m512)x.part[0]))));
#else
    return bf16_bits_exact(x);
#endif
}

// ---- memory. `load(p)` reads 16 elements; `load(p, n)` the first n with zeros behind, all 16 where n is larger. Stores alike.
// bf16 is widened and rounded on the way.

typedef uint16_t HalfPart __attribute__((vector_size(REGISTER_BYTES / 2)));

inline F32x16 load(const float* p) {
    F32x16 x;
    each_part([&](int i) { std::memcpy(&x.part[i], p + i * PART_LANES, REGISTER_BYTES); });
    return x;
}
inline void store(float* p, F32x16 x) {
    each_part([&](int i) { std::memcpy(p + i * PART_LANES, &x.part[i], REGISTER_BYTES); });
}

inline F32x16 load(const bf16* p) {
#if defined(__AVX512F__)
    return bits_of<F32x16>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#else
    U32x16 x;
    each_part([&](int i) {
        HalfPart half;
        std::memcpy(&half, p + i * PART_LANES, sizeof half);
        x.part[i] = __builtin_convertvector(half, U32x16::Part) << 16;
    });
    return bits_of<F32x16>(x);
#endif
}
inline void store_halves(bf16* p, U32x16 bits) {
    each_part([&](int i) {
        const HalfPart half = __builtin_convertvector(bits.part[i], HalfPart);
        std::memcpy(p + i * PART_LANES, &half, sizeof half);
    });
}
inline void store(bf16* p, F32x16 x) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x.part[0]);
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
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, first, (__m512)x.part[0]);
    else _mm256_mask_storeu_epi16(p, first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded)));
#else
    std::memcpy(p, padded, n * sizeof(T));
#endif
}

// The same for n >= 1 with subnormal numbers kept, for what torch itself rounds in the op-by-op form.
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

// x as it reads after being stored as T and loaded again.
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

// ---- reductions: a fixed tree over the 16 lanes.

typedef float Lanes8 __attribute__((vector_size(32)));
typedef float Lanes4 __attribute__((vector_size(16)));

template <class F>
inline float reduce(F32x16 x, F&& both) {  // lane i with lane i + 8, then i + 4, i + 2, i + 1
    Lanes8 halves[2];
#if defined(__AVX512F__)
    halves[0] = (Lanes8)_mm512_castps512_ps256((__m512)x.part[0]), halves[1] = (Lanes8)_mm512_extractf32x8_ps((__m512)x.part[0], 1);
#else
    std::memcpy(halves, &x, sizeof halves);
#endif
    const Lanes8 eight = both(halves[0], halves[1]);
    Lanes4 quarters[2];
    std::memcpy(quarters, &eight, sizeof quarters);
    const Lanes4 four = both(quarters[0], quarters[1]);
    return both(both(four[0], four[2]), both(four[1], four[3]));
}
inline float sum(F32x16 x) {
    return reduce(x, [](auto a, auto b) { return a + b; });
}
inline float highest(F32x16 x) {
    return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
}

// e^r of x = n ln 2 + r with |r| <= ln 2 / 2, by a polynomial of degree 6: Cephes expf.
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

// exp to within 1 ulp: n of the above goes into the exponent. Below -87.3 (the smallest normal float) the result is exactly 0,
// above 88.7 infinity; NaN stays NaN.
inline F32x16 exp(F32x16 x) {
    const F32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const F32x16 clamped = min(max(x, splat(-87.5f)), splat(89.0f));
    const F32x16 shifted = fma(clamped, splat(1.44269504088896341f), magic);
    const F32x16 n = shifted - magic;
    const F32x16 p = exp_of_rest(clamped, n);
#if defined(__AVX512F__)
    F32x16 y = bits_of<F32x16>(_mm512_scalef_ps((__m512)p.part[0], (__m512)n.part[0]));  // p * 2^n
#else
    // 2^n in two halves, so that n = 128 does not overflow before the product does.
    const I32x16 whole = bits_of<I32x16>(shifted) - 0x4B400000;
    const I32x16 half = whole >> 1;
    const F32x16 low = bits_of<F32x16>((half + 127) << 23), high = bits_of<F32x16>((whole - half + 127) << 23);
    F32x16 y = p * low * high;
#endif
    y = select(x < -87.33654f, splat(0.0f), y);
    y = select(x > 88.72284f, splat(std::numeric_limits<float>::infinity()), y);
    return select(x != x, x, y);
}

// exp for x <= 0 (and a rounding above it), to within 1 ulp: exactly 1 at 0, exactly 0 below -87.3; NaN stays NaN. It is exp
// without the care for large x, which costs as much as the rest.
inline F32x16 exp_below(F32x16 x) {
    const F32x16 magic = splat(12583039.0f);  // 1.5 * 2^23 + 127: adding it leaves the biased exponent in the low bits
    const F32x16 shifted = fma(x, splat(1.44269504088896341f), magic);
    const F32x16 p = exp_of_rest(x, shifted - magic);
    return select(x < -87.33654f, splat(0.0f), p * bits_of<F32x16>(bits_of<I32x16>(shifted) << 23));
}

}  // namespace reason_rl
