// The kernels as operators of torch: what they can read, the memory for their results, and the autograd formula of a
// batch whose groups are all on this process. This file alone uses torch's headers; it is compiled for one version of
// torch and finds the functions of kernels.cpp in the library that `open` opens.

#include <dlfcn.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/Parallel.h>
#include <ATen/core/enum_tag.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "call.h"

namespace syncbn {
namespace {

using at::Tensor;
using std::optional;

// -- the library -----------------------------------------------------------------------------------------------------

using Function = int64_t (*)(const Call*);

struct Library {
  Function group_sums, finish, normalize, backward_sums, grad_input, forward, backward;
} library;

void open(c10::string_view path) {
  void* handle = dlopen(std::string(path).c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(handle != nullptr, dlerror());
  const auto find = [&](const char* name) {
    void* found = dlsym(handle, name);
    TORCH_CHECK(found != nullptr, path, " has no ", name);
    return found;
  };
  TORCH_CHECK(reinterpret_cast<int64_t (*)()>(find("syncbn_size_of_call"))() == sizeof(Call), path, " is outdated");
  const auto function = [&](const char* name) { return reinterpret_cast<Function>(find(name)); };
  library = {function("syncbn_group_sums"),    function("syncbn_finish"),     function("syncbn_normalize"),
             function("syncbn_backward_sums"), function("syncbn_grad_input"), function("syncbn_forward"),
             function("syncbn_backward")};
}

void run(Function function, const Call& call) {
  TORCH_CHECK_VALUE(function(&call) == 0, "the ghost group of a sample is not among 0, 1, ... number - 1");
}

// -- arguments -------------------------------------------------------------------------------------------------------

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return FLOAT;
    case at::kDouble: return DOUBLE;
    case at::kBFloat16: return BFLOAT16;
    case at::kHalf: return FLOAT16;
    default: TORCH_CHECK_TYPE(false, "batch normalization of ", t.scalar_type(), " is not supported");
  }
}

at::ScalarType compute_dtype(const Tensor& x) { return x.itemsize() < 4 ? at::kFloat : x.scalar_type(); }

Tensor wide(at::IntArrayRef shape) { return at::empty(shape, at::TensorOptions(at::kDouble)); }

const Tensor* get(const optional<Tensor>& t) { return t.has_value() && t->defined() ? &*t : nullptr; }

void* address(const Tensor& t) {
  TORCH_CHECK_VALUE(t.numel() == 0 || t.storage().data() != nullptr, "the memory of a tensor of shape ", t.sizes(),
                    " has been freed; gather a sharded parameter first");
  return t.unsafeGetTensorImpl()->mutable_data();
}

// Whether all channels of a position are adjacent, and the positions of a sample, in order.
bool has_rows(const Tensor& x) {
  int64_t expected = 1;
  const auto follows = [&](int64_t dim) {
    const bool fits = x.size(dim) == 1 || x.stride(dim) == expected;
    expected *= x.size(dim);
    return fits;
  };
  if (!follows(1)) return false;
  for (int64_t dim = x.dim() - 1; dim > 1; --dim)
    if (!follows(dim)) return false;
  return follows(0);
}

// What is done after the normalization, and the samples' groups: the arguments that most operators share.
struct Options {
  const optional<Tensor>& index;
  int64_t groups;
  optional<c10::string_view> activation;
  double negative_slope;
};

Activation activation_of(const Options& options) {
  if (!options.activation.has_value()) return NONE;
  if (*options.activation == "relu") return RELU;
  if (*options.activation == "leaky_relu") return LEAKY_RELU;
  if (*options.activation == "silu") return SILU;
  TORCH_CHECK_VALUE(false, "there is no activation '", *options.activation, "'");
}

// A call and the tensors that it refers to.
struct Request {
  Call call{};
  const Tensor& given;
  Tensor x;  // `given`, or a contiguous copy if the kernels cannot read its format
  c10::SmallVector<Tensor, 6> kept;

