// The functions that functions.py calls: the five steps, and a whole forward or backward pass for groups that are all on
// this process. In a whole pass, a part of the tensor that fits into a core's cache is read from memory once. The functions
// are C without torch's headers, so that one build serves every version of torch.
//
// Short runs are summed in the tensor's arithmetic and the runs in double, so the precision does not depend on the
// tensor's length. The order of additions depends on shape, groups and format alone, so the number of threads changes no
// bit of a result.

#include <utility>

#include "moments.h"
#include "planes.h"
#include "rows.h"

namespace syncbn {
namespace {

constexpr int64_t GRAIN = 1 << 15;   // elements below which a thread is not worth its start
constexpr int64_t CACHED = 1 << 17;  // elements, of all tensors that are read, that all passes go over before the next
constexpr int64_t PIECE = 1 << 18;   // elements of rows that one thread takes at a time

// Each thread calls f(first, last) for its share of the items.
template <class F>
void parallel(const Call& call, int64_t items, F f) {
  const int64_t elements = call.samples * call.channels * call.size;
  const int64_t threads = std::min({call.threads, items, elements / GRAIN + 1});
  if (threads <= 1) return f(int64_t(0), items);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t t = 0; t < threads; ++t) f(items * t / threads, items * (t + 1) / threads);
}

// Consecutive samples, or rows of samples, of one group; group -1 stands for all samples of all groups.
struct Stretch {
  int64_t group, first, last;
};

std::vector<Stretch> runs_of(const Call& call) {
  if (call.groups == nullptr) return {{0, 0, call.samples}};
  std::vector<Stretch> runs;
  for (int64_t n = 0; n < call.samples; ++n) {
    if (runs.empty() || runs.back().group != call.groups[n]) runs.push_back({call.groups[n], n, n});
    runs.back().last = n + 1;
  }
  return runs;
}

// Whether each group is one run, so that a group can be finished before the next begins.
bool is_whole(const std::vector<Stretch>& runs) {
  for (size_t i = 1; i < runs.size(); ++i)
    if (runs[i].group <= runs[i - 1].group) return false;
  return true;
}

// The two passes of a forward or a backward: the sums, and the elementwise step. If both are wanted, each part of the
// tensor goes through both.
struct Task {
  const Call& call;
  const bool forward, first, second;

  int64_t row() const { return 2 * call.channels + forward; }

  void clear() const {
    std::fill(call.sums, call.sums + call.num_groups * row(), 0.0);
    if (!forward) return;
    for (int64_t n = 0; n < call.samples; ++n) call.sums[call.group_of(n) * row()] += call.size;
    for (int64_t g = 0; second && g < call.num_groups; ++g) {
      call.count[g] = call.sums[g * row()];
      // A group without samples has no run in which it would be finished.
      if (call.count[g] == 0) moments(call, g, 0, call.channels);
    }
  }

  // When a group's sums are complete: the moments, or the sums of dz * xhat from those of dz * (x - centre).
  template <class A>
  void finish_group(int64_t group, int64_t from, int64_t to) const {
    if (forward) {
      if (second) moments(call, group, from, to);
      return;
    }
    double* sums = call.sums + group * row();
    for (int64_t c = from; c < to; ++c) {
      const int64_t i = group * call.channels + c;
      const double low = call.mean[i] - static_cast<A>(call.mean[i]);
      sums[call.channels + c] = (sums[call.channels + c] - low * sums[c]) * call.invstd[i];
    }
  }

  // The call of the second pass, which reads dz if the first has written it.
  Call after_first() const {
    Call other = call;
    if (forward || !first || call.dz == nullptr) return other;
    other.grad_output = call.dz;
    other.residual = nullptr;
    other.activation = NONE;
    return other;
  }
};

// -- planes ----------------------------------------------------------------------------------------------------------

template <class T>
void over_planes(const Task& task) {
  const Call &call = task.call, later = task.after_first();
  std::vector<Stretch> runs = runs_of(call);
  if (!(task.first && task.second && is_whole(runs))) runs.assign(1, {-1, 0, call.samples});
  int64_t longest = 1;
  for (const Stretch& run : runs) longest = std::max(longest, run.last - run.first);
  // As many channels at a time as fit into the cache, but few enough that every thread has some.
  const int64_t fair = (call.channels + call.threads - 1) / call.threads;
  const int64_t step = std::max<int64_t>(std::min(CACHED / (task.forward ? 1 : 2) / (longest * call.size), fair), 1);
  const int64_t parts = (call.channels + step - 1) / step;
  parallel(call, parts * runs.size(), [&](int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; ++i) {
      const Stretch& run = runs[i / parts];
      const int64_t from = i % parts * step, to = std::min(from + step, call.channels);
      const Planes<T> planes{call, run.first, run.last, from, to};
      if (task.first) {
        task.forward ? planes.group_sums() : planes.backward_sums();
        for (int64_t g = run.group < 0 ? 0 : run.group; g < (run.group < 0 ? call.num_groups : run.group + 1); ++g)
          task.template finish_group<Scalar<T>>(g, from, to);
      }
      if (task.second) {
        const Planes<T> again{later, run.first, run.last, from, to};
        task.forward ? again.normalize() : again.grad_input();
      }
    }
  });
}

