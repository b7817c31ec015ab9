// The passes over planes: tensors in which `size` adjacent elements belong to one channel.

#pragma once

#include "steps.h"

namespace syncbn {

// Number of elements that are summed in the precision of the arithmetic, in a few parts for each lane of a vector.
constexpr int64_t SHORT_RUN = 2048;
// Most planes of a channel that are taken together. They may be a power of two apart, where a cache keeps few lines.
constexpr int64_t MOST_PLANES = 8;

template <class T>
struct Planes {
  using A = Scalar<T>;

  const Call& call;
  // All samples of these channels, or some of them; all samples of a group or none.
  int64_t first_sample, last_sample, first_channel, last_channel;
  // Of a plane, and from a plane to the next of its channel.
  const int64_t size = call.size, stride = call.channels * call.size;

  // Some planes of a channel and a group, each of successive samples. The first begins at this offset.
  struct Tile {
    int64_t group, channel, offset, planes;
  };

  // What is computed for a channel is needed once for all planes of a tile. `begin` is told when the group changes.
  template <class Begin, class Each>
  INLINE void each_tile(Begin begin, Each each) const {
    const int64_t most = std::clamp(SHORT_RUN / size, int64_t(1), MOST_PLANES);
    int64_t current = -1;
    for (int64_t n = first_sample, end; n < last_sample; n = end) {
      const int64_t group = call.group_of(n);
      for (end = n + 1; end < last_sample && end < n + most && call.group_of(end) == group;) ++end;
      if (group != current) begin(current = group);
      for (int64_t c = first_channel; c < last_channel; ++c)
        each(Tile{group, c, n * stride + c * size, end - n});
    }
  }

  // Calls each(line, at) for vectors that together are the tile; the last two of a plane may overlap.
  template <class Each>
  void each_vector(void (Coefficients<A>::*make)(const Call&, int64_t, int64_t), Each each) const {
    Coefficients<A> k(last_channel - first_channel);
    widest<Vector<A>>(size, [&](auto v) {
      using V = decltype(v);
      each_tile([&](int64_t group) { (k.*make)(call, group, first_channel); }, [&](const Tile& tile) {
        const auto line = Line<V>::of_channel(k, tile.channel - first_channel);
        for (int64_t p = 0, at = tile.offset; p < tile.planes; ++p, at += stride) {
          int64_t i = 0;
          for (; i + width<V> <= size; i += width<V>) each(line, at + i);
          if (i < size) each(line, at + size - width<V>);
        }
      });
    });
  }

  // Two sums, each in parts, so that an addition need not wait for the one before.
  template <class V, int PARTS>
  struct Sums {
    V first[PARTS] = {}, second[PARTS] = {};

    static INLINE A total_of(const V* parts) {
      V sum = parts[0];
      for (int j = 1; j < PARTS; ++j) sum += parts[j];
      return total(sum);
    }
  };

  // Calls f(start, n) for the short runs that a tile's planes consist of; if there are several, there is one plane.
  template <class F>
  INLINE void each_run(F f) const {
    for (int64_t start = 0; start < size; start += SHORT_RUN) f(start, std::min(SHORT_RUN, size - start));
  }

  // Adds to the sums by add(at, first, second) for the vectors of n elements of each plane of a tile.
  template <class V, int PARTS, class Add>
  INLINE Sums<V, PARTS> sums_of(const Tile& tile, int64_t start, int64_t n, Add add) const {
    Sums<V, PARTS> sums;
    const V rest = last_lanes<V>(n % width<V>);
    for (int64_t p = 0, at = tile.offset + start; p < tile.planes; ++p, at += stride) {
      int64_t i = 0;
      for (; i + PARTS * width<V> <= n; i += PARTS * width<V>)
#pragma GCC unroll 4
        for (int j = 0; j < PARTS; ++j) add(at + i + j * width<V>, sums.first[j], sums.second[j]);
#pragma GCC unroll 4
      for (int j = 0; j < PARTS - 1; ++j)
        if (i + width<V> <= n) {
          add(at + i, sums.first[j], sums.second[j]);
          i += width<V>;
        }
      if (i < n) {  // the last whole vector of the plane, without what has been added
        V first{}, second{};
        add(at + n - width<V>, first, second);
        sums.first[PARTS - 1] += masked(first, rest);
        sums.second[PARTS - 1] += masked(second, rest);
      }
    }
    return sums;
  }

