// torch.ops.deltatc.transcode and transcode_stats on the CPU: float64, float32, bfloat16 (which computes in float32).
// Parallel over blocks of tokens through torch's own thread pool; the instruction set is chosen when a call runs.
#include "transcode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../checks.h"

namespace deltatc {

constexpr int64_t kPanel = 256;      // latents encoded at a time
constexpr int64_t kDepth = 256;      // rows of W_enc packed at a time; also the length of a float32 partial sum
constexpr int64_t kGroup = 64;       // acts summed in Acc before they are added to the double total
constexpr int64_t kMaxRows = 240;    // tokens of a block: enough that packing W_enc is cheap beside using it
constexpr int64_t kListBytes = 16 << 20;  // of all lists of a block; large k means fewer tokens a block

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename Acc>
struct Act {
  Acc value;
  int64_t index;
};

// One token's active latents not yet decoded, and the statistics of those that are.
template <typename Acc>
struct List {
  Act<Acc>* acts;
  int64_t size;
  int64_t l0;
  double l1;
};

inline int64_t list_capacity(int64_t width, int64_t k) {
  return k < width ? std::min(2 * k, width) + kPanel : 4 * kPanel;
}

template <typename Acc>
void count_acts(List<Acc>& list) {
  list.l0 += list.size;
  for (int64_t i = 0; i < list.size; ++i) list.l1 += static_cast<double>(list.acts[i].value);
}

// Keeps the k largest (ties: lower index), in order of index.
template <typename Acc>
void keep_largest(List<Acc>& list, int64_t k) {
  if (list.size <= k) return;
  Act<Acc>* end = list.acts + list.size;
  std::nth_element(list.acts, list.acts + k, end, [](const Act<Acc>& a, const Act<Acc>& b) {
    return a.value != b.value ? a.value > b.value : a.index < b.index;
  });
  list.size = k;
  std::sort(list.acts, list.acts + k, [](const Act<Acc>& a, const Act<Acc>& b) { return a.index < b.index; });
}

// Uninitialised memory on a cache line's boundary: a vector load never straddles two.
template <typename V>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<V*>(::operator new(size * sizeof(V), kAlign))) {}
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  V* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  V* data_;
};

// What one thread needs for a block of `rows` tokens.
template <typename Acc>
struct Workspace {
  Workspace(int64_t rows, int64_t d_model, int64_t capacity)
      : tokens(rows * d_model), latents(kDepth * kPanel), pre(rows * kPanel), acts(rows * capacity),
        total(rows * d_model), broken(2 * rows), lists(rows) {}
  Scratch<Acc> tokens, latents, pre;
  Scratch<Act<Acc>> acts;
  Scratch<double> total;
  Scratch<bool> broken;
  std::vector<List<Acc>> lists;
};

}  // namespace deltatc

#define DTC_TARGET
#define DTC_ISA generic
#define DTC_BYTES 16
#define DTC_ROWS 4
namespace deltatc {
#include "transcode_block.inc"
}
#undef DTC_TARGET
#undef DTC_ISA
#undef DTC_BYTES
#undef DTC_ROWS

#if defined(__x86_64__)
#define DTC_TARGET __attribute__((target("avx2,fma")))
#define DTC_ISA avx2
#define DTC_BYTES 32
#define DTC_ROWS 6
namespace deltatc {
#include "transcode_block.inc"
}
#undef DTC_TARGET
#undef DTC_ISA
#undef DTC_BYTES
#undef DTC_ROWS

#define DTC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define DTC_ISA avx512
#define DTC_BYTES 64
#define DTC_ROWS 12
namespace deltatc {
#include "transcode_block.inc"
}
#endif