// -- rows ------------------------------------------------------------------------------------------------------------

// Rows of one group, possibly from several runs of samples, that one thread takes at a time.
using Piece = std::vector<Stretch>;

// The pieces of runs that are sorted by group.
std::vector<Piece> pieces_of(const Call& call, const Stretch* runs, int64_t number) {
  const int64_t most = std::max<int64_t>(PIECE / call.channels, 1);
  std::vector<Piece> pieces;
  int64_t room = 0;
  for (int64_t i = 0; i < number; ++i)
    for (int64_t row = runs[i].first * call.size, end = runs[i].last * call.size; row < end;) {
      if (room == 0 || pieces.back().back().group != runs[i].group) {
        pieces.emplace_back();
        room = most;
      }
      const int64_t rows = std::min(room, end - row);
      pieces.back().push_back({runs[i].group, row, row + rows});
      row += rows;
      room -= rows;
    }
  return pieces;
}

// Calls f(rows, coefficients, index of the piece) for each stretch. Coefficients are computed when the group changes.
template <class T, class Make, class F>
void each_piece(const Call& call, const std::vector<Piece>& pieces, Make make, F f) {
  parallel(call, pieces.size(), [&](int64_t start, int64_t stop) {
    Coefficients<Scalar<T>> k(call.channels);
    for (int64_t i = start, current = -1; i < stop; ++i)
      for (const Stretch& rows : pieces[i]) {
        if (rows.group != current) (k.*make)(call, current = rows.group, 0);
        f(Rows<T>{call, rows.first, rows.last}, k, i);
      }
  });
}

template <class T>
void group_sums(const Call& call, const std::vector<Piece>& pieces, double* parts) {
  parallel(call, pieces.size(), [&](int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; ++i)
      for (const Stretch& rows : pieces[i]) {
        double* sums = parts + i * 2 * call.channels;
        // A sample with one value per channel has no centre of its own; such tensors are small. As in the twin.
        if (call.size == 1)
          Rows<T, double>{call, rows.first, rows.last}.plain_group_sums(sums);
        else
          Rows<T>{call, rows.first, rows.last}.group_sums(sums);
      }
  });
}

template <class T>
void over_runs(const Task& task, const Stretch* runs, int64_t number, bool whole) {
  using K = Coefficients<Scalar<T>>;
  const Call &call = task.call, later = task.after_first();
  const int64_t width = 2 * call.channels;
  std::vector<Piece> pieces = pieces_of(call, runs, number);
  if (task.first) {
    std::vector<double> parts(pieces.size() * width);
    if (task.forward)
      group_sums<T>(call, pieces, parts.data());
    else
      each_piece<T>(call, pieces, &K::for_normalizing, [&](const Rows<T>& rows, K& k, int64_t i) {
        rows.backward_sums(k, parts.data() + i * width);
      });
    for (size_t i = 0; i < pieces.size(); ++i) {
      double* sums = call.sums + pieces[i][0].group * task.row() + task.forward;
      for (int64_t j = 0; j < width; ++j) sums[j] += parts[i * width + j];
    }
    for (int64_t i = 0; i < (whole ? number : call.num_groups); ++i)
      task.template finish_group<Scalar<T>>(whole ? runs[i].group : i, 0, call.channels);
  }
  if (!task.second) return;
  std::reverse(pieces.begin(), pieces.end());  // the rows read last are still in the cache
  if (task.forward)
    each_piece<T>(later, pieces, &K::for_normalizing, [](const Rows<T>& rows, K& k, int64_t) { rows.normalize(k); });
  else
    each_piece<T>(later, pieces, &K::for_gradient, [](const Rows<T>& rows, K& k, int64_t) { rows.grad_input(k); });
}

