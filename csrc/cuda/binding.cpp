// torch.ops.deltatc for CUDA tensors: checks, memory and the stream; kernels.h does the rest. The tests compile this file
// with DELTATC_HOST_SHIM and CPU tensors instead: then all but `current_stream` and the key is the same.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "kernels.h"

#ifdef DELTATC_HOST_SHIM
#define DTC_LIBRARY deltatc_shim
#define DTC_KEY CPU
#else
#include <dlfcn.h>
#define DTC_LIBRARY deltatc
#define DTC_KEY CUDA
#endif

namespace deltatc {
namespace {

using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;
using MaybeInt = std::optional<int64_t>;

#ifdef DELTATC_HOST_SHIM
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};

cudaStream_t current_stream(const Tensor&) { return nullptr; }
#else
struct OnDevice {
  explicit OnDevice(const Tensor& x) : guard(x.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

// Every CUDA build of torch exports this function, a CPU build does not: so it is looked for when it is needed.
cudaStream_t current_stream(const Tensor& x) {
  using Find = int32_t (*)(int32_t, void**);
  static const Find find = reinterpret_cast<Find>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(find != nullptr, "this torch has no CUDA; expected a CUDA build of torch for a tensor on a CUDA device");
  void* stream = nullptr;
  STD_TORCH_CHECK(find(x.get_device_index(), &stream) == 0, "the current CUDA stream cannot be had");
  return static_cast<cudaStream_t>(stream);
}
#endif

void check_launch(int error, const char* name) {
  STD_TORCH_CHECK(error == 0, name, " failed with CUDA error ", error, "; expected 0 (look it up as cudaError_t)");
}

const bf16* values_of(const Tensor& tensor) { return static_cast<const bf16*>(tensor.data_ptr()); }

// Tensors of a part, contiguous, and held until the kernels are launched (torch's allocator keeps their memory in order).
struct PartTensors {
  PartTensors(const std::string& prefix, const Tensor& x, const Tensor& packed, const Tensor& b_enc,
              const Tensor& threshold, const Tensor& W_dec, const Tensor& b_dec) {
    const int64_t d_model = x.size(x.dim() - 1), width = b_enc.numel();
    check_like((prefix + "packed").c_str(), packed, x, {width, d_model});
    check_like((prefix + "b_enc").c_str(), b_enc, x, {width});
    check_like((prefix + "threshold").c_str(), threshold, x, {width});
    check_like((prefix + "W_dec").c_str(), W_dec, x, {width, d_model});
    check_like((prefix + "b_dec").c_str(), b_dec, x, {d_model});
    STD_TORCH_CHECK(width < int64_t{1} << 31, prefix, "b_enc has ", width, " latents; expected less than 2^31");
    for (const Tensor* tensor : {&packed, &b_enc, &threshold, &W_dec, &b_dec}) {
      held.push_back(torch::stable::contiguous(*tensor));
    }
    part.W_enc = values_of(held[0]);
    part.b_enc = values_of(held[1]);
    part.threshold = values_of(held[2]);
    part.W_dec = values_of(held[3]);
    part.b_dec = values_of(held[4]);
    part.width = static_cast<int32_t>(width);
  }
  std::vector<Tensor> held;
  CudaPart part{};
};

int64_t check_tokens(const Tensor& x, const Tensor& alpha) {
  STD_TORCH_CHECK(x.dim() >= 1, "x is a scalar; expected [..., d_model]");
  const int64_t d_model = x.size(x.dim() - 1);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 && d_model >= 8 && d_model % 8 == 0 && d_model <= kMaxModel,
                  "x has shape ", shape_text(x), "; expected bfloat16 [..., d_model], d_model a multiple of 8 up to ",
                  kMaxModel);
  STD_TORCH_CHECK(alpha.dim() == 0 && alpha.is_cpu() == x.is_cpu(), "alpha has shape ", shape_text(alpha),
                  "; expected a scalar [] beside x");
  return d_model;
}

int32_t check_limit(const char* name, const MaybeInt& k, int32_t width) {
  check_k(name, k, width);
  if (!k || *k == width) return 0;
  STD_TORCH_CHECK(*k <= kMaxKeys, name, " = ", *k, "; expected at most ", kMaxKeys, " on a CUDA device");
  return static_cast<int32_t>(*k);
}

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Stats transcode_packed(Tensor x, Tensor rows, MaybeTensor, Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec,
                       MaybeTensor delta_rows, MaybeTensor, MaybeTensor delta_b_enc, MaybeTensor delta_threshold,
                       MaybeTensor delta_W_dec, MaybeTensor delta_b_dec, Tensor alpha, MaybeInt k_base,
                       MaybeInt k_delta, bool want_stats) {
  const int64_t d_model = check_tokens(x, alpha);
  const OnDevice here(x);
  const bool has_delta = delta_rows.has_value();
  for (const MaybeTensor* tensor : {&delta_b_enc, &delta_threshold, &delta_W_dec, &delta_b_dec}) {
    STD_TORCH_CHECK(tensor->has_value() == has_delta, "the delta_* tensors: expected all five or none");
  }
  STD_TORCH_CHECK(has_delta || !k_delta, "k_delta is given without a delta");
  std::vector<PartTensors> parts;
  parts.emplace_back("", x, rows, b_enc, threshold, W_dec, b_dec);
  parts[0].part.k = check_limit("k_base", k_base, parts[0].part.width);
  if (has_delta) {
    parts.emplace_back("delta_", x, *delta_rows, *delta_b_enc, *delta_threshold, *delta_W_dec, *delta_b_dec);
    parts[1].part.k = check_limit("k_delta", k_delta, parts[1].part.width);
  }
  const Tensor tokens = torch::stable::contiguous(x);
  const Tensor scale = torch::stable::to(alpha, ScalarType::Float);
  const Tensor recon = torch::stable::new_empty(x, x.sizes());
  const std::vector<int64_t> leading(x.sizes().begin(), x.sizes().end() - 1);
  std::vector<Tensor> stats;
  for (int i = 0; i < 4; ++i) {
    const auto shape = want_stats ? leading : std::vector<int64_t>{0};
    stats.push_back(torch::stable::new_empty(x, shape, ScalarType::Float));
    if (want_stats && i >= 2 && !has_delta) torch::stable::zero_(stats[i]);
  }

  CudaTranscode job{};
  job.x = values_of(tokens);
  job.recon = static_cast<bf16*>(recon.data_ptr());
  job.alpha = static_cast<const float*>(scale.data_ptr());
  job.tokens = 1;
  for (int64_t size : leading) job.tokens *= size;
  job.d_model = static_cast<int32_t>(d_model);
  job.n_parts = static_cast<int32_t>(parts.size());
  for (size_t p = 0; p < parts.size(); ++p) {
    job.parts[p] = parts[p].part;
    if (!want_stats) continue;
    job.parts[p].l0 = static_cast<float*>(stats[2 * p].data_ptr());
    job.parts[p].l1 = static_cast<float*>(stats[2 * p + 1].data_ptr());
  }
  if (job.tokens > 0) {
    const Tensor workspace = torch::stable::new_empty(x, {transcode_workspace(job)}, ScalarType::Byte);
    check_launch(transcode(job, workspace.data_ptr(), current_stream(x)), "transcode");
  }
  return {recon, stats[0], stats[1], stats[2], stats[3]};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients delta_backward(Tensor grad, Tensor x, Tensor packed, Tensor b_enc, Tensor threshold, Tensor W_dec,
                         Tensor b_dec, Tensor alpha, double bandwidth, int64_t needed) {
  const int64_t d_model = check_tokens(x, alpha);
  const OnDevice here(x);
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type() && grad.is_cpu() == x.is_cpu(),
                  "grad has shape ", shape_text(grad), "; expected that of x, ", shape_text(x), ", its dtype and device");
  const PartTensors delta("delta_", x, packed, b_enc, threshold, W_dec, b_dec);
  const int64_t width = delta.part.width;
  const Tensor rows = torch::stable::contiguous(x), grads = torch::stable::contiguous(grad);
  const Tensor scale = torch::stable::to(alpha, ScalarType::Float);
  const std::vector<int64_t> shapes[6] = {{d_model, width}, {width}, {width}, {width, d_model}, {d_model}, {}};
  std::vector<Tensor> found;
  for (int i = 0; i < 6; ++i) {
    const auto shape = needed >> i & 1 ? shapes[i] : std::vector<int64_t>{0};
    found.push_back(torch::stable::new_empty(x, shape, ScalarType::Float));
    torch::stable::zero_(found[i]);
  }
  const auto wanted = [&](int i) {
    return needed >> i & 1 && found[i].numel() > 0 ? static_cast<float*>(found[i].data_ptr()) : nullptr;
  };
  CudaBackward job{};
  job.x = values_of(rows);
  job.grad = values_of(grads);
  job.alpha = static_cast<const float*>(scale.data_ptr());
  job.tokens = x.numel() / d_model;
  job.d_model = static_cast<int32_t>(d_model);
  job.bandwidth = static_cast<float>(bandwidth);
  job.delta = delta.part;
  job.W_enc = wanted(0), job.b_enc = wanted(1), job.threshold = wanted(2);
  job.W_dec = wanted(3), job.b_dec = wanted(4), job.scale = wanted(5);
  if (job.tokens > 0) {
    const Tensor workspace = torch::stable::new_empty(x, {backward_workspace(job)}, ScalarType::Byte);
    check_launch(backward(job, workspace.data_ptr(), current_stream(x)), "delta_backward");
  }
  return {found[0], found[1], found[2], found[3], found[4], found[5]};
}

#ifdef DELTATC_HOST_SHIM
int64_t workspace(int64_t tokens, int64_t d_model, int64_t width, int64_t d_new, MaybeInt k) {
  CudaTranscode job{};
  job.tokens = tokens, job.d_model = static_cast<int32_t>(d_model), job.n_parts = 2;
  job.parts[0].width = static_cast<int32_t>(width), job.parts[1].width = static_cast<int32_t>(d_new);
  for (CudaPart& part : job.parts) part.k = static_cast<int32_t>(k.value_or(0));
  return transcode_workspace(job);
}
#endif

}  // namespace
}  // namespace deltatc