  Request(const Tensor& input, const Options& options) : given(input), x(input) {
    call.type = type_of(x);
    call.samples = x.size(0), call.channels = x.size(1), call.num_groups = options.groups;
    call.size = 1;
    for (int64_t dim = 2; dim < x.dim(); ++dim) call.size *= x.size(dim);
    const bool planes = call.size > 1 && x.is_contiguous();
    if (!planes && !has_rows(x)) x = x.contiguous();
    call.planes = call.size > 1 && (planes || !x.is_same(given));
    call.x = address(x);
    call.threads = at::get_num_threads();
    call.activation = activation_of(options), call.negative_slope = options.negative_slope;
    if (const Tensor* index = get(options.index)) {
      TORCH_CHECK_VALUE(index->dim() == 1 && index->size(0) == call.samples, "expected the group of each of ",
                        call.samples, " samples, got a tensor of shape ", index->sizes());
      call.groups = static_cast<const int64_t*>(keep(index->to(at::kLong).contiguous()));
    } else {
      TORCH_CHECK_VALUE(options.groups == 1, options.groups, " groups need an index");
    }
  }

  void* keep(Tensor t) {
    kept.push_back(std::move(t));
    return address(kept.back());
  }

  // Statistics, float64.
  double* put_wide(const Tensor& t, at::IntArrayRef shape) {
    TORCH_CHECK(t.sizes() == shape, "expected statistics of size ", shape, ", got ", t.sizes());
    if (t.scalar_type() == at::kDouble && t.is_contiguous()) return static_cast<double*>(address(t));
    return static_cast<double*>(keep(t.to(at::kDouble).contiguous()));
  }

  // A tensor of the shape of x in its dtype and format: itself or a copy.
  Tensor like_x(const Tensor& t) const {
    TORCH_CHECK(t.sizes() == x.sizes(), "expected a tensor of the input's size ", x.sizes(), ", got ", t.sizes());
    if (t.scalar_type() == x.scalar_type() && t.strides() == x.strides()) return t;
    return at::empty_like(x).copy_(t);
  }

  // A result in the format of the input.
  Tensor as_given(Tensor result) const {
    return x.is_same(given) ? result : at::empty_like(given).copy_(result);
  }

  void put(Values& values, const optional<Tensor>& given_values) {
    const Tensor* t = get(given_values);
    if (t == nullptr) return;
    const bool per_group = t->dim() == 2;
    TORCH_CHECK(t->dim() > 0 && t->size(-1) == call.channels && (!per_group || t->size(0) == call.num_groups),
                "expected a weight or bias of size ", call.channels, ", got ", t->sizes());
    values = {address(*t), type_of(*t), per_group ? t->stride(0) : 0, t->stride(-1)};
  }

  void put_residual(const optional<Tensor>& residual) {
    if (const Tensor* t = get(residual)) call.residual = keep(like_x(*t));
  }

  void put_moments(const Tensor& mean, const Tensor& invstd) {
    call.mean = put_wide(mean, {call.num_groups, call.channels});
    call.invstd = put_wide(invstd, {call.num_groups, call.channels});
  }

