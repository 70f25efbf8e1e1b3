// The ops as torch sees them: checks, types, and the choice of products.
#include <Python.h>
#include <torch/library.h>

#include <ATen/Context.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <cstdlib>
#include <exception>
#include <string>
#include <tuple>
#include <vector>

#include "head.h"
#include "pool.h"
#include "vector.h"

namespace mcpo {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Whether the processor has what oneDNN's products need, and its user left them to it. Where not,
// torch multiplies floats with a BLAS, and does not say so: asking for a product would not tell.
bool has_avx2() {
  const char* given = std::getenv("ONEDNN_MAX_CPU_ISA");
  const std::string most = given ? given : "";
  return runnable().front() != &k_baseline && most != "SSE41" && most != "AVX";
}

// Whether oneDNN multiplies this type here. It says so by refusing, and torch by refusing first,
// each with exceptions of its own.
template <class Op>
bool can_multiply() {
  static const bool found = [] {
    std::vector<Op> a(32 * 32, Op(1)), b(32 * 32, Op(1));
    std::vector<float> c(32 * 32);
    try {
      at::native::cpublas::brgemm(32, 32, 32, 32, 32, 32, false, a.data(), b.data(), c.data(),
                                  sizeof(Op) == 2);
      at::native::cpublas::brgemm_release(sizeof(Op) == 2);
    } catch (const std::exception&) {
      return false;
    }
    return c[0] == 32.0f && c[32 * 32 - 1] == 32.0f;
  }();
  return found;
}

// torch.backends.mkldnn switches oneDNN off and on at any time.
template <class Op>
bool has_product() {
  return at::globalContext().userEnabledMkldnn() && has_avx2() && can_multiply<Op>();
}

std::string capability() {
  const std::string bf16 = has_product<at::BFloat16>() ? "native bf16" : "bf16 as float32";
  const std::string fp32 = has_product<float>() ? "oneDNN" : "portable";
  return std::string(vector().name) + " loops, " + fp32 + " products, " + bf16;
}

void check(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
           const OptionalTensor& bias) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) &&
                  weight.numel() > 0,
              "hidden must be [N, D] and weight [V, D], got ", hidden.sizes(), " and ",
              weight.sizes());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == hidden.size(0) &&
                  targets.scalar_type() == at::kLong,
              "targets must be [N] int64, got ", targets.sizes(), " ", targets.scalar_type());
  TORCH_CHECK(weight.scalar_type() == hidden.scalar_type() &&
                  (!bias || bias->scalar_type() == hidden.scalar_type()),
              "weight and bias must have the dtype of hidden, got ", weight.scalar_type());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
              "bias must be [V], got ", bias->sizes());
}

// The arguments with contiguous rows, and what points into them.
template <class In, class Acc>
struct Inputs {
  Inputs(const Tensor& hidden_in, const Tensor& weight_in, const Tensor& targets_in,
         const OptionalTensor& bias_in, std::optional<double> softcap, double scale)
      : hidden(with_rows(hidden_in)), weight(with_rows(weight_in)), targets(targets_in.contiguous()) {
    if (bias_in)
      // Tiles read whole panels.
      bias = at::constant_pad_nd(bias_in->to(c10::CppTypeToScalarType<Acc>::value),
                                 {0, kColumns}, 0);
    problem = {hidden.const_data_ptr<In>(),
               hidden.stride(0),
               weight.const_data_ptr<In>(),
               weight.stride(0),
               targets.const_data_ptr<int64_t>(),
               hidden.size(0),
               hidden.size(1),
               weight.size(0),
               {bias_in ? bias.const_data_ptr<Acc>() : nullptr, static_cast<Acc>(softcap.value_or(0)),
                static_cast<Acc>(scale)}};
  }

  static Tensor with_rows(const Tensor& tensor) {
    return tensor.stride(1) == 1 ? tensor : tensor.contiguous();
  }

  Tensor hidden, weight, targets, bias;
  Problem<In, Acc> problem;
};

// Calls run(In, Op, Acc, portable) with values of the types that fit.
template <class Run>
void choose(at::ScalarType dtype, bool portable, const Run& run) {
  const bool plain = portable || !has_product<float>();
  if (dtype == at::kDouble)
    run(double(), double(), double(), true);
  else if (dtype == at::kFloat)
    run(float(), float(), float(), plain);
  else if (dtype == at::kHalf)
    run(at::Half(), float(), float(), plain);
  else if (portable || !has_product<at::BFloat16>())
    run(at::BFloat16(), float(), float(), plain);
  else
    run(at::BFloat16(), at::BFloat16(), float(), false);
}