template <class T>
void over_rows(const Task& task) {
  const Call& call = task.call;
  std::vector<Stretch> runs = runs_of(call);
  if (!(task.first && task.second && is_whole(runs))) {
    const auto by_group = [](const Stretch& a, const Stretch& b) { return a.group < b.group; };
    std::stable_sort(runs.begin(), runs.end(), by_group);
    return over_runs<T>(task, runs.data(), runs.size(), false);
  }
  // As many groups at a time as fit into the caches of the threads.
  const int64_t most = CACHED * call.threads / std::max<int64_t>(call.channels * call.size, 1);
  for (size_t i = 0; i < runs.size();) {
    size_t j = i + 1;
    while (j < runs.size() && runs[j].last - runs[i].first <= most) ++j;
    over_runs<T>(task, runs.data() + i, j - i, true);
    i = j;
  }
}

// The gradients of weight and bias, by the chain rule for scale = weight * r and shift = weight * d + bias.
void parameter_gradients(const Call& call) {
  const int64_t n = call.channels;
  std::vector<double> totals(2 * n);
  double *of_bias = totals.data(), *of_weight = of_bias + n;
  for (int64_t g = 0; g < call.num_groups; ++g) {
    const double* sums = call.sums + g * 2 * n;
    for (int64_t c = 0; c < n; ++c) {
      const int64_t i = g * n + c;
      of_bias[c] += sums[c];
      of_weight[c] += call.r == nullptr ? sums[n + c] : call.r[i] * sums[n + c] + call.d[i] * sums[c];
    }
  }
  if (call.grad_weight != nullptr) write(call.grad_weight_type, of_weight, n, call.grad_weight);
  if (call.grad_bias != nullptr) write(call.grad_bias_type, of_bias, n, call.grad_bias);
}

// -- the border ------------------------------------------------------------------------------------------------------

template <class T>
void run(const Task& task) {
  if (task.first) task.clear();
  if (task.call.samples * task.call.channels * task.call.size == 0) return;
  task.call.planes ? over_planes<T>(task) : over_rows<T>(task);
}

// Whether the groups of all samples exist.
bool has_groups(const Call& call) {
  for (int64_t n = 0; call.groups != nullptr && n < call.samples; ++n)
    if (call.groups[n] < 0 || call.groups[n] >= call.num_groups) return false;
  return true;
}

// Returns 0, or 1 if a sample's group does not exist.
int64_t run(const Call& call, bool forward, bool first, bool second) {
  if (!has_groups(call)) return 1;
  const Task task{call, forward, first, second};
  switch (call.type) {
    case FLOAT: run<float>(task); break;
    case DOUBLE: run<double>(task); break;
    case BFLOAT16: run<BFloat16>(task); break;
    case FLOAT16: run<Float16>(task); break;
  }
  return 0;
}

}  // namespace
}  // namespace syncbn

using syncbn::Call;

#pragma GCC visibility push(default)
extern "C" {

int64_t syncbn_size_of_call() { return sizeof(Call); }
int64_t syncbn_group_sums(const Call* call) { return syncbn::run(*call, true, true, false); }
int64_t syncbn_normalize(const Call* call) { return syncbn::run(*call, true, false, true); }
int64_t syncbn_backward_sums(const Call* call) { return syncbn::run(*call, false, true, false); }
int64_t syncbn_grad_input(const Call* call) { return syncbn::run(*call, false, false, true); }
int64_t syncbn_finish(const Call* call) {
  for (int64_t g = 0; g < call->num_groups; ++g) {
    call->count[g] = call->sums[g * (2 * call->channels + 1)];
    syncbn::moments(*call, g, 0, call->channels);
  }
  syncbn::update_running(*call);
  return 0;
}
int64_t syncbn_forward(const Call* given) {
  Call call = *given;
  const int64_t groups = call.num_groups, values = groups * call.channels;
  std::vector<double> sums(2 * values + groups), count(groups), var(values);
  call.sums = sums.data(), call.count = count.data(), call.var = var.data();
  if (syncbn::run(call, true, true, true)) return 1;
  syncbn::update_running(call);
  return 0;
}
int64_t syncbn_backward(const Call* given) {
  Call call = *given;
  std::vector<double> sums(call.num_groups * 2 * call.channels), count(call.num_groups);
  call.sums = sums.data(), call.count = count.data();
  if (!syncbn::has_groups(call)) return 1;
  for (int64_t n = 0; n < call.samples; ++n) count[call.group_of(n)] += call.size;
  if (syncbn::run(call, false, true, call.out != nullptr)) return 1;
  syncbn::parameter_gradients(call);
  return 0;
}
}
#pragma GCC visibility pop