  // The mean of four vectors of each plane. The squares about it are at most 1 + n / (4 * width) times those about the
  // mean, whatever the values; finding the mean itself would take as long as the sums. A run that is shorter than a
  // vector is the last of a long plane: the elements before it are near it too.
  template <class V>
  INLINE A centre_of(const Tile& tile, int64_t start, int64_t n) const {
    const T* x = static_cast<const T*>(call.x) + tile.offset + start + std::min<int64_t>(n - width<V>, 0);
    const int64_t last = std::max<int64_t>(n - width<V>, 0), third = last / 3;
    V sums{}, more{};
    for (int64_t p = 0; p < tile.planes; ++p, x += stride) {
      sums += load<V>(x) + load<V>(x + third);
      more += load<V>(x + 2 * third) + load<V>(x + last);
    }
    return static_cast<A>(total(V(sums + more)) / (4 * width<V> * tile.planes));
  }

  // Sums and sums of squares about zero, by those about a centre (Chan, Golub, LeVeque 1983, eq. 2.1).
  void group_sums() const {
    const T* x = static_cast<const T*>(call.x);
    widest<Vector<A>>(size, [&](auto v) {
      using V = decltype(v);
      each_tile([](int64_t) {}, [&](const Tile& tile) {
        double* row = call.sums + tile.group * (2 * call.channels + 1) + 1 + tile.channel;
        each_run([&](int64_t start, int64_t n) {
          const A centre = centre_of<V>(tile, start, n);
          const auto sums = sums_of<V, 4>(tile, start, n, [&](int64_t at, V& first, V& second) {
            const V d = load<V>(x + at) - centre;
            first += d;
            second += d * d;
          });
          const double middle = centre, number = n * tile.planes, about = sums.total_of(sums.first);
          row[0] += about + number * middle;
          row[call.channels] += sums.total_of(sums.second) + middle * (2 * about + number * middle);
        });
      });
    });
  }

  void normalize() const {
    with_run<T>(call, [&](const auto run) {
      each_vector(&Coefficients<A>::for_normalizing, [=](const auto& line, int64_t at) { run.normalize(line, at); });
    });
  }

  // Sums of dz and of dz * (x - centre); finish_group turns the latter into the sum of dz * xhat.
  void backward_sums() const {
    with_run<T>(call, [&](const auto run) { widest<Vector<A>>(size, [&](auto v) { backward_sums(run, v); }); });
  }

  template <bool PLAIN, class V>
  void backward_sums(const Run<T, PLAIN> run, V) const {
    constexpr int PARTS = PLAIN ? 4 : 2;  // with an epilogue, additions are not what takes time
    Coefficients<A> k(last_channel - first_channel);
    each_tile([&](int64_t group) { k.for_normalizing(call, group, first_channel); }, [&](const Tile& tile) {
      const auto line = Line<V>::of_channel(k, tile.channel - first_channel);
      double* row = call.sums + tile.group * 2 * call.channels + tile.channel;
      each_run([&](int64_t start, int64_t n) {
        const auto sums = sums_of<V, PARTS>(tile, start, n, [=](int64_t at, V& first, V& second) {
          run.add_products(line, at, first, second);
        });
        row[0] += sums.total_of(sums.first);
        row[call.channels] += sums.total_of(sums.second);
      });
    });
  }

  void grad_input() const {
    with_run<T>(call, [&](const auto run) {
      each_vector(&Coefficients<A>::for_gradient, [=](const auto& line, int64_t at) { run.differentiate(line, at); });
    });
  }
};

}  // namespace syncbn