bool known(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf ||
         dtype == at::kBFloat16;
}

// What the forward leaves for the backward, in the tensors of the op. Both may be empty.
template <class Acc>
Cache<Acc> cache_of(const Tensor& logits, const Tensor& panel_lse) {
  return {logits.numel() > 0 ? logits.data_ptr<Acc>() : nullptr,
          logits.numel() > 0 ? logits.size(0) : 0,
          panel_lse.numel() > 0 ? panel_lse.data_ptr<Acc>() : nullptr};
}

// (maximum [N], sum [N], target_logit [N], logits [cached_panels, N, 64], panel_lse [N, panels or
// 0]) of the columns at hand, of which a target need not be one.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> partial_op(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
    std::optional<double> softcap, double scale, int64_t cached_panels, bool needs_panel_lse,
    bool portable) {
  check(hidden, weight, targets, bias);
  TORCH_CHECK(known(hidden.scalar_type()), "no kernel for ", hidden.scalar_type());
  const int64_t num_tokens = hidden.size(0), num_panels = ceil_div(weight.size(0), kColumns);
  TORCH_CHECK(0 <= cached_panels && cached_panels <= num_panels, "cached_panels must be in [0, ",
              num_panels, "], got ", cached_panels);
  const auto dtype = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor maximum = at::empty({num_tokens}, dtype), sum = at::empty_like(maximum);
  Tensor target_logit = at::empty_like(maximum);
  Tensor logits = Pool::logits().take({cached_panels, num_tokens, kColumns}, dtype);
  Tensor panel_lse = at::empty({num_tokens, needs_panel_lse ? num_panels : 0}, dtype);
  if (num_tokens == 0) return {maximum, sum, target_logit, logits, panel_lse};
  choose(hidden.scalar_type(), portable, [&](auto in, auto op, auto acc, bool plain) {
    using In = decltype(in);
    using Acc = decltype(acc);
    const Inputs<In, Acc> inputs(hidden, weight, targets, bias, softcap, scale);
    const Partial<Acc> result{maximum.data_ptr<Acc>(), sum.data_ptr<Acc>(),
                              target_logit.data_ptr<Acc>()};
    forward<In, decltype(op), Acc>(inputs.problem, cache_of<Acc>(logits, panel_lse), result, plain);
  });
  return {maximum, sum, target_logit, logits, panel_lse};
}

// logp = (target - maximum) - log(sum): the difference of the large terms first loses nothing.
template <class Acc>
void finish_rows(const Tensor& maximum, const Tensor& sum, const Tensor& target_logit, Acc* logp,
                 Acc* lse) {
  const Acc* m = maximum.const_data_ptr<Acc>();
  const Acc* s = sum.const_data_ptr<Acc>();
  const Acc* z = target_logit.const_data_ptr<Acc>();
  at::parallel_for(0, maximum.numel(), 1024, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Acc log_sum = std::log(s[n]);
      logp[n] = (z[n] - m[n]) - log_sum;
      lse[n] = m[n] + log_sum;
    }
  });
}

// (logp [N], lse [N], logits and panel_lse as above)
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_op(const Tensor& hidden, const Tensor& weight,
                                                      const Tensor& targets,
                                                      const OptionalTensor& bias,
                                                      std::optional<double> softcap, double scale,
                                                      int64_t cached_panels, bool needs_panel_lse,
                                                      bool portable) {
  const auto [maximum, sum, target_logit, logits, panel_lse] = partial_op(
      hidden, weight, targets, bias, softcap, scale, cached_panels, needs_panel_lse, portable);
  Tensor logp = at::empty_like(maximum), lse = at::empty_like(maximum);
  if (maximum.scalar_type() == at::kDouble)
    finish_rows(maximum, sum, target_logit, logp.data_ptr<double>(), lse.data_ptr<double>());
  else
    finish_rows(maximum, sum, target_logit, logp.data_ptr<float>(), lse.data_ptr<float>());
  return {logp, lse, logits, panel_lse};
}

// Uninitialised. Up to 32 MiB malloc keeps what it is given back by itself.
Tensor gradient_like(const Tensor& weight) {
  constexpr int64_t kKeptByMalloc = int64_t{32} << 20;
  if (weight.numel() * weight.element_size() > kKeptByMalloc)
    return Pool::gradients().take(weight.sizes(), weight.scalar_type());
  const Tensor fresh = at::empty(weight.sizes(), weight.scalar_type());
  use_large_pages(fresh);
  return fresh;
}

