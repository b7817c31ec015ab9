// The argument of all functions, field by field as in call.py.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace syncbn {

enum Type : int64_t { FLOAT, DOUBLE, BFLOAT16, FLOAT16 };

// Values of each group and channel, of any type and strides. A null pointer means the same value everywhere.
struct Values {
  const void* data;
  int64_t type, group_stride, channel_stride;

  template <class T>
  void fill(const T* from, int64_t n, double* to) const {
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (std::is_floating_point_v<T>)
        to[i] = from[i * channel_stride];
      else
        to[i] = widen<float>(T{}, from[i * channel_stride].bits);
    }
  }

  void row(int64_t group, int64_t first, int64_t n, double otherwise, double* to) const {
    const int64_t start = group * group_stride + first * channel_stride;
    if (data == nullptr)
      std::fill(to, to + n, otherwise);
    else if (type == FLOAT)
      fill(static_cast<const float*>(data) + start, n, to);
    else if (type == DOUBLE)
      fill(static_cast<const double*>(data) + start, n, to);
    else if (type == BFLOAT16)
      fill(static_cast<const BFloat16*>(data) + start, n, to);
    else
      fill(static_cast<const Float16*>(data) + start, n, to);
  }
};

template <class T>
void write_as(const double* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) store(to + i, static_cast<Scalar<T>>(from[i]));
}

inline void write(int64_t type, const double* from, int64_t n, void* to) {
  if (type == FLOAT)
    write_as(from, n, static_cast<float*>(to));
  else if (type == DOUBLE)
    write_as(from, n, static_cast<double*>(to));
  else if (type == BFLOAT16)
    write_as(from, n, static_cast<BFloat16*>(to));
  else
    write_as(from, n, static_cast<Float16*>(to));
}

// A layer's buffers, each (C,) of one type, and how a step updates them. mean is null if there are no buffers.
struct Running {
  void *mean, *var;
  int64_t* num_batches_tracked;
  int64_t* num_nonfinite_batches;
  int64_t type, update, cumulative, has_divisor;
  double momentum, divisor;
};

struct Limits {
  int64_t given;
  double r_max, d_max, warmup_steps, r_ramp_end, d_ramp_end;
};

// All functions take this argument and read the fields that they need. Each field has eight bytes.
struct Call {
  const void *x, *grad_output, *residual;
  void *dz, *out;  // the gradient of z, or null if it is not wanted; the result
  const int64_t* groups;  // (N,), or null for one group
  double* sums;  // forward (G, 2C + 1), backward (G, 2, C)
  double *count, *mean, *var, *invstd, *r, *d;  // (G,), then (G, C) each; r and d may be null, count and var in a whole pass
  const double* means;  // (G, 2, C), or null
  void *grad_weight, *grad_bias;  // (C,) each, or null
  int64_t grad_weight_type, grad_bias_type;
  Values scale, shift;
  int64_t samples, channels, size, num_groups;
  int64_t type, planes, threads, activation;
  double negative_slope, eps;
  Running running;
  Limits limits;

  int64_t group_of(int64_t sample) const { return groups == nullptr ? 0 : groups[sample]; }
};

}  // namespace syncbn
