// The passes over rows: tensors in which the C channels of a position are adjacent.

#pragma once

#include <tuple>

#include "steps.h"

namespace syncbn {

// Number of rows that are summed in the precision of the arithmetic, and of elements that stay in a core's cache.
constexpr int64_t SHORT_ROWS = 64;
constexpr int64_t SHORT_BLOCK = 1 << 15;

// Statistics may use a wider arithmetic than the elements.
template <class T, class A = Scalar<T>>
struct Rows {
  using V = Vector<A>;

  const Call& call;
  int64_t first_row, last_row;  // of one group

  // For each vector of channels, starting at channel i: begin(V{}, i), each(state, offset) for some rows, end(state, i).
  // Coefficients are loaded and sums are stored once per ROWS rows. One row at a time is faster if results are stored.
  template <int64_t ROWS, class Begin, class Each, class End>
  INLINE void each_column(Begin begin, Each each, End end) const {
    const int64_t c = call.channels;
    const auto rows = [&](int64_t row, auto number) {
      const auto column = [&](auto v, int64_t i) {
        auto state = begin(v, i);
        for (int64_t j = 0; j < number(); ++j) each(state, (row + j) * c + i);
        end(state, i);
      };
      columns<V>(0, c, column);
    };
    int64_t row = first_row;
    for (; row + ROWS <= last_row; row += ROWS) rows(row, std::integral_constant<int64_t, ROWS>());
    for (; row < last_row; ++row) rows(row, std::integral_constant<int64_t, 1>());
  }

  // Calls column(V{}, i) for successive vectors, of half the width where a vector would go past the end.
  template <class W, class Column>
  static INLINE void columns(int64_t i, int64_t end, Column column) {
    for (; i + width<W> <= end; i += width<W>) column(W{}, i);
    if constexpr (width<W> > 1) columns<Narrower<W>>(i, end, column);
  }

  // Calls f for each element with the coefficients of its channel.
  template <class Each>
  INLINE void each_element(Coefficients<A>& k, Each each) const {
    each_column<1>([&](auto v, int64_t i) { return Line<decltype(v)>::from_channel(k, i); }, each,
                   [](const auto&, int64_t) {});
  }

  // Adds to one or two sums of each channel; `begin` returns the other values that are needed.
  template <class Begin, class Each>
  INLINE void add(A* first, A* second, Begin begin, Each each) const {
    each_column<4>(
        [&](auto v, int64_t i) {
          using W = decltype(v);
          return std::tuple(begin(v, i), load<W>(first + i), load<W>(second + i));
        },
        [&](auto& state, int64_t at) { each(std::get<0>(state), at, std::get<1>(state), std::get<2>(state)); },
        [&](const auto& state, int64_t i) {
          store(first + i, std::get<1>(state));
          store(second + i, std::get<2>(state));
        });
  }

  // Works on blocks of few rows; `flush` adds the sums of a block to those in double.
  template <class Each, class Flush>
  INLINE void each_block(Each each, Flush flush) const {
    const int64_t step = std::clamp(SHORT_BLOCK / std::max<int64_t>(call.channels, 1), int64_t(1), SHORT_ROWS);
    for (int64_t row = first_row; row < last_row; row += step) {
      const Rows block{call, row, std::min(row + step, last_row)};
      each(block);
      flush(block.last_row - block.first_row);
    }
  }

  // Sums and sums of squares about zero, into 2C numbers. The squares of a block are taken about the mean of four of its
  // rows; they are at most 1 + SHORT_ROWS / 4 times those about its own mean, whatever the values.
  void group_sums(double* sums) const {
    const int64_t c = call.channels;
    const T* x = static_cast<const T*>(call.x);
    std::vector<A> scratch(3 * c);
    A *centre = scratch.data(), *sum = centre + c, *squares = sum + c;
    auto each = [&](const Rows& block) {
      std::fill(sum, sum + 2 * c, A(0));
      const int64_t quarter = (block.last_row - block.first_row) / 4 * c;
      Rows{call, block.first_row, block.first_row + 1}.each_column<1>(
          [](auto v, int64_t) { return v; },
          [&](auto& mean, int64_t at) {
            for (int64_t i = 0; i < 4; ++i) mean += load<std::decay_t<decltype(mean)>>(x + at + i * quarter);
            mean *= A(0.25);
          },
          [&](auto mean, int64_t i) { store(centre + i, mean); });
      block.add(sum, squares, [&](auto v, int64_t i) { return load<decltype(v)>(centre + i); },
                [&](auto middle, int64_t at, auto& s, auto& q) {
                  const auto d = load<decltype(middle)>(x + at) - middle;
                  s += d;
                  q += d * d;
                });
    };
    each_block(each, [&](int64_t rows) {
      for (int64_t i = 0; i < c; ++i) {
        const double middle = centre[i], about = sum[i];
        sums[i] += about + rows * middle;
        sums[c + i] += squares[i] + middle * (2 * about + rows * middle);
      }
    });
  }

  // The same if the arithmetic is double: a centre would gain nothing.
  void plain_group_sums(double* sums) const {
    static_assert(std::is_same_v<A, double>);
    const T* x = static_cast<const T*>(call.x);
    add(sums, sums + call.channels, [](auto, int64_t) { return 0; },
        [&](int, int64_t at, auto& s, auto& q) {
          const auto value = load<std::decay_t<decltype(s)>>(x + at);
          s += value;
          q += value * value;
        });
  }

  void normalize(Coefficients<A>& k) const {
    with_run<T>(call, [&](const auto run) {
      each_element(k, [=](const auto& line, int64_t at) { run.normalize(line, at); });
    });
  }

  // Sums of dz and of dz * (x - centre), into 2C numbers.
  void backward_sums(Coefficients<A>& k, double* sums) const {
    const int64_t c = call.channels;
    std::vector<A> scratch(2 * c);
    A *sum = scratch.data(), *products = sum + c;
    auto each = [&](const Rows& block) {
      std::fill(scratch.begin(), scratch.end(), A(0));
      with_run<T>(call, [&](const auto run) {
        block.add(sum, products, [&](auto v, int64_t i) { return Line<decltype(v)>::from_channel(k, i); },
                  [=](const auto& line, int64_t at, auto& s, auto& p) { run.add_products(line, at, s, p); });
      });
    };
    each_block(each, [&](int64_t) {
      for (int64_t i = 0; i < c; ++i) {
        sums[i] += sum[i];
        sums[c + i] += products[i];
      }
    });
  }

  void grad_input(Coefficients<A>& k) const {
    with_run<T>(call, [&](const auto run) {
      each_element(k, [=](const auto& line, int64_t at) { run.differentiate(line, at); });
    });
  }
};

}  // namespace syncbn
