// Elements one or a vector at a time: loads and stores of all floating types, sums, activations.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace syncbn {

// -- elements, one or a vector at a time -----------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// As wide as the machine's vectors: compilers handle wider ones through memory.
#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int64_t VECTOR_BYTES = 32;
#else
constexpr int64_t VECTOR_BYTES = 16;
#endif
constexpr int64_t LEAST_VECTOR_BYTES = 16;

template <class S, int64_t N>
struct Packed {
  typedef S type __attribute__((vector_size(N * sizeof(S))));
};

// Of a scalar or a vector: its scalar, and vectors of as many integers of its size, short integers and floats.
template <class V>
struct Lanes {
  using Scalar = std::decay_t<decltype(V{}[0])>;
  static constexpr int64_t number = sizeof(V) / sizeof(Scalar);
  using Word = typename Packed<std::conditional_t<sizeof(Scalar) == 8, uint64_t, uint32_t>, number>::type;
  using Short = typename Packed<uint16_t, number>::type;
  using Narrow = typename Packed<float, number>::type;
};
template <>
struct Lanes<float> {
  using Scalar = float;
  static constexpr int64_t number = 1;
  using Word = uint32_t;
  using Short = uint16_t;
  using Narrow = float;
};
template <>
struct Lanes<double> {
  using Scalar = double;
  static constexpr int64_t number = 1;
  using Word = uint64_t;
  using Short = uint16_t;
  using Narrow = float;
};

template <class V>
constexpr int64_t width = Lanes<V>::number;
template <class T>
using Scalar = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class A>
using Vector = typename Packed<A, VECTOR_BYTES / sizeof(A)>::type;

// A vector of half the width, or a scalar if that would be shorter than any of the machine's vectors.
template <class V>
using Narrower = typename std::conditional_t<(sizeof(V) > LEAST_VECTOR_BYTES),
                                             Packed<typename Lanes<V>::Scalar, width<V> / 2>,
                                             std::common_type<typename Lanes<V>::Scalar>>::type;

// Calls f with a value of the widest type that n elements fill: a vector, one of the shortest vectors, or a scalar.
template <class V, class F>
INLINE void widest(int64_t n, F f) {
  using Scalar = typename Lanes<V>::Scalar;
  using Least = typename Packed<Scalar, LEAST_VECTOR_BYTES / sizeof(Scalar)>::type;
  if (n >= width<V>)
    f(V{});
  else if (n >= width<Least>)
    f(Least{});
  else
    f(Scalar{});
}

template <class To, class From>
INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class To, class From>
INLINE To convert(From from) {
  if constexpr (std::is_arithmetic_v<To>)
    return static_cast<To>(from);
  else
    return __builtin_convertvector(from, To);
}

// What follows has instructions that GCC does not find, or does not use for vectors as wide as these.
template <class Word, class Short>
INLINE Word words_of(Short h) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Word) == 64) return bits<Word>(_mm512_cvtepu16_epi32(bits<__m256i>(h)));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Word) == 32) return bits<Word>(_mm256_cvtepu16_epi32(bits<__m128i>(h)));
  if constexpr (sizeof(Word) == 16) return bits<Word>(_mm_cvtepu16_epi32(__m128i{bits<int64_t>(h), 0}));
#endif
  return convert<Word>(h);
}

// Of words that are less than 2^16.
template <class Short, class Word>
INLINE Short shorts_of(Word words) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Word) == 64) return bits<Short>(_mm512_cvtepi32_epi16(bits<__m512i>(words)));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Word) == 32) {
    const __m256i all = bits<__m256i>(words);
    return bits<Short>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
  }
  if constexpr (sizeof(Word) == 16) return bits<Short>(_mm_packus_epi32(bits<__m128i>(words), __m128i{})[0]);
#endif
  return convert<Short>(words);
}

template <class Wide, class Narrow>
INLINE Wide doubles_of(Narrow floats) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Wide) == 64) return _mm512_cvtps_pd(floats);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Wide) == 32) return _mm256_cvtps_pd(floats);
#endif
  return convert<Wide>(floats);
}

template <class V>
INLINE V spread(typename Lanes<V>::Scalar value) {
  return V{} + value;
}

