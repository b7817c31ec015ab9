// The passes over planes: tensors in which `size` adjacent elements belong to one channel.

#pragma once

#include "steps.h"

namespace syncbn {

// Number of elements that are summed in the precision of the arithmetic, in one part for each lane of a vector.
constexpr int64_t SHORT_RUN = 2048;
// Size of a plane up to which finding its mean would take as long as everything else.
constexpr int64_t SHORT_PLANE = 64;

template <class T>
struct Planes {
  using A = Scalar<T>;
  using V = Vector<A>;

  const Call& call;
  // All samples of these channels, or some of them; all samples of a group or none.
  int64_t first_sample, last_sample, first_channel, last_channel;

  template <class Each>
  INLINE void each_plane(Each each) const {
    for (int64_t n = first_sample; n < last_sample; ++n)
      for (int64_t c = first_channel; c < last_channel; ++c)
        each(call.group_of(n), c, (n * call.channels + c) * call.size);
  }

  // The same with the group's coefficients, which are computed when the group changes.
  template <class Make, class Each>
  INLINE void each_plane(Make make, Each each) const {
    Coefficients<A> k(last_channel - first_channel);
    int64_t current = -1;
    each_plane([&](int64_t group, int64_t c, int64_t offset) {
      if (group != current) (k.*make)(call, group, first_channel);
      current = group;
      const Run<T> run(call, offset);
      const int64_t at = c - first_channel;
      each(run, Line<V>::of_channel(k, at), Line<A>::of_channel(k, at), group, c);
    });
  }

  // A value near the run's mean: the mean, or for a short run the mean of four of its values. The squares about it are
  // at most 1 + SHORT_PLANE / 4 times those about the mean, whatever the values.
  static INLINE A centre_of(const T* x, int64_t n) {
    if (n <= SHORT_PLANE)
      return (load<A>(x) + load<A>(x + n / 4) + load<A>(x + n / 2) + load<A>(x + n / 4 * 3)) * A(0.25);
    V sums{}, more{};
    A rest = 0;
    int64_t i = 0;
    for (; i + 2 * width<V> <= n; i += 2 * width<V>) {
      sums += load<V>(x + i);
      more += load<V>(x + i + width<V>);
    }
    for (; i < n; ++i) rest += load<A>(x + i);
    return static_cast<A>((total(V(sums + more)) + rest) / n);
  }

  // Sum and sum of squares about zero, by those about the centre (Chan, Golub, LeVeque 1983, eq. 2.1).
  static INLINE void add_squares(const T* x, int64_t n, double& sum, double& squares) {
    const A centre = centre_of(x, n);
    V sums{}, more{}, products{}, more_products{};
    A rest = 0, product = 0;
    int64_t i = 0;
    for (; i + 2 * width<V> <= n; i += 2 * width<V>) {
      const V first = load<V>(x + i) - centre, second = load<V>(x + i + width<V>) - centre;
      sums += first;
      more += second;
      products += first * first;
      more_products += second * second;
    }
    if (i + width<V> <= n) {
      const V d = load<V>(x + i) - centre;
      sums += d;
      products += d * d;
      i += width<V>;
    }
    for (; i < n; ++i) {
      const A d = load<A>(x + i) - centre;
      rest += d;
      product += d * d;
    }
    const double middle = centre, about = total(V(sums + more)) + rest;
    sum += about + n * middle;
    squares += total(V(products + more_products)) + product + middle * (2 * about + n * middle);
  }

  void group_sums() const {
    const T* x = static_cast<const T*>(call.x);
    each_plane([&](int64_t group, int64_t c, int64_t offset) {
      double* row = call.sums + group * (2 * call.channels + 1) + 1 + c;
      for (int64_t start = 0; start < call.size; start += SHORT_RUN)
        add_squares(x + offset + start, std::min(SHORT_RUN, call.size - start), row[0], row[call.channels]);
    });
  }

  void normalize() const {
    each_plane(&Coefficients<A>::for_normalizing, [&](const Run<T>& run, Line<V> k, Line<A> k1, int64_t, int64_t) {
      int64_t i = 0;
      for (; i + width<V> <= call.size; i += width<V>) run.normalize(k, i);
      for (; i < call.size; ++i) run.normalize(k1, i);
    });
  }

  // Sums of dz and of dz * (x - centre); finish_group turns the latter into the sum of dz * xhat.
  void backward_sums() const {
    each_plane(&Coefficients<A>::for_normalizing, [&](const Run<T>& run, Line<V> k, Line<A> k1, int64_t g, int64_t c) {
      double* row = call.sums + g * 2 * call.channels + c;
      for (int64_t i = 0; i < call.size;) {
        const int64_t end = std::min(i + SHORT_RUN, call.size);
        V sums{}, products{}, more{}, more_products{};
        A sum = 0, product = 0;
        for (; i + 2 * width<V> <= end; i += 2 * width<V>) {
          run.add_products(k, i, sums, products);
          run.add_products(k, i + width<V>, more, more_products);
        }
        for (; i + width<V> <= end; i += width<V>) run.add_products(k, i, sums, products);
        for (; i < end; ++i) run.add_products(k1, i, sum, product);
        row[0] += total(V(sums + more)) + sum;
        row[call.channels] += total(V(products + more_products)) + product;
      }
    });
  }

  void grad_input() const {
    each_plane(&Coefficients<A>::for_gradient, [&](const Run<T>& run, Line<V> k, Line<A> k1, int64_t, int64_t) {
      int64_t i = 0;
      for (; i + width<V> <= call.size; i += width<V>) run.differentiate(k, i);
      for (; i < call.size; ++i) run.differentiate(k1, i);
    });
  }
};

}  // namespace syncbn
