// The operations on each element, and their coefficients.

#pragma once

#include <vector>

#include "call.h"

namespace syncbn {

// The coefficients of some channels of one group: computed in double and rounded once.
template <class A>
struct Coefficients {
  explicit Coefficients(int64_t n) : n(n), wide(2 * n), narrow(5 * n) {}

  const int64_t n;
  std::vector<double> wide;
  std::vector<A> narrow;

  A* centre() { return narrow.data(); }
  A* slope() { return narrow.data() + n; }
  A* constant() { return narrow.data() + 2 * n; }
  A* slope_x() { return narrow.data() + 3 * n; }
  A* constant_x() { return narrow.data() + 4 * n; }

  // The normalized value is slope * (x - centre) + constant. The centre is the rounded mean, so that the difference is
  // exact for values near it; the constant contains the rest of the mean.
  void for_normalizing(const Call& call, int64_t group, int64_t first) {
    double *scale = wide.data(), *shift = scale + n;
    call.scale.row(group, first, n, 1, scale);
    call.shift.row(group, first, n, 0, shift);
    if (call.r != nullptr)
      for (int64_t i = 0, at = group * call.channels + first; i < n; ++i, ++at) {
        shift[i] += scale[i] * call.d[at];
        scale[i] *= call.r[at];
      }
    const double* mean = call.mean + group * call.channels + first;
    const double* invstd = call.invstd + group * call.channels + first;
    for (int64_t i = 0; i < n; ++i) {
      const double s = scale[i] * invstd[i];
      const A high = static_cast<A>(mean[i]);
      centre()[i] = high;
      slope()[i] = static_cast<A>(s);
      constant()[i] = static_cast<A>(shift[i] - (mean[i] - high) * s);
    }
  }

  // The gradient is slope * dz + slope_x * (x - centre) + constant_x, from the group's means of scale * dz and of
  // scale * dz * xhat if these are given, else from the sums.
  void for_gradient(const Call& call, int64_t group, int64_t first) {
    for_normalizing(call, group, first);
    const int64_t at = group * call.channels + first;
    const bool averaged = call.means != nullptr;
    const double* of_dz = (averaged ? call.means : call.sums) + at + group * call.channels;
    const double* of_dz_xhat = of_dz + call.channels;
    const double count = averaged ? 1 : std::max(call.count[group], 1.0);
    for (int64_t i = 0; i < n; ++i) {
      const double factor = averaged ? 1 : wide[i] / count, invstd = call.invstd[at + i];
      const double s = -invstd * invstd * of_dz_xhat[i] * factor;
      slope_x()[i] = static_cast<A>(s);
      constant_x()[i] = static_cast<A>(-invstd * of_dz[i] * factor - s * (call.mean[at + i] - centre()[i]));
    }
  }
};

// The coefficients of one vector (or scalar) of elements.
template <class V>
struct Line {
  V centre, slope, constant, slope_x, constant_x;

  template <class A>
  static INLINE Line of_channel(Coefficients<A>& k, int64_t c) {
    return {spread<V>(k.centre()[c]), spread<V>(k.slope()[c]), spread<V>(k.constant()[c]), spread<V>(k.slope_x()[c]),
            spread<V>(k.constant_x()[c])};
  }
  template <class A>
  static INLINE Line from_channel(Coefficients<A>& k, int64_t c) {
    return {load<V>(k.centre() + c), load<V>(k.slope() + c), load<V>(k.constant() + c), load<V>(k.slope_x() + c),
            load<V>(k.constant_x() + c)};
  }
};

// Pointers to x and the other tensors, and the epilogue. If PLAIN, there is none, so loops need not ask.
template <class T, bool PLAIN>
struct Run {
  using A = Scalar<T>;
  const T *x, *dy, *residual;
  T *dz, *out;
  Activation activation;
  A negative_slope;

  explicit Run(const Call& call)
      : x(static_cast<const T*>(call.x)), dy(static_cast<const T*>(call.grad_output)),
        residual(static_cast<const T*>(call.residual)), dz(static_cast<T*>(call.dz)), out(static_cast<T*>(call.out)),
        activation(static_cast<Activation>(call.activation)), negative_slope(static_cast<A>(call.negative_slope)) {}

  template <class V>
  INLINE V preactivation(const Line<V>& k, V x, int64_t i) const {
    V z = (x - k.centre) * k.slope + k.constant;
    return PLAIN || residual == nullptr ? z : z + load<V>(residual + i);
  }

  template <class V>
  INLINE void normalize(const Line<V>& k, int64_t i) const {
    const V z = preactivation<V>(k, load<V>(x + i), i);
    store(out + i, PLAIN ? z : activate(z, activation, negative_slope));
  }

  template <class V>
  INLINE V gradient_of_z(const Line<V>& k, V x, int64_t i) const {
    const V gradient = load<V>(dy + i);
    if (PLAIN || activation == NONE) return gradient;
    return activation_grad(gradient, preactivation<V>(k, x, i), activation, negative_slope);
  }

  // Adds the gradient of z and its product with x - centre. If it is written to `dz`, the rounded value is added.
  template <class V>
  INLINE void add_products(const Line<V>& k, int64_t i, V& sum, V& product) const {
    const V value = load<V>(x + i);
    V gradient = gradient_of_z<V>(k, value, i);
    if (!PLAIN && dz != nullptr) {
      store(dz + i, gradient);
      gradient = load<V>(dz + i);
    }
    sum += gradient;
    product += gradient * (value - k.centre);
  }

  template <class V>
  INLINE void differentiate(const Line<V>& k, int64_t i) const {
    const V value = load<V>(x + i);
    const V gradient = gradient_of_z<V>(k, value, i);
    store(out + i, V(gradient * k.slope + ((value - k.centre) * k.slope_x + k.constant_x)));
  }
};

template <class T, class F>
INLINE void with_run(const Call& call, F f) {
  if (call.activation == NONE && call.residual == nullptr && call.dz == nullptr)
    f(Run<T, true>(call));
  else
    f(Run<T, false>(call));
}

}  // namespace syncbn
