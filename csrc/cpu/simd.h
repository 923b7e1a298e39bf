// Vectors of SGALIGN_VECTOR_BYTES bytes, written in the compiler's vector extension. One source serves every
// instruction set.
//
// Everything is in an unnamed namespace, and neither this file nor the files that include it call a template of the
// standard library. Otherwise the linker could keep an inline function compiled for AVX-512 and use it in the baseline.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kVectorBytes = SGALIGN_VECTOR_BYTES;
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class R>
struct Real;  // for R = float or double: the integer type of the same size, the lanes, and the constants of exp2

template <>
struct Real<float> {
    using Int = int32_t;
    static constexpr int lanes = kVectorBytes / 4;
    static constexpr int mantissa_bits = 23;
    static constexpr float rounder = 12582912.0f + 127;  // 1.5 * 2^23 + bias: leaves round(x) + bias in the low bits
    static constexpr float smallest_exponent = -126;
    // minimax polynomial of 2^x on [-1/2, 1/2], relative error 1.9e-9
    static constexpr float coefficients[] = {1.53458121621316296e-4f,
                                             1.33999311772397380e-3f,
                                             9.61848895633118162e-3f,
                                             5.55032877710532480e-2f,
                                             2.40226468906455207e-1f,
                                             6.93147205737197151e-1f,
                                             1.0f};
};

template <>
struct Real<double> {
    using Int = int64_t;
    static constexpr int lanes = kVectorBytes / 8;
    static constexpr int mantissa_bits = 52;
    static constexpr double rounder = 6755399441055744.0 + 1023;
    static constexpr double smallest_exponent = -1022;
    // minimax polynomial of 2^x on [-1/2, 1/2], relative error 3.1e-18
    static constexpr double coefficients[] = {4.43528270695727715e-10, 7.07410561350814280e-9, 1.01781980216719308e-7,
                                              1.32154330896763992e-6,  1.52527334899885256e-5, 1.54035304625144321e-4,
                                              1.33335581467898922e-3,  9.61812910758833524e-3, 5.55041086648199216e-2,
                                              2.40226506959101562e-1,  6.93147180559945331e-1, 1.0};
};

template <class R>
inline Vector<R> load(const R* p) {
    Vector<R> v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class R>
inline void store(R* p, Vector<R> v) {
    memcpy(p, &v, sizeof v);
}

template <class R>
inline Vector<R> broadcast(R x) {
    return x - Vector<R>{};
}

// 2^x for x up to slightly above 0. Results below the smallest normal number become 0. NaN stays NaN.
template <class R>
inline Vector<R> exp2(Vector<R> x) {
    using Int = typename Real<R>::Int;
    const Vector<R> rounded = x + Real<R>::rounder;
    const Vector<R> fraction = x - (rounded - Real<R>::rounder);
    Vector<R> power = broadcast<R>(Real<R>::coefficients[0]);
    for (int i = 1; i < int(sizeof Real<R>::coefficients / sizeof(R)); ++i)
        power = power * fraction + Real<R>::coefficients[i];
    // This multiplies instead of adding to the exponent, because a product keeps NaN.
    power *= (Vector<R>)((Vector<Int>)rounded << Real<R>::mantissa_bits);
    return x < Real<R>::smallest_exponent ? Vector<R>{} : power;
}

// Combine all lanes into one number. The halves of the vector are combined until 16 bytes are left, then the lanes one
// after the other.
template <class R, class Combine, int bytes = kVectorBytes>
inline R reduce_lanes(const R* lanes, Combine combine) {
    if constexpr (bytes > 16) {
        typedef R Half __attribute__((vector_size(bytes / 2)));
        Half low, high;
        memcpy(&low, lanes, sizeof low);
        memcpy(&high, lanes + bytes / 2 / sizeof(R), sizeof high);
        const Half both = combine(low, high);
        return reduce_lanes<R, Combine, bytes / 2>((const R*)&both, combine);
    } else {
        R result = lanes[0];
        for (int i = 1; i < int(bytes / sizeof(R)); ++i) result = combine(result, lanes[i]);
        return result;
    }
}

template <class R>
inline R largest_lane(Vector<R> v) {
    return reduce_lanes<R>((const R*)&v, [](auto a, auto b) { return a > b ? a : b; });
}

template <class R>
inline R sum_lanes(Vector<R> v) {
    return reduce_lanes<R>((const R*)&v, [](auto a, auto b) { return a + b; });
}

// libm's functions in the precision of the argument
inline float exp2_scalar(float x) { return __builtin_exp2f(x); }
inline double exp2_scalar(double x) { return __builtin_exp2(x); }
inline float log2_scalar(float x) { return __builtin_log2f(x); }
inline double log2_scalar(double x) { return __builtin_log2(x); }

// The products of the low 32 bits of 64-bit lanes. Compilers do not find the instruction for this without intrinsics.
inline Vector<uint64_t> multiply_words(Vector<uint64_t> a, Vector<uint64_t> b) {
#if defined(__AVX512F__) && SGALIGN_VECTOR_BYTES == 64
    return (Vector<uint64_t>)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && SGALIGN_VECTOR_BYTES == 32
    return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && SGALIGN_VECTOR_BYTES == 16
    return (Vector<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Storage types. Arithmetic uses double for double, and float for all other types.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class To, class From>
inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

template <class T>
struct Storage {
    using R = T;
    static R read(T x) { return x; }
    static T write(R x) { return x; }
};

template <>
struct Storage<BFloat16> {
    using R = float;
    static float read(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
    static BFloat16 write(float x) {
        const uint32_t bits = bits_as<uint32_t>(x);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
        return {uint16_t(x != x ? (bits >> 16 | 0x40) : rounded)};
    }
};

template <>
struct Storage<Half> {
    using R = float;
    static float read(Half x) {
        // No step reads or produces a subnormal float, because a thread may be set to flush those to zero.
        const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;  // the exponent is too small by 112
        const uint32_t normal = magnitude + (112u << 23), special = magnitude | 0x7f800000u;
        const uint32_t small = bits_as<uint32_t>(float(x.bits & 0x3ff) * 0x1p-24f);
        uint32_t bits = magnitude < 0x400u << 13 ? small : normal;
        bits = magnitude >= 0x7c00u << 13 ? special : bits;
        return bits_as<float>(bits | uint32_t(x.bits & 0x8000) << 16);
    }
    static Half write(float x) {
        const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7fffffff;
        const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
        // Below 2^-14, float16 numbers are 2^-24 apart. The addition of 1/2 rounds to a multiple of that.
        const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
        uint32_t half = magnitude < 0x38800000u ? small : normal;
        half = magnitude >= 0x477ff000u ? 0x7c00 : half;  // 65520 and above round to infinity
        half = magnitude > 0x7f800000u ? 0x7e00 : half;
        return {uint16_t(half | (bits >> 16 & 0x8000))};
    }
};

}  // namespace