#ifdef DELTATC_HOST_SHIM
STABLE_TORCH_LIBRARY(deltatc_shim, m) {
  m.def("transcode_packed(Tensor x, Tensor rows, Tensor? screen, Tensor b_enc, Tensor threshold, Tensor W_dec, "
        "Tensor b_dec, Tensor? delta_rows, Tensor? delta_screen, Tensor? delta_b_enc, Tensor? delta_threshold, "
        "Tensor? delta_W_dec, Tensor? delta_b_dec, Tensor alpha, int? k_base, int? k_delta, bool want_stats) "
        "-> (Tensor recon, Tensor l0_base, Tensor l1_base, Tensor l0_delta, Tensor l1_delta)");
  m.def("delta_backward(Tensor grad, Tensor x, Tensor packed, Tensor b_enc, Tensor threshold, Tensor W_dec, "
        "Tensor b_dec, Tensor alpha, float bandwidth, int needed) "
        "-> (Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec, Tensor alpha)");
  m.def("workspace(int tokens, int d_model, int width, int d_new, int? k) -> int");  // bytes, for the tests
}

STABLE_TORCH_LIBRARY_IMPL(deltatc_shim, CompositeExplicitAutograd, m) {
  m.impl("workspace", TORCH_BOX(&deltatc::workspace));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(DTC_LIBRARY, DTC_KEY, m) {
  m.impl("transcode_packed", TORCH_BOX(&deltatc::transcode_packed));
  m.impl("delta_backward", TORCH_BOX(&deltatc::delta_backward));
}