  // The gradient, and dz if it is to be written: the gradient of a residual under an activation.
  Tensor put_gradient(const Tensor& grad_output, bool write) {
    Tensor gradient = like_x(grad_output);
    call.grad_output = keep(gradient);
    if (!write || call.activation == NONE || call.residual == nullptr) return gradient;
    Tensor dz = at::empty_like(x);
    call.dz = keep(dz);
    return dz;
  }
};

// The running statistics of a layer and how a step updates and uses them.
struct RunningOptions {
  const optional<Tensor>&mean, &var, &num_batches_tracked, &num_nonfinite_batches;
  optional<double> momentum, divisor;
  optional<at::ArrayRef<double>> limits;
  bool update;
};

// Returns renorm's r and d, (2, G, C) float64, not yet computed; undefined if the layer has none.
Tensor put_running(Call& call, const RunningOptions& options) {
  const Tensor* mean = get(options.mean);
  if (mean == nullptr) return {};
  const auto put = [&](const optional<Tensor>& buffer, int64_t size, at::ScalarType type) {
    TORCH_CHECK(get(buffer) != nullptr, "running statistics without one of their buffers");
    const Tensor& t = *buffer;
    TORCH_CHECK(t.numel() == size && t.is_contiguous() && t.scalar_type() == type, "expected a contiguous buffer of size ",
                size, " and type ", type, ", got ", t.sizes(), " and ", t.scalar_type());
    // Autograd must notice that the buffer changes.
    if (options.update && !t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    return address(t);
  };
  Running& running = call.running;
  const auto type = mean->scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  running.mean = put(options.mean, call.channels, type), running.var = put(options.var, call.channels, type);
  running.type = type == at::kDouble ? DOUBLE : FLOAT;
  running.num_batches_tracked = static_cast<int64_t*>(put(options.num_batches_tracked, 1, at::kLong));
  running.num_nonfinite_batches = static_cast<int64_t*>(put(options.num_nonfinite_batches, 1, at::kLong));
  running.update = options.update, running.cumulative = !options.momentum.has_value();
  running.momentum = options.momentum.value_or(0);
  running.has_divisor = options.divisor.has_value(), running.divisor = options.divisor.value_or(0);
  if (!options.limits.has_value()) return {};
  const auto& limits = *options.limits;
  TORCH_CHECK(limits.size() == 5, "expected five limits, got ", limits.size());
  call.limits = {1, limits[0], limits[1], limits[2], limits[3], limits[4]};
  Tensor corrections = wide({2, call.num_groups, call.channels});
  call.r = corrections.mutable_data_ptr<double>(), call.d = call.r + call.num_groups * call.channels;
  return corrections;
}

// -- the steps -------------------------------------------------------------------------------------------------------

// Parameters that several operators share.
#define SHARED const optional<Tensor>&index, int64_t groups
#define WHOLE const optional<Tensor>&index, c10::SymInt groups
#define EPILOGUE const optional<Tensor>&residual, optional<c10::string_view> activation, double negative_slope
#define RUNNING                                                                                                    \
  const optional<Tensor>&running_mean, const optional<Tensor>&running_var, const optional<Tensor>&tracked,         \
      const optional<Tensor>&nonfinite, optional<double> momentum, optional<double> divisor,                       \
      optional<at::ArrayRef<double>> limits, bool update
#define RUNNING_OPTIONS {running_mean, running_var, tracked, nonfinite, momentum, divisor, limits, update}

Tensor group_sums(const Tensor& x, SHARED) {
  Request request(x, {index, groups, {}, 0});
  Tensor sums = wide({groups, 2 * request.call.channels + 1});
  request.call.sums = sums.mutable_data_ptr<double>();
  run(library.group_sums, request.call);
  return sums;
}

// One tensor each: a tensor saved for the backward pass must not keep the others alive.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> finish(const Tensor& given, double eps, RUNNING) {
  TORCH_CHECK(given.dim() == 2 && given.size(1) % 2 == 1, "expected sums of size (G, 2C + 1), got ", given.sizes());
  const Tensor sums = given.to(at::kDouble).contiguous();
  Call call{};
  call.num_groups = sums.size(0), call.channels = (sums.size(1) - 1) / 2, call.eps = eps;
  Tensor count = wide({call.num_groups, 1}), mean = wide({call.num_groups, call.channels});
  Tensor invstd = at::empty_like(mean), var = at::empty_like(mean);
  call.sums = sums.mutable_data_ptr<double>(), call.count = count.mutable_data_ptr<double>();
  call.mean = mean.mutable_data_ptr<double>(), call.invstd = invstd.mutable_data_ptr<double>();
  call.var = var.mutable_data_ptr<double>();
  Tensor corrections = put_running(call, RUNNING_OPTIONS);
  run(library.finish, call);
  return {count, mean, invstd, var, corrections};
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& invstd, const optional<Tensor>& scale,
                 const optional<Tensor>& shift, SHARED, EPILOGUE) {
  Request request(x, {index, groups, activation, negative_slope});
  request.put(request.call.scale, scale), request.put(request.call.shift, shift);
  request.put_residual(residual), request.put_moments(mean, invstd);
  Tensor y = at::empty_like(request.x);
  request.call.out = address(y);
  run(library.normalize, request.call);
  return request.as_given(y);
}

std::tuple<Tensor, Tensor> backward_sums(const Tensor& grad_output, const Tensor& x, const Tensor& mean,
                                         const Tensor& invstd, const optional<Tensor>& scale,
                                         const optional<Tensor>& shift, SHARED, EPILOGUE) {
  Request request(x, {index, groups, activation, negative_slope});
  request.put(request.call.scale, scale), request.put(request.call.shift, shift);
  request.put_moments(mean, invstd);
  if (request.call.activation != NONE) request.put_residual(residual);  // else z is not computed
  Tensor dz = request.put_gradient(grad_output, true);
  Tensor sums = wide({groups, 2, request.call.channels});
  request.call.sums = sums.mutable_data_ptr<double>();
  run(library.backward_sums, request.call);
  return {dz, sums};
}

Tensor grad_input(const Tensor& dz, const Tensor& x, const Tensor& mean, const Tensor& invstd,
                  const optional<Tensor>& scale, const optional<Tensor>& shift, const Tensor& means, SHARED,
                  optional<c10::string_view> activation, double negative_slope) {
  Request request(x, {index, groups, activation, negative_slope});
  request.put(request.call.scale, scale), request.put(request.call.shift, shift);
  request.put_moments(mean, invstd), request.put_gradient(dz, false);
  Tensor grad = at::empty_like(request.x);
  request.call.out = address(grad);
  request.call.means = request.put_wide(means, {groups, 2, request.call.channels});
  run(library.grad_input, request.call);
  return request.as_given(grad);
}

// As `to`, which takes several times as long for the few numbers of a small layer.
Tensor converted(const Tensor& from, at::ScalarType type) {
  if (from.scalar_type() == type) return from;
  TORCH_CHECK(from.is_contiguous(), "expected contiguous corrections");
  Tensor to = at::empty(from.sizes(), from.options().dtype(type));
  const auto copy = [&](const auto* source, auto* target) { std::copy_n(source, from.numel(), target); };
  if (type == at::kFloat)
    copy(from.const_data_ptr<double>(), to.mutable_data_ptr<float>());
  else
    copy(from.const_data_ptr<float>(), to.mutable_data_ptr<double>());
  return to;
}

// -- a whole pass ----------------------------------------------------------------------------------------------------

// Returns y, the moments (2, G, C) float64 and renorm's corrections (2, G, C) in the compute dtype, empty if the layer
// has none.
std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(const Tensor& x, const optional<Tensor>& weight,
                                                      const optional<Tensor>& bias, WHOLE, EPILOGUE, double eps,
                                                      RUNNING) {
  const int64_t number = groups.expect_int();
  Request request(x, {index, number, activation, negative_slope});
  Call& call = request.call;
  request.put(call.scale, weight), request.put(call.shift, bias), request.put_residual(residual);
  Tensor y = at::empty_like(request.x), moments = wide({2, number, call.channels});
  call.out = address(y), call.eps = eps;
  call.mean = moments.mutable_data_ptr<double>(), call.invstd = call.mean + number * call.channels;
  Tensor corrections = put_running(call, RUNNING_OPTIONS);
  run(library.forward, call);
  corrections = corrections.defined() ? converted(corrections, compute_dtype(x)) : at::empty({0}, moments.options());
  return {request.as_given(y), moments, corrections};
}

// The gradients of x, weight, bias and z; undefined where `needs` is false. That of z is wanted for a residual under an
// activation alone: it is grad_output otherwise.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad_output, const Tensor& x, const optional<Tensor>& weight, const optional<Tensor>& bias,
    const Tensor& moments, const Tensor& corrections, WHOLE, EPILOGUE, at::ScalarType bias_dtype,
    std::array<bool, 4> needs) {
  const int64_t number = groups.expect_int();
  Request request(x, {index, number, activation, negative_slope});
  Call& call = request.call;
  request.put(call.scale, weight), request.put(call.shift, bias);
  if (call.activation != NONE) request.put_residual(residual);
  const int64_t values = number * call.channels;
  call.mean = request.put_wide(moments, {2, number, call.channels}), call.invstd = call.mean + values;
  const Tensor wide_corrections = converted(corrections, at::kDouble);
  if (corrections.numel() != 0)
    call.r = request.put_wide(wide_corrections, {2, number, call.channels}), call.d = call.r + values;
  const Tensor dz = request.put_gradient(grad_output, needs[3]);
  Tensor grad, grad_weight, grad_bias;
  if (needs[0]) {
    grad = at::empty_like(request.x);
    call.out = address(grad);
  }
  if (needs[1]) {
    grad_weight = at::empty({call.channels}, get(weight)->options());
    call.grad_weight = address(grad_weight), call.grad_weight_type = type_of(grad_weight);
  }
  if (needs[2]) {
    grad_bias = at::empty({call.channels}, x.options().dtype(bias_dtype));
    call.grad_bias = address(grad_bias), call.grad_bias_type = type_of(grad_bias);
  }
  run(library.backward, call);
  if (needs[0]) grad = request.as_given(grad);
  return {grad, grad_weight, grad_bias, needs[3] ? request.as_given(dz) : Tensor()};
}