namespace deltatc {

namespace {

enum class Isa { generic, avx2, avx512 };

#if defined(__x86_64__)
const std::vector<std::pair<const char*, Isa>> kCompiled = {
    {"avx512", Isa::avx512}, {"avx2", Isa::avx2}, {"generic", Isa::generic}};
#else
const std::vector<std::pair<const char*, Isa>> kCompiled = {{"generic", Isa::generic}};
#endif

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::generic;
}

// The widest set that this CPU has; DELTATC_CPU_KERNEL names another one, so that tests reach them all.
std::pair<const char*, Isa> chosen_isa() {
  const char* wanted = std::getenv("DELTATC_CPU_KERNEL");
  for (const auto& isa : kCompiled) {
    if (runs_here(isa.second) && (wanted == nullptr || std::strcmp(wanted, isa.first) == 0)) return isa;
  }
  STD_TORCH_CHECK(false, "DELTATC_CPU_KERNEL = ", wanted, "; expected generic, or avx2 or avx512 where the CPU has it");
}

std::string cpu_kernels() {
  const auto chosen = chosen_isa();
  std::string names = chosen.first;
  for (const auto& isa : kCompiled) {
    if (isa.second != chosen.second) names += std::string(" ") + isa.first;
  }
  return names;
}

template <typename T>
void run(const Transcode<T>& job) {
  using Acc = Accumulator<T>;
  constexpr int64_t kTile = 12;  // a multiple of every DTC_ROWS, so that a block's padded rows fit
  const int64_t capacity = std::max(list_capacity(job.base.width, job.base.k),
                                    list_capacity(job.delta.width, job.delta.k));
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = (job.tokens + threads - 1) / threads;
  const int64_t room = std::max<int64_t>(1, std::min(kMaxRows, kListBytes / int64_t(capacity * sizeof(Act<Acc>))));
  const int64_t rounds = std::max<int64_t>(1, (share + room - 1) / room);  // as many blocks for each thread
  const int64_t rows = std::max<int64_t>(1, (share + rounds * kTile - 1) / (rounds * kTile)) * kTile;
  const int64_t blocks = (job.tokens + rows - 1) / rows;
  const auto run_block = [isa = chosen_isa().second](auto&&... arguments) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::run_block<T>(arguments...);
    if (isa == Isa::avx2) return avx2::run_block<T>(arguments...);
#endif
    return generic::run_block<T>(arguments...);
  };
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Workspace<Acc> work(rows, job.d_model, capacity);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t token = block * rows;
      run_block(job, token, std::min(rows, job.tokens - token), work);
    }
  });
}

// The five tensors of one part, contiguous. Held while the kernel reads their pointers.
struct PartTensors {
  PartTensors(const char* prefix, const Tensor& x, const Tensor& enc, const Tensor& b_enc, const Tensor& threshold,
              const Tensor& dec, const Tensor& b_dec) {
    const auto name = [&](const char* field) { return std::string(prefix) + field; };
    STD_TORCH_CHECK(enc.dim() == 2, name("W_enc"), " has shape ", shape_text(enc), "; expected [d_model, d_sae]");
    const int64_t d_model = x.size(x.dim() - 1);
    width = enc.size(1);
    check_like(name("W_enc").c_str(), enc, x, {d_model, width});
    check_like(name("b_enc").c_str(), b_enc, x, {width});
    check_like(name("threshold").c_str(), threshold, x, {width});
    check_like(name("W_dec").c_str(), dec, x, {width, d_model});
    check_like(name("b_dec").c_str(), b_dec, x, {d_model});
    for (const Tensor* tensor : {&enc, &b_enc, &threshold, &dec, &b_dec}) {
      tensors.push_back(torch::stable::contiguous(*tensor));
    }
  }

  template <typename T>
  Part<T> part(const std::optional<int64_t>& k) const {
    const auto pointer = [&](int i) { return static_cast<const T*>(tensors[i].data_ptr()); };
    return {pointer(0), pointer(1), pointer(2), pointer(3), pointer(4), width, k.value_or(width)};
  }

  std::vector<Tensor> tensors;
  int64_t width = 0;
};

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using MaybeTensor = std::optional<Tensor>;
using MaybeInt = std::optional<int64_t>;