// An empty tensor stands for a gradient that is not needed.
std::tuple<Tensor, Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& hidden,
                                               const Tensor& weight, const Tensor& targets,
                                               const OptionalTensor& bias, const Tensor& logp,
                                               const Tensor& lse, const Tensor& logits,
                                               const Tensor& panel_lse,
                                               std::optional<double> softcap, double scale,
                                               double filter_mass, bool needs_hidden,
                                               bool needs_weight, bool needs_bias, bool portable) {
  check(hidden, weight, targets, bias);
  TORCH_CHECK(known(hidden.scalar_type()), "no kernel for ", hidden.scalar_type());
  const auto dtype = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const Tensor& each : {grad, logp, lse})
    TORCH_CHECK(each.sizes() == targets.sizes() && each.scalar_type() == dtype,
                "grad, logp and lse must be [N] ", dtype, ", got ", each.sizes(), " ",
                each.scalar_type());
  const int64_t num_tokens = hidden.size(0), num_panels = ceil_div(weight.size(0), kColumns);
  TORCH_CHECK(logits.dim() == 3 && logits.size(0) <= num_panels && logits.size(1) == num_tokens &&
                  logits.size(2) == kColumns && logits.scalar_type() == dtype,
              "logits must be [panels, N, ", kColumns, "] ", dtype, ", got ", logits.sizes());
  TORCH_CHECK(panel_lse.dim() == 2 && panel_lse.size(0) == num_tokens &&
                  (panel_lse.size(1) == 0 || panel_lse.size(1) == num_panels) &&
                  panel_lse.scalar_type() == dtype,
              "panel_lse must be [N, 0 or ", num_panels, "] ", dtype, ", got ", panel_lse.sizes());
  TORCH_CHECK(0 <= filter_mass && filter_mass < 1 &&
                  (filter_mass == 0 || num_tokens == 0 || panel_lse.numel() > 0),
              "filter_mass must be in [0, 1), and 0 without panel_lse, got ", filter_mass);
  const Tensor row = grad.nonzero().squeeze(1);
  const bool none = row.numel() == 0;
  const auto options = hidden.options();
  Tensor dhidden = needs_hidden ? at::zeros(hidden.sizes(), options) : at::empty({0}, options);
  Tensor dweight = at::empty({0}, options), dbias = at::empty({0}, options);
  if (needs_weight)
    dweight = gradient_like(weight);
  if (none) dweight.zero_();
  if (needs_bias && bias) dbias = at::zeros(bias->sizes(), options);
  if (none || !(needs_hidden || needs_weight || (needs_bias && bias)))
    return {dhidden, dweight, dbias};

  const Tensor grads = grad.contiguous(), logps = logp.contiguous(), lses = lse.contiguous();
  const Tensor kept = logits.contiguous(), panel_lses = panel_lse.contiguous();
  choose(hidden.scalar_type(), portable, [&](auto in, auto op, auto acc, bool plain) {
    using In = decltype(in);
    using Acc = decltype(acc);
    const Inputs<In, Acc> inputs(hidden, weight, targets, bias, softcap, scale);
    const Upstream<In, Acc> upstream{row.const_data_ptr<int64_t>(),
                                     row.numel(),
                                     grads.const_data_ptr<Acc>(),
                                     logps.const_data_ptr<Acc>(),
                                     lses.const_data_ptr<Acc>(),
                                     cache_of<Acc>(kept, panel_lses),
                                     filter_mass,
                                     needs_hidden ? dhidden.data_ptr<In>() : nullptr,
                                     needs_weight ? dweight.data_ptr<In>() : nullptr,
                                     needs_bias && bias ? dbias.data_ptr<In>() : nullptr};
    backward<In, decltype(op), Acc>(inputs.problem, upstream, plain);
  });
  return {dhidden, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY(mcpo_cpu, library) {
  library.def("capability() -> str", &capability);
  library.def("cache_held() -> int", [] { return Pool::logits().held() + Pool::gradients().held(); });
  library.def("release_cache() -> ()", [] {
    Pool::logits().clear();
    Pool::gradients().clear();
  });
  library.def(
      "forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float? softcap, "
      "float scale, int cached_panels, bool needs_panel_lse, bool portable) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "partial(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float? softcap, "
      "float scale, int cached_panels, bool needs_panel_lse, bool portable) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "backward(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
      "Tensor logp, Tensor lse, Tensor logits, Tensor panel_lse, float? softcap, float scale, "
      "float filter_mass, bool needs_hidden, bool needs_weight, bool needs_bias, bool portable) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mcpo_cpu, CPU, library) {
  library.impl("forward", &forward_op);
  library.impl("partial", &partial_op);
  library.impl("backward", &backward_op);
}

}  // namespace mcpo

// Importing the module registers the ops; it has no other contents.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                   nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