// -- autograd --------------------------------------------------------------------------------------------------------

template <class F>
auto operator_of(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// The gradients from differentiable operations, for a backward pass that is itself recorded and for `save_output`. It is
// written in Python, in autograd.py.
using Composed = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const optional<Tensor>&,
                                                            const optional<Tensor>&, const optional<Tensor>&,
                                                            const optional<Tensor>&, const Tensor&, const Tensor&,
                                                            c10::SymInt, optional<c10::string_view>, double, double, bool,
                                                            at::ScalarType, std::array<bool, 4>);

// What the backward pass needs besides tensors.
struct Rule : torch::CustomClassHolder {
  c10::SymInt groups;
  optional<std::string> activation;
  double negative_slope, eps;
  bool save_output;
  at::ScalarType bias_dtype;
  std::array<bool, 4> given;  // x, weight, bias, residual
};

struct ForwardOptions {
  const optional<Tensor>& index;
  c10::SymInt groups;
  optional<c10::string_view> activation;
  double negative_slope, eps;
  bool save_output;
  RunningOptions running;
};

// SyncedNorm in autograd.py saves the same tensors in the same order: activation checkpointing may repeat the forward
// pass of one by the other.
struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const optional<Tensor>& weight,
                        const optional<Tensor>& bias, const optional<Tensor>& residual,
                        const ForwardOptions& options) {
    static const auto forward_pass = operator_of("syncbn::batch_norm_forward", &batch_norm_forward);
    at::AutoDispatchBelowADInplaceOrView below;
    const RunningOptions& running = options.running;
    auto [y, moments, corrections] = forward_pass.call(
        x, weight, bias, options.index, options.groups, residual, options.activation, options.negative_slope,
        options.eps, running.mean, running.var, running.num_batches_tracked, running.num_nonfinite_batches,
        running.momentum, running.divisor, running.limits, running.update);
    auto rule = c10::make_intrusive<Rule>();
    rule->groups = options.groups;
    if (options.activation.has_value()) rule->activation = std::string(*options.activation);
    rule->negative_slope = options.negative_slope, rule->eps = options.eps, rule->save_output = options.save_output;
    rule->given = {true, get(weight) != nullptr, get(bias) != nullptr, get(residual) != nullptr};
    rule->bias_dtype = get(bias) ? bias->scalar_type() : at::kFloat;
    const bool activated = options.activation.has_value();
    // Not asked of the tensor: a compiled graph may be for any number of groups.
    const bool corrected = running.limits.has_value();
    ctx->save_for_backward(std::vector<Tensor>{options.save_output ? y : x, weight.value_or(Tensor()),
                            activated || options.save_output ? bias.value_or(Tensor()) : Tensor(),
                            activated ? residual.value_or(Tensor()) : Tensor(), options.index.value_or(Tensor()), moments,
                            corrected ? corrections : Tensor()});
    ctx->saved_data["rule"] = c10::IValue::make_capsule(std::move(rule));
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto backward_pass = operator_of("syncbn::batch_norm_backward", &batch_norm_backward);
    const auto saved = ctx->get_saved_variables();
    const auto capsule = ctx->saved_data["rule"].toCapsule();
    const Rule& rule = static_cast<const Rule&>(*capsule);
    const auto or_none = [](const Tensor& t) { return t.defined() ? optional<Tensor>(t) : std::nullopt; };
    std::array<bool, 4> needs{};
    for (size_t i = 0, edge = 0; i < needs.size(); ++i) needs[i] = rule.given[i] && ctx->needs_input_grad(edge++);
    optional<c10::string_view> activation;
    if (rule.activation.has_value()) activation = *rule.activation;
    const auto weight = or_none(saved[1]), bias = or_none(saved[2]), residual = or_none(saved[3]);
    const auto index = or_none(saved[4]);
    const Tensor corrections = saved[6].defined() ? saved[6] : at::empty({0}, saved[5].options());
    std::tuple<Tensor, Tensor, Tensor, Tensor> found;
    if (rule.save_output || at::GradMode::is_enabled()) {
      static const auto composed = operator_of("syncbn::composed_backward", static_cast<Composed*>(nullptr));
      found = composed.call(grads[0], saved[0], weight, bias, residual, index, saved[5], corrections, rule.groups,
                            activation, rule.negative_slope, rule.eps, rule.save_output, rule.bias_dtype, needs);
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      const bool needs_dz = needs[3] && activation.has_value();
      found = backward_pass.call(grads[0], saved[0], weight, bias, saved[5], corrections, index, rule.groups, residual,
                                 activation, rule.negative_slope, rule.bias_dtype,
                                 {needs[0], needs[1], needs[2], needs_dz});
      if (needs[3] && !needs_dz) std::get<3>(found) = grads[0];
    }
    auto& [x, of_weight, of_bias, of_residual] = found;
    return {x, of_weight, of_bias, of_residual, Tensor()};
  }
};

