// 32-byte vectors of fp32 or fp64, written with the vector extensions of GCC and Clang: these
// compile for any processor, with whatever width it has. bf16 is widened while it is loaded.
#pragma once

#include "ms_deform_attn_cpu.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

#if !defined(__GNUC__)
#error "co_detr needs GCC or Clang: its CPU kernels are written with their vector extensions"
#endif

#define CO_DETR_INLINE inline __attribute__((always_inline))
#define CO_DETR_INLINE_LAMBDA __attribute__((always_inline))

// One library for every x86-64: the loader picks the clone that suits the processor.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && \
    !defined(CO_DETR_ONE_VERSION)
#if __GNUC__ >= 12
#define CO_DETR_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // cannot name a level, nor two features at once: AVX2 without FMA
#define CO_DETR_MULTIVERSION __attribute__((target_clones("avx2", "default")))
#endif
#else
#define CO_DETR_MULTIVERSION
#endif

namespace co_detr {

template <typename T>
struct Simd {
  static constexpr int lanes = 32 / sizeof(T);
  typedef T Vector __attribute__((vector_size(32)));
  typedef IntLike<T> Ints __attribute__((vector_size(32)));
  typedef T Quad __attribute__((vector_size(4 * sizeof(T))));
};

template <typename V>
CO_DETR_INLINE typename Simd<SumOf<V>>::Vector load(const V* from) {
  typename Simd<SumOf<V>>::Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(32)));

template <typename To, typename From>
CO_DETR_INLINE To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

CO_DETR_INLINE Simd<float>::Vector load(const c10::BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return same_bits<Simd<float>::Vector>(__builtin_convertvector(halves, Words) << 16);
}

template <typename V>
CO_DETR_INLINE void store(V* to, const typename Simd<SumOf<V>>::Vector& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// bf16 in the upper half of each word, rounded to nearest with ties to even; NaN stays NaN.
CO_DETR_INLINE Words round_to_bf16(const Simd<float>::Vector& vector) {
  const Words words = same_bits<Words>(vector), not_a_number = (Words)(vector != vector);
  const Words rounded = words + 0x7fff + ((words >> 16) & 1);
  return (rounded & ~not_a_number) | (0x7fc00000 & not_a_number);
}

CO_DETR_INLINE void store(c10::BFloat16* to, const Simd<float>::Vector& vector) {
  const Halves halves = __builtin_convertvector(round_to_bf16(vector) >> 16, Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

// Several vectors of neighboring channels, in an order that only store_block has to know: bf16 is
// split into even and odd channels, which takes a shift and a mask and no slow widening.
template <int vectors, typename V>
CO_DETR_INLINE void load_block(
    const V* from, typename Simd<SumOf<V>>::Vector (&block)[vectors]) {
  constexpr int lanes = Simd<SumOf<V>>::lanes;
  if constexpr (sizeof(V) == 2 && vectors % 2 == 0) {
    for (int v = 0; v < vectors; v += 2) {
      Words words;
      std::memcpy(&words, from + v * lanes, sizeof(words));
      block[v] = same_bits<Simd<float>::Vector>(words << 16);
      block[v + 1] = same_bits<Simd<float>::Vector>(words & 0xffff0000);
    }
  } else {
    for (int v = 0; v < vectors; ++v) {
      block[v] = load(from + v * lanes);
    }
  }
}

template <int vectors, typename V>
CO_DETR_INLINE void store_block(
    V* to, const typename Simd<SumOf<V>>::Vector (&block)[vectors]) {
  constexpr int lanes = Simd<SumOf<V>>::lanes;
  if constexpr (sizeof(V) == 2 && vectors % 2 == 0) {
    for (int v = 0; v < vectors; v += 2) {
      const Words words =
          (round_to_bf16(block[v]) >> 16) | (round_to_bf16(block[v + 1]) & 0xffff0000);
      std::memcpy(to + v * lanes, &words, sizeof(words));
    }
  } else {
    for (int v = 0; v < vectors; ++v) {
      store(to + v * lanes, block[v]);
    }
  }
}

// Sums of four vectors at once: sums[i] = sum of the lanes of corner[i].
template <typename T>
CO_DETR_INLINE typename Simd<T>::Quad lane_sums(const typename Simd<T>::Vector (&corner)[4]) {
  typedef typename Simd<T>::Quad Quad;
  Quad half[4];
  for (int i = 0; i < 4; ++i) {
    if constexpr (Simd<T>::lanes == 8) {
      Quad high;
      std::memcpy(&half[i], &corner[i], sizeof(Quad));
      std::memcpy(&high, reinterpret_cast<const char*>(&corner[i]) + sizeof(Quad), sizeof(Quad));
      half[i] += high;
    } else {
      std::memcpy(&half[i], &corner[i], sizeof(Quad));
    }
  }
  const Quad &a = half[0], &b = half[1], &c = half[2], &d = half[3];
  const Quad ab = Quad{a[0], b[0], a[1], b[1]} + Quad{a[2], b[2], a[3], b[3]};
  const Quad cd = Quad{c[0], d[0], c[1], d[1]} + Quad{c[2], d[2], c[3], d[3]};
  return Quad{ab[0], ab[1], cd[0], cd[1]} + Quad{ab[2], ab[3], cd[2], cd[3]};
}

// Locations (x, y), (x, y), ... of one vector of points -> all x, all y.
template <typename T>
CO_DETR_INLINE void load_locations(
    const T* from, typename Simd<T>::Vector& x, typename Simd<T>::Vector& y) {
  typedef typename Simd<T>::Vector Vector;
  const Vector a = load(from), b = load(from + Simd<T>::lanes);
  if constexpr (Simd<T>::lanes == 8) {
    x = Vector{a[0], a[2], a[4], a[6], b[0], b[2], b[4], b[6]};
    y = Vector{a[1], a[3], a[5], a[7], b[1], b[3], b[5], b[7]};
  } else {
    x = Vector{a[0], a[2], b[0], b[2]};
    y = Vector{a[1], a[3], b[1], b[3]};
  }
}

// Calls body(std::integral_constant<vectors>, channel) over all channels, at most ``most`` vectors
// at a time; 0 vectors = one scalar.
template <typename T, int most, typename Body>
CO_DETR_INLINE void for_channel_blocks(int64_t channels, const Body& body) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t channel = 0;
  for (; channel + most * lanes <= channels; channel += most * lanes) {
    body(std::integral_constant<int, most>(), channel);
  }
  for (; channel + lanes <= channels; channel += lanes) {
    body(std::integral_constant<int, 1>(), channel);
  }
  for (; channel < channels; ++channel) {
    body(std::integral_constant<int, 0>(), channel);
  }
}

}  // namespace co_detr
