// Statistics from sums, and the update of the running statistics: the C++ of finish.py, renorm.py and running.py in
// ../../functional.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "call.h"

namespace syncbn {

// NaN stays NaN, as in torch.clamp.
INLINE double clamp(double value, double least, double most) {
  return value < least ? least : value > most ? most : value;
}

template <class B>
void corrections(const Call& call, const B* running_mean, const B* running_var, int64_t group, int64_t first,
                 int64_t last) {
  const double steps = static_cast<double>(*call.running.num_batches_tracked);
  const auto ramp = [&](double end) {
    if (steps >= end) return 1.0;
    return clamp((steps - call.limits.warmup_steps) / std::max(end - call.limits.warmup_steps, 1.0), 0, 1);
  };
  const double r_limit = 1 + (call.limits.r_max - 1) * ramp(call.limits.r_ramp_end);
  const double d_limit = call.limits.d_max * ramp(call.limits.d_ramp_end);
  for (int64_t c = first; c < last; ++c) {
    const int64_t i = group * call.channels + c;
    const double sigma = std::sqrt(running_var[c] + call.eps);
    call.r[i] = clamp(std::sqrt(call.var[i] + call.eps) / sigma, 1 / r_limit, r_limit);
    call.d[i] = clamp((call.mean[i] - running_mean[c]) / sigma, -d_limit, d_limit);
  }
}

// Mean, variance and 1/std of one group, and renorm's corrections.
inline void moments(const Call& call, int64_t group, int64_t first, int64_t last) {
  const double* row = call.sums + group * (2 * call.channels + 1);
  const double n = row[0] < 1 ? 1 : row[0], eps = call.eps;
  const int64_t at = group * call.channels;
  const double *__restrict sums = row + 1, *__restrict squares = sums + call.channels;
  double *__restrict mean = call.mean + at, *__restrict var = call.var + at, *__restrict invstd = call.invstd + at;
  for (int64_t c = first; c < last; ++c) {
    const double m = sums[c] / n, v = squares[c] / n - m * m;
    mean[c] = m;
    var[c] = v < 0 ? 0 : v;
    invstd[c] = 1 / std::sqrt(var[c] + eps);
  }
  if (!call.limits.given) return;
  const Running& running = call.running;
  if (running.type == FLOAT)
    corrections(call, static_cast<float*>(running.mean), static_cast<float*>(running.var), group, first, last);
  else
    corrections(call, static_cast<double*>(running.mean), static_cast<double*>(running.var), group, first, last);
}

// One update with the average over groups of mean and unbiased variance. Nothing changes if the result is not finite.
template <class B>
void update_running(const Call& call, B* running_mean, B* running_var) {
  const Running& running = call.running;
  const int64_t channels = call.channels;
  double filled = 0;
  for (int64_t g = 0; g < call.num_groups; ++g) filled += call.count[g] > 0;
  if (filled == 0 && !running.has_divisor) return;
  const double share = 1 / (running.has_divisor ? running.divisor : filled);
  std::vector<double> step(2 * channels);
  double *__restrict mean = step.data(), *__restrict var = mean + channels;
  for (int64_t g = 0; g < call.num_groups; ++g) {
    const double n = call.count[g];
    if (!(n > 0)) continue;
    const double unbiased = n / (n - 1 < 1 ? 1 : n - 1);
    const double *means = call.mean + g * channels, *vars = call.var + g * channels;
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] += means[c] * share;
      var[c] += vars[c] * unbiased * share;
    }
  }
  const B most = std::numeric_limits<B>::max();
  const double factor = running.cumulative ? 1 / (*running.num_batches_tracked + 1.0) : running.momentum;
  int infinite = 0;  // after rounding to the buffers' type
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = running_mean[c] + factor * (mean[c] - running_mean[c]);
    var[c] = running_var[c] + factor * (var[c] - running_var[c]);
    infinite |= !(std::abs(static_cast<B>(mean[c])) <= most) | !(std::abs(static_cast<B>(var[c])) <= most);
  }
  if (infinite) {
    ++*running.num_nonfinite_batches;
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    running_mean[c] = static_cast<B>(mean[c]);
    running_var[c] = static_cast<B>(var[c]);
  }
  ++*running.num_batches_tracked;
}

inline void update_running(const Call& call) {
  const Running& running = call.running;
  if (!running.update) return;
  if (running.type == FLOAT)
    update_running(call, static_cast<float*>(running.mean), static_cast<float*>(running.var));
  else
    update_running(call, static_cast<double*>(running.mean), static_cast<double*>(running.var));
}

}  // namespace syncbn