Tensor batch_norm(const Tensor& x, const optional<Tensor>& weight, const optional<Tensor>& bias, WHOLE, EPILOGUE,
                  double eps, bool save_output, RUNNING) {
  return BatchNorm::apply(
      x, weight, bias, residual,
      ForwardOptions{index, groups, activation, negative_slope, eps, save_output, RUNNING_OPTIONS});
}

Tensor batch_norm_without_autograd(const Tensor& x, const optional<Tensor>& weight, const optional<Tensor>& bias,
                                   WHOLE, EPILOGUE, double eps, bool, RUNNING) {
  return std::get<0>(batch_norm_forward(x, weight, bias, index, groups, residual, activation, negative_slope, eps,
                                        running_mean, running_var, tracked, nonfinite, momentum, divisor, limits,
                                        update));
}

// -- registration ----------------------------------------------------------------------------------------------------

const std::string GROUPS = "Tensor? index, int groups";
const std::string WHOLE_GROUPS = "Tensor? index, SymInt groups";  // a compiled graph may be for any batch
const std::string FINAL = "Tensor? residual, str? activation, float negative_slope";
const std::string AFFINE = "Tensor mean, Tensor invstd, Tensor? scale, Tensor? shift, ";
const std::string PARAMETERS = "Tensor x, Tensor? weight, Tensor? bias, ";
const std::string BUFFERS =
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor(d!)? num_nonfinite_batches, float? momentum, float? divisor, float[]? limits, bool update";

}  // namespace