// Ones in the bits of the last lanes, zeros in the others.
template <class V>
INLINE V last_lanes(int64_t number) {
  using Word = typename Lanes<V>::Word;
  using Element = std::conditional_t<sizeof(typename Lanes<V>::Scalar) == 8, uint64_t, uint32_t>;
  constexpr int64_t n = width<V>;
  static constexpr struct Table {
    Element of[2 * n] = {};
    constexpr Table() {
      for (int64_t i = n; i < 2 * n; ++i) of[i] = ~Element(0);
    }
  } table;
  Word mask;
  std::memcpy(&mask, table.of + number, sizeof(mask));
  return bits<V>(mask);
}

// The value where the mask has ones, else 0.
template <class V>
INLINE V masked(V value, V mask) {
  using Word = typename Lanes<V>::Word;
  return bits<V>(Word(bits<Word>(value) & bits<Word>(mask)));
}

template <class V>
INLINE V widen(BFloat16, typename Lanes<V>::Short h) {
  return bits<V>(words_of<typename Lanes<V>::Word>(h) << 16);
}

template <class V>
INLINE V widen(Float16, typename Lanes<V>::Short h) {
#if defined(__AVX512F__)
  if constexpr (width<V> == 16) return _mm512_cvtph_ps(bits<__m256i>(h));
#endif
#if defined(__F16C__) && defined(__AVX2__)
  if constexpr (width<V> == 8) return _mm256_cvtph_ps(bits<__m128i>(h));
  if constexpr (width<V> == 4) return _mm_cvtph_ps(__m128i{bits<int64_t>(h), 0});
  if constexpr (width<V> == 1) return _cvtsh_ss(h);
#endif
  using Word = typename Lanes<V>::Word;
  Word u = words_of<Word>(h), exponent = u & 0x7c00, rest = (u & 0x7fff) << 13;
  // Without subnormal numbers of the arithmetic, because a process may flush them to 0.
  V subnormal = bits<V>(Word(rest + 0x38800000)) - 0x1p-14f;
  Word value = exponent == 0 ? bits<Word>(subnormal) : Word(rest + 0x38000000);
  value = exponent == 0x7c00 ? Word(rest | 0x7f800000) : value;
  return bits<V>(Word(value | (u & 0x8000) << 16));
}

// To the nearest, ties to even.
template <class V>
INLINE typename Lanes<V>::Short narrow(BFloat16, V value) {
  using Word = typename Lanes<V>::Word;
  Word u = bits<Word>(value);
  Word rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  Word nan = (u >> 16) | 0x40;
  return shorts_of<typename Lanes<V>::Short>(Word((u & 0x7fffffff) > 0x7f800000 ? nan : rounded));
}

template <class V>
INLINE typename Lanes<V>::Short narrow(Float16, V value) {
  using Word = typename Lanes<V>::Word;
  using Short = typename Lanes<V>::Short;
#if defined(__AVX512F__)
  if constexpr (width<V> == 16) return bits<Short>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__) && defined(__AVX2__)
  if constexpr (width<V> == 8) return bits<Short>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  if constexpr (width<V> == 4) return bits<Short>(_mm_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)[0]);
  if constexpr (width<V> == 1) return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#endif
  Word u = bits<Word>(value), magnitude = u & 0x7fffffff;
  Word normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  Word subnormal = bits<Word>(V(bits<V>(magnitude) + 0.5f)) - 0x3f000000;
  Word result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x47800000 ? Word{} + 0x7c00 : result;
  result = magnitude > 0x7f800000 ? Word{} + 0x7e00 : result;
  return shorts_of<Short>(Word(result | (u >> 16 & 0x8000)));
}

template <class V, class T>
INLINE V load(const T* from) {
  if constexpr (std::is_same_v<typename Lanes<V>::Scalar, double> && !std::is_same_v<T, double>) {
    return doubles_of<V>(load<typename Lanes<V>::Narrow>(from));
  } else if constexpr (std::is_floating_point_v<T>) {
    V value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  } else {
    typename Lanes<V>::Short h;
    std::memcpy(&h, from, sizeof(h));
    return widen<V>(T{}, h);
  }
}

template <class V, class T>
INLINE void store(T* to, V value) {
  if constexpr (std::is_floating_point_v<T>) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    auto h = narrow<V>(T{}, value);
    std::memcpy(to, &h, sizeof(h));
  }
}

