// 32-byte vectors of fp32 or fp64, written with the vector extensions of GCC and Clang: these
// compile for any processor, with whatever width it has.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if !defined(__GNUC__)
#error "co_detr needs GCC or Clang: its CPU kernels are written with their vector extensions"
#endif

#define CO_DETR_INLINE inline __attribute__((always_inline))
#define CO_DETR_INLINE_LAMBDA __attribute__((always_inline))

namespace co_detr {

template <typename T>
using IntLike = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <typename T>
struct Simd {
  static constexpr int lanes = 32 / sizeof(T);
  typedef T Vector __attribute__((vector_size(32)));
  typedef IntLike<T> Ints __attribute__((vector_size(32)));
  typedef T Quad __attribute__((vector_size(4 * sizeof(T))));
};

template <typename T>
CO_DETR_INLINE typename Simd<T>::Vector load(const T* from) {
  typename Simd<T>::Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename T>
CO_DETR_INLINE void store(T* to, const typename Simd<T>::Vector& vector) {
  std::memcpy(to, &vector, sizeof(vector));
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

}  // namespace co_detr