Stats run_checked(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& threshold,
                  const Tensor& W_dec, const Tensor& b_dec, const MaybeTensor& delta_W_enc,
                  const MaybeTensor& delta_b_enc, const MaybeTensor& delta_threshold, const MaybeTensor& delta_W_dec,
                  const MaybeTensor& delta_b_dec, const Tensor& alpha, const MaybeInt& k_base,
                  const MaybeInt& k_delta, double bandwidth, bool want_stats) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() >= 1, "x is a scalar; expected [..., d_model]");
  STD_TORCH_CHECK(x.is_cpu(), "x is not on the CPU");
  STD_TORCH_CHECK(alpha.dim() == 0 && alpha.is_cpu(), "alpha has shape ", shape_text(alpha),
                  "; expected a scalar [] on the CPU");
  STD_TORCH_CHECK(std::isfinite(bandwidth) && bandwidth > 0, "bandwidth = ", bandwidth, "; expected more than 0");
  const PartTensors base("", x, W_enc, b_enc, threshold, W_dec, b_dec);
  check_k("k_base", k_base, base.width);
  const bool has_delta = delta_W_enc.has_value();
  for (const MaybeTensor* tensor : {&delta_b_enc, &delta_threshold, &delta_W_dec, &delta_b_dec}) {
    STD_TORCH_CHECK(tensor->has_value() == has_delta, "the delta_* tensors: expected all five or none");
  }
  STD_TORCH_CHECK(has_delta || !k_delta, "k_delta is given without a delta");
  std::optional<PartTensors> delta;
  if (has_delta) {
    delta.emplace("delta_", x, *delta_W_enc, *delta_b_enc, *delta_threshold, *delta_W_dec, *delta_b_dec);
    check_k("k_delta", k_delta, delta->width);
  }

  const int64_t d_model = x.size(x.dim() - 1);
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor recon = torch::stable::empty(x.sizes(), x.scalar_type());
  const std::vector<int64_t> leading(x.sizes().begin(), x.sizes().end() - 1);
  const std::vector<int64_t> stats_shape = want_stats ? leading : std::vector<int64_t>{0};
  std::vector<Tensor> stats;
  for (int i = 0; i < 4; ++i) stats.push_back(torch::stable::empty(stats_shape, ScalarType::Float));
  if (want_stats && !has_delta) {
    for (int i = 2; i < 4; ++i) torch::stable::zero_(stats[i]);
  }
  const Tensor scale = torch::stable::to(alpha, ScalarType::Double);

  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    const auto ask = [&](Part<T> part, int first) {
      if (want_stats) {
        part.l0 = static_cast<float*>(stats[first].data_ptr());
        part.l1 = static_cast<float*>(stats[first + 1].data_ptr());
      }
      return part;
    };
    Transcode<T> job;
    job.tokens = 1;
    for (int64_t size : leading) job.tokens *= size;
    job.d_model = d_model;
    job.x = static_cast<const T*>(rows.data_ptr());
    job.recon = static_cast<T*>(recon.data_ptr());
    job.base = ask(base.part<T>(k_base), 0);
    job.has_delta = has_delta;
    if (has_delta) job.delta = ask(delta->part<T>(k_delta), 2);
    job.alpha = *static_cast<const double*>(scale.data_ptr());
    run(job);
  };
  switch (x.scalar_type()) {
    case ScalarType::Double: launch(double()); break;
    case ScalarType::Float: launch(float()); break;
    case ScalarType::BFloat16: launch(c10::BFloat16()); break;
    default: STD_TORCH_CHECK(false, "x has a dtype without a CPU kernel; expected float64, float32 or bfloat16");
  }
  return {recon, stats[0], stats[1], stats[2], stats[3]};
}

Tensor transcode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec,
                 MaybeTensor delta_W_enc, MaybeTensor delta_b_enc, MaybeTensor delta_threshold,
                 MaybeTensor delta_W_dec, MaybeTensor delta_b_dec, Tensor alpha, MaybeInt k_base, MaybeInt k_delta,
                 double bandwidth) {
  return std::get<0>(run_checked(x, W_enc, b_enc, threshold, W_dec, b_dec, delta_W_enc, delta_b_enc, delta_threshold,
                                 delta_W_dec, delta_b_dec, alpha, k_base, k_delta, bandwidth, false));
}

Stats transcode_stats(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec,
                      MaybeTensor delta_W_enc, MaybeTensor delta_b_enc, MaybeTensor delta_threshold,
                      MaybeTensor delta_W_dec, MaybeTensor delta_b_dec, Tensor alpha, MaybeInt k_base,
                      MaybeInt k_delta, double bandwidth) {
  return run_checked(x, W_enc, b_enc, threshold, W_dec, b_dec, delta_W_enc, delta_b_enc, delta_threshold, delta_W_dec,
                     delta_b_dec, alpha, k_base, k_delta, bandwidth, true);
}

}  // namespace
}  // namespace deltatc

STABLE_TORCH_LIBRARY_IMPL(deltatc, CPU, m) {
  m.impl("transcode", TORCH_BOX(&deltatc::transcode));
  m.impl("transcode_stats", TORCH_BOX(&deltatc::transcode_stats));
}

STABLE_TORCH_LIBRARY_IMPL(deltatc, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&deltatc::cpu_kernels));
}