template <class V, size_t... I>
INLINE Narrower<V> upper_half(V v, std::index_sequence<I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(v, v, (I + sizeof...(I))...);
#else
  Narrower<V> half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof(half), sizeof(half));
  return half;
#endif
}
template <class V, size_t... I>
INLINE Narrower<V> lower_half(V v, std::index_sequence<I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(v, v, I...);
#else
  Narrower<V> half;
  std::memcpy(&half, &v, sizeof(half));
  return half;
#endif
}

// The sum of a vector's elements.
template <class V>
INLINE typename Lanes<V>::Scalar total(V v) {
  if constexpr (std::is_arithmetic_v<V>) {
    return v;
  } else if constexpr (std::is_arithmetic_v<Narrower<V>>) {
    typename Lanes<V>::Scalar sum = v[0] + v[width<V> / 2];
    for (int64_t i = 1; i < width<V> / 2; ++i) sum += v[i] + v[i + width<V> / 2];
    return sum;
  } else {
    constexpr std::make_index_sequence<width<V> / 2> half;
    return total(Narrower<V>(lower_half(v, half) + upper_half(v, half)));
  }
}

// -- activations -----------------------------------------------------------------------------------------------------

enum Activation : int64_t { NONE, RELU, LEAKY_RELU, SILU };

template <class A>
struct Exp;
template <>
struct Exp<float> {
  static constexpr int DEGREE = 7, MANTISSA = 23;
  static constexpr float LEAST = -87, MOST = 88, HIGH = 0.693145751953125f, LOW = 1.42860677e-6f;
  static constexpr float MAGIC = 0x1.8p23f;
};
template <>
struct Exp<double> {
  static constexpr int DEGREE = 13, MANTISSA = 52;
  static constexpr double LEAST = -708, MOST = 709, HIGH = 0x1.62e42feep-1, LOW = 0x1.a39ef35793c76p-33;
  static constexpr double MAGIC = 0x1.8p52;
};

// exp(x) = 2^k * exp(r), |r| <= log(2)/2, by the Taylor polynomial of exp(r), to a few roundings. log(2) has two parts; k
// times the first is exact. Adding MAGIC to a value rounds it to an integer in its lowest bits. NaN stays NaN, values above
// MOST give infinity, and values below LEAST give exp(LEAST).
template <class V>
INLINE V exponential(V x) {
  using A = typename Lanes<V>::Scalar;
  using Word = typename Lanes<V>::Word;
  using E = Exp<A>;
  const V least = spread<V>(E::LEAST), most = spread<V>(E::MOST), infinite = spread<V>(__builtin_inf());
  const auto is_large = x > most;
  x = x < least ? least : x;
  x = is_large ? most : x;
  const V shifted = x * A(1.4426950408889634) + E::MAGIC;
  const V k = shifted - E::MAGIC;
  const V r = (x - k * E::HIGH) - k * E::LOW;
  V p = spread<V>(1);  // Horner's rule: 1 + r (1 + r/2 (1 + r/3 (...)))
  for (int n = E::DEGREE; n > 0; --n) p = p * r * A(1.0 / n) + 1;
  const Word one = bits<Word>(spread<V>(1));
  return is_large ? infinite : V(p * bits<V>(Word((bits<Word>(shifted) << E::MANTISSA) + one)));
}

template <class V>
INLINE V activate(V z, Activation activation, typename Lanes<V>::Scalar negative_slope) {
  const V zero{};
  if (activation == RELU) return z < zero ? zero : z;  // NaN stays
  if (activation == LEAKY_RELU) return z > zero ? z : z * negative_slope;
  if (activation == SILU) return z / (exponential(V(-z)) + 1);
  return z;
}

template <class V>
INLINE V activation_grad(V dy, V z, Activation activation, typename Lanes<V>::Scalar negative_slope) {
  const V zero{};
  if (activation == RELU) return z <= zero ? zero : dy;  // as in torch, also where z is NaN
  if (activation == LEAKY_RELU) return z > zero ? dy : dy * negative_slope;
  if (activation == SILU) {
    V s = 1 / (exponential(V(-z)) + 1);
    return dy * (s * (1 + z * (1 - s)));
  }
  return dy;
}

}  // namespace syncbn