TORCH_LIBRARY_FRAGMENT(syncbn, m) {
  const auto define = [&](const std::string& schema, auto function) {
    const std::string name = schema.substr(0, schema.find('('));
    // Inductor need not copy an input into the memory format that it had when the graph was traced.
    m.def(schema.c_str(), {at::Tag::flexible_layout});
    m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CPU, function));
    m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Autograd, torch::CppFunction::makeFallthrough()));
  };
  m.def("open(str path) -> ()", &open);
  define("group_sums(Tensor x, " + GROUPS + ") -> Tensor", &group_sums);
  define("finish(Tensor sums, float eps, " + BUFFERS + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)", &finish);
  define("normalize(Tensor x, " + AFFINE + GROUPS + ", " + FINAL + ") -> Tensor", &normalize);
  define("backward_sums(Tensor grad_output, Tensor x, " + AFFINE + GROUPS + ", " + FINAL + ") -> (Tensor, Tensor)",
         &backward_sums);
  define("grad_input(Tensor dz, Tensor x, " + AFFINE + "Tensor means, " + GROUPS +
             ", str? activation, float negative_slope) -> Tensor",
         &grad_input);
  define("batch_norm_forward(" + PARAMETERS + WHOLE_GROUPS + ", " + FINAL + ", float eps, " + BUFFERS +
             ") -> (Tensor, Tensor, Tensor)",
         &batch_norm_forward);
  define("batch_norm_backward(Tensor grad_output, " + PARAMETERS + "Tensor moments, Tensor corrections, " + WHOLE_GROUPS +
             ", " + FINAL + ", ScalarType bias_dtype, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
         &batch_norm_backward);
  m.def(("batch_norm(" + PARAMETERS + WHOLE_GROUPS + ", " + FINAL + ", float eps, bool save_output, " + BUFFERS +
         ") -> Tensor")
            .c_str());
  m.impl("batch_norm", torch::dispatch(c10::DispatchKey::AutogradCPU, &batch_norm));
  m.impl("batch_norm", torch::dispatch(c10::DispatchKey::CPU, &batch_norm_without_autograd));
}

}  // namespace syncbn
