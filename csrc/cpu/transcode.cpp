// torch.ops.deltatc.transcode, transcode_stats and pack on the CPU: float64, float32, bfloat16 (which computes in
// float32). Parallel through torch's own thread pool, over blocks of tokens, or over panels of latents where tokens are
// few; the instruction set is chosen when a call runs.
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

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../checks.h"

namespace deltatc {

constexpr int64_t kStrip = 32;     // latents side by side in a packed W_enc
constexpr int64_t kPanel = 256;    // latents encoded at a time
constexpr int64_t kDepth = 1152;   // steps multiplied at a time; also the length of a float32 partial sum
constexpr int64_t kGroup = 64;     // acts summed in Acc before they are added to the double total
constexpr int64_t kFew = 128;      // up to so many tokens, threads share the latents instead of the tokens
constexpr int64_t kMaxRows = 240;  // tokens of a block: so many use each weight while it is in cache
constexpr int64_t kListBytes = 16 << 20;  // of all lists of a block; large k means fewer tokens a block

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr int64_t steps(int64_t d_model) {
  return (d_model + kPerStep<T> - 1) / kPerStep<T>;
}

constexpr int64_t strips(int64_t width) { return (width + kStrip - 1) / kStrip; }

template <typename Acc>
struct Act {
  Acc value;
  int32_t index;
};

// One token's active latents not yet decoded, and the statistics of those that are.
template <typename Acc>
struct List {
  Act<Acc>* acts = nullptr;
  int64_t size = 0;
  Acc floor = 0;  // what is not above it cannot be among the k largest any more
  int64_t l0 = 0;
  double l1 = 0.0;
};

inline int64_t list_capacity(int64_t width, int64_t k) {
  return k < width ? std::min(2 * k, width) + kPanel : 4 * kPanel;
}

template <typename Acc>
void count_acts(List<Acc>& list, int64_t n) {
  list.l0 += n;
  for (int64_t i = 0; i < n; ++i) list.l1 += static_cast<double>(list.acts[i].value);
}

// Keeps the k largest (ties: lower index), in order of index. Later latents have higher indices, so a tie with the
// k-th loses: only what is above it can still enter.
template <typename Acc>
void keep_largest(List<Acc>& list, int64_t k) {
  if (list.size < k) return;
  Act<Acc>* end = list.acts + list.size;
  std::nth_element(list.acts, list.acts + (k - 1), end, [](const Act<Acc>& a, const Act<Acc>& b) {
    return a.value != b.value ? a.value > b.value : a.index < b.index;
  });
  list.floor = list.acts[k - 1].value;
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

// W_enc [d_model, width], contiguous -> [strip][step][kStrip], zeros behind the last latent and the last row.
template <typename T>
void pack_latents(const T* W_enc, int64_t d_model, int64_t width, Packed<T>* packed) {
  const int64_t n_steps = steps<T>(d_model);
  torch::stable::parallel_for(0, strips(width), 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kStrip, count = std::min(kStrip, width - first);
      Packed<T>* out = packed + strip * n_steps * kStrip;
      for (int64_t i = 0; i < d_model; i += kPerStep<T>, out += kStrip) {
        const T* from = W_enc + i * width + first;
        for (int64_t j = 0; j < kStrip; ++j) {
          if constexpr (kPerStep<T> == 2) {
            const uint32_t even = j < count ? from[j].x : 0, odd = j < count && i + 1 < d_model ? from[width + j].x : 0;
            out[j] = even | odd << 16;
          } else {
            out[j] = j < count ? from[j] : T(0);
          }
        }
      }
    }
  });
}

}  // namespace deltatc

#define DTC_TARGET
#define DTC_ISA generic
#define DTC_BYTES 16
#define DTC_ROWS 4
#define DTC_DOT 0
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
#undef DTC_TARGET
#undef DTC_ISA
#undef DTC_DOT

#define DTC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define DTC_ISA avx512bf16
#define DTC_DOT 1
namespace deltatc {
#include "transcode_block.inc"
}
#endif

namespace deltatc {

namespace {

enum class Isa { generic, avx2, avx512, avx512bf16 };

#if defined(__x86_64__)
const std::vector<std::pair<const char*, Isa>> kCompiled = {{"avx512bf16", Isa::avx512bf16},
                                                            {"avx512", Isa::avx512},
                                                            {"avx2", Isa::avx2},
                                                            {"generic", Isa::generic}};
#else
const std::vector<std::pair<const char*, Isa>> kCompiled = {{"generic", Isa::generic}};
#endif

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx512) return avx512;
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
  STD_TORCH_CHECK(false, "DELTATC_CPU_KERNEL = ", wanted, "; expected generic, or avx2, avx512 or avx512bf16 where the CPU has it");
}

std::string cpu_kernels() {
  const auto chosen = chosen_isa();
  std::string names = chosen.first;
  for (const auto& isa : kCompiled) {
    if (isa.second != chosen.second) names += std::string(" ") + isa.first;
  }
  return names;
}

// One instruction set's inner parts, by pointer.
template <typename T>
struct Kernels {
  using Acc = Accumulator<T>;
  int64_t tile_rows;
  decltype(&generic::pack_tokens<T>) pack_tokens;
  decltype(&generic::encode_panel<T>) encode_panel;
  decltype(&generic::append_active<Acc>) append_active;
  decltype(&generic::decode<T, Acc>) decode;
};

template <typename T>
Kernels<T> kernels() {
  using Acc = Accumulator<T>;
#define DTC_KERNELS(isa, rows) \
  Kernels<T> { rows, &isa::pack_tokens<T>, &isa::encode_panel<T>, &isa::append_active<Acc>, &isa::decode<T, Acc> }
  switch (chosen_isa().second) {
#if defined(__x86_64__)
    case Isa::avx512bf16: return DTC_KERNELS(avx512bf16, 12);
    case Isa::avx512: return DTC_KERNELS(avx512, 12);
    case Isa::avx2: return DTC_KERNELS(avx2, 6);
#endif
    default: return DTC_KERNELS(generic, 4);
  }
#undef DTC_KERNELS
}

constexpr int64_t kTile = 12;  // a multiple of every instruction set's tile_rows, so that padded rows fit

int64_t padded(int64_t rows) { return (rows + kTile - 1) / kTile * kTile; }

// Both parts, in the order in which they are computed.
template <typename T>
struct Scaled {
  const Part<T>* part;
  double scale;
};

template <typename T>
std::vector<Scaled<T>> parts_of(const Transcode<T>& job) {
  std::vector<Scaled<T>> parts = {{&job.base, 1.0}};
  if (job.has_delta && (job.alpha != 0.0 || job.delta.l0 != nullptr)) parts.push_back({&job.delta, job.alpha});
  return parts;
}

// A panel's b_enc and threshold in Acc; a negative threshold acts as 0.
template <typename T>
struct PanelBias {
  using Acc = Accumulator<T>;
  PanelBias(const Part<T>& part, int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      bias[j] = static_cast<Acc>(part.b_enc[first + j]);
      const Acc raw = static_cast<Acc>(part.threshold[first + j]);
      threshold[j] = raw < 0 ? Acc(0) : raw;
    }
  }
  Acc bias[kPanel], threshold[kPanel];
};

// total += scale * (acts @ W_dec); all acts of the list when `all`, else whole groups of kGroup. What remains moves to
// the front, so that a row's groups are the same however often its list was emptied.
template <typename T>
void flush(const Kernels<T>& kernel, const Part<T>& part, int64_t d_model, double scale, bool all,
           List<Accumulator<T>>& list, Accumulator<T>* sums, double* total) {
  const int64_t n = all ? list.size : list.size / kGroup * kGroup;
  count_acts(list, n);
  if (scale != 0.0) kernel.decode(list.acts, n, part.W_dec, d_model, scale, sums, total);
  std::copy(list.acts + n, list.acts + list.size, list.acts);
  list.size -= n;
}

template <typename T>
void add_b_dec(const Part<T>& part, int64_t d_model, double scale, double* total) {
  if (scale == 0.0) return;
  for (int64_t i = 0; i < d_model; ++i) total[i] += scale * static_cast<double>(static_cast<Accumulator<T>>(part.b_dec[i]));
}

template <typename T>
void write_stats(const Part<T>& part, int64_t token, const List<Accumulator<T>>& list, bool broken) {
  if (part.l0 == nullptr) return;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  part.l0[token] = broken ? nan : static_cast<float>(list.l0);
  part.l1[token] = broken ? nan : static_cast<float>(list.l1);
}

template <typename T>
void write_recon(const Transcode<T>& job, int64_t token, const double* total, bool broken) {
  T* to = job.recon + token * job.d_model;
  for (int64_t i = 0; i < job.d_model; ++i) {
    to[i] = static_cast<T>(static_cast<Accumulator<T>>(broken ? std::numeric_limits<double>::quiet_NaN() : total[i]));
  }
}

// Many tokens: each thread takes whole blocks of them through all latents.
template <typename T>
void run_blocks(const Transcode<T>& job) {
  using Acc = Accumulator<T>;
  const Kernels<T> kernel = kernels<T>();
  const int64_t d_model = job.d_model;
  const int64_t capacity = std::max(list_capacity(job.base.width, job.base.k),
                                    list_capacity(job.delta.width, job.delta.k));
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = (job.tokens + threads - 1) / threads;
  const int64_t room = std::max<int64_t>(1, std::min(kMaxRows, kListBytes / int64_t(capacity * sizeof(Act<Acc>))));
  const int64_t rounds = std::max<int64_t>(1, (share + room - 1) / room);  // as many blocks for each thread
  const int64_t block_rows = padded((share + rounds - 1) / rounds);
  torch::stable::parallel_for(0, (job.tokens + block_rows - 1) / block_rows, 1, [&](int64_t begin, int64_t end) {
    const Scratch<Acc> tokens(block_rows * (d_model + 1)), pre(block_rows * kPanel), sums(d_model);
    const Scratch<Act<Acc>> acts(block_rows * capacity);
    const Scratch<double> total(block_rows * d_model);
    const Scratch<bool> not_finite(block_rows), broken(block_rows), spoiled(block_rows);
    std::vector<List<Acc>> lists(block_rows);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t token = block * block_rows, rows = std::min(block_rows, job.tokens - token);
      kernel.pack_tokens(job.x + token * d_model, rows, d_model, tokens.get(), not_finite.get());
      std::fill_n(total.get(), rows * d_model, 0.0);
      std::fill_n(spoiled.get(), rows, false);
      for (const auto& [part, scale] : parts_of(job)) {
        const bool limited = part->k < part->width;
        std::copy_n(not_finite.get(), rows, broken.get());
        for (int64_t row = 0; row < rows; ++row) {
          lists[row] = {acts.get() + row * capacity};
          add_b_dec(*part, d_model, scale, total.get() + row * d_model);
        }
        for (int64_t first = 0; first < part->width; first += kPanel) {
          const int64_t count = std::min(kPanel, part->width - first);
          kernel.encode_panel(part->packed + first * steps<T>(d_model), count, tokens.get(), rows, d_model, pre.get());
          const PanelBias<T> panel(*part, first, count);
          for (int64_t row = 0; row < rows; ++row) {
            List<Acc>& list = lists[row];
            if (list.size + count > capacity) {
              if (limited) {
                keep_largest(list, part->k);
              } else {
                flush(kernel, *part, d_model, scale, false, list, sums.get(), total.get() + row * d_model);
              }
            }
            broken.get()[row] |= !kernel.append_active(pre.get() + row * kPanel, panel.bias, panel.threshold, first,
                                                       count, list);
          }
        }
        for (int64_t row = 0; row < rows; ++row) {
          if (limited) keep_largest(lists[row], part->k);
          flush(kernel, *part, d_model, scale, true, lists[row], sums.get(), total.get() + row * d_model);
          write_stats(*part, token + row, lists[row], broken.get()[row]);
          spoiled.get()[row] |= scale != 0.0 && broken.get()[row];
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        write_recon(job, token + row, total.get() + row * d_model, spoiled.get()[row]);
      }
    }
  });
}

// The active latents of one panel for all tokens of run_few, token after token.
template <typename T>
struct PanelActs {
  std::vector<Act<Accumulator<T>>> acts;
  int64_t ends[kFew];
  bool broken[kFew];
};

// A panel of a part: its first latent and how many.
template <typename T>
struct Panel {
  const Part<T>* part;
  int64_t first, count;
};

template <typename T>
void add_panels(const Part<T>& part, std::vector<Panel<T>>& panels) {
  for (int64_t first = 0; first < part.width; first += kPanel) {
    panels.push_back({&part, first, std::min(kPanel, part.width - first)});
  }
}

// The active latents of up to kFew tokens: the weights are read once, and the threads share them, panel by panel.
template <typename T>
std::vector<PanelActs<T>> encode_few(const Kernels<T>& kernel, const std::vector<Panel<T>>& panels, const void* tokens,
                                     int64_t rows, int64_t d_model) {
  using Acc = Accumulator<T>;
  std::vector<PanelActs<T>> found(panels.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(panels.size()), 1, [&](int64_t begin, int64_t end) {
    const Scratch<Acc> pre(padded(rows) * kPanel);
    const Scratch<Act<Acc>> acts(kPanel);
    for (int64_t i = begin; i < end; ++i) {
      const auto [part, first, count] = panels[i];
      kernel.encode_panel(part->packed + first * steps<T>(d_model), count, tokens, rows, d_model, pre.get());
      const PanelBias<T> panel(*part, first, count);
      for (int64_t row = 0; row < rows; ++row) {
        List<Acc> list{acts.get()};
        found[i].broken[row] = !kernel.append_active(pre.get() + row * kPanel, panel.bias, panel.threshold, first,
                                                     count, list);
        if (part->k < part->width) keep_largest(list, part->k);
        found[i].acts.insert(found[i].acts.end(), list.acts, list.acts + list.size);
        found[i].ends[row] = static_cast<int64_t>(found[i].acts.size());
      }
    }
  });
  return found;
}

// One token's acts of a part, its k largest where they are limited, into `acts`; returns whether a pre_act is not finite.
template <typename T>
bool collect(const std::vector<Panel<T>>& panels, const std::vector<PanelActs<T>>& found, const Part<T>& part,
             int64_t row, std::vector<Act<Accumulator<T>>>& acts) {
  bool broken = false;
  acts.clear();
  for (size_t i = 0; i < panels.size(); ++i) {
    if (panels[i].part != &part) continue;
    const auto from = found[i].acts.begin();
    acts.insert(acts.end(), from + (row ? found[i].ends[row - 1] : 0), from + found[i].ends[row]);
    broken |= found[i].broken[row];
  }
  if (part.k < part.width) {
    List<Accumulator<T>> list{acts.data(), static_cast<int64_t>(acts.size())};
    keep_largest(list, part.k);
    acts.resize(list.size);
  }
  return broken;
}

// Few tokens: encoded together, then decoded one by one.
template <typename T>
void run_few(const Transcode<T>& job) {
  using Acc = Accumulator<T>;
  const Kernels<T> kernel = kernels<T>();
  const int64_t d_model = job.d_model, rows = job.tokens;
  const auto parts = parts_of(job);
  const Scratch<Acc> tokens(padded(rows) * (d_model + 1));
  bool not_finite[kFew];
  kernel.pack_tokens(job.x, rows, d_model, tokens.get(), not_finite);
  std::vector<Panel<T>> panels;
  for (const auto& [part, scale] : parts) add_panels(*part, panels);
  const auto found = encode_few(kernel, panels, tokens.get(), rows, d_model);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> total(d_model);
    std::vector<Acc> sums(d_model);
    std::vector<Act<Acc>> acts;
    for (int64_t row = begin; row < end; ++row) {
      std::fill(total.begin(), total.end(), 0.0);
      bool spoiled = false;
      for (const auto& [part, scale] : parts) {
        const bool broken = collect(panels, found, *part, row, acts) || not_finite[row];
        List<Acc> list{acts.data(), static_cast<int64_t>(acts.size())};
        add_b_dec(*part, d_model, scale, total.data());
        flush(kernel, *part, d_model, scale, true, list, sums.data(), total.data());
        write_stats(*part, row, list, broken);
        spoiled |= scale != 0.0 && broken;
      }
      write_recon(job, row, total.data(), spoiled);
    }
  });
}

template <typename T>
void run(const Transcode<T>& job) {
  if (job.tokens <= kFew) {
    run_few(job);
  } else {
    run_blocks(job);
  }
}

// `packed` as pack() makes it, for a W_enc [d_model, width] of x's dtype.
void check_packed(const std::string& name, const Tensor& packed, const Tensor& x, int64_t d_model, int64_t width) {
  using torch::headeronly::ScalarType;
  const bool pairs = x.scalar_type() == ScalarType::BFloat16;
  const int64_t n_steps = pairs ? steps<c10::BFloat16>(d_model) : d_model;
  STD_TORCH_CHECK(packed.scalar_type() == (pairs ? ScalarType::Int : x.scalar_type()) && packed.is_cpu() &&
                      packed.is_contiguous() && packed.dim() == 3 && packed.size(0) == strips(width) &&
                      packed.size(1) == n_steps && packed.size(2) == kStrip,
                  name, " has shape ", shape_text(packed), "; expected what pack(W_enc) returns");
}

Tensor pack(Tensor W_enc) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(W_enc.dim() == 2 && W_enc.is_cpu(), "W_enc has shape ", shape_text(W_enc),
                  "; expected [d_model, d_sae] on the CPU");
  const int64_t d_model = W_enc.size(0), width = W_enc.size(1);
  STD_TORCH_CHECK(width <= std::numeric_limits<int32_t>::max(), "W_enc has ", width, " latents; expected less than 2^31");
  const Tensor rows = torch::stable::contiguous(W_enc);
  const auto packed_as = [&](auto zero, ScalarType type) {
    using T = decltype(zero);
    const Tensor packed = torch::stable::empty({strips(width), steps<T>(d_model), kStrip}, type);
    pack_latents<T>(static_cast<const T*>(rows.data_ptr()), d_model, width, static_cast<Packed<T>*>(packed.data_ptr()));
    return packed;
  };
  switch (W_enc.scalar_type()) {
    case ScalarType::Double: return packed_as(double(), ScalarType::Double);
    case ScalarType::Float: return packed_as(float(), ScalarType::Float);
    case ScalarType::BFloat16: return packed_as(c10::BFloat16(), ScalarType::Int);
    default: STD_TORCH_CHECK(false, "W_enc has a dtype without a CPU kernel; expected float64, float32 or bfloat16");
  }
}

// The tensors of one part, contiguous. Held while the kernel reads their pointers.
struct PartTensors {
  PartTensors(const char* prefix, const Tensor& x, const Tensor& packed, const Tensor& b_enc, const Tensor& threshold,
              const Tensor& dec, const Tensor& b_dec) {
    const auto name = [&](const char* field) { return std::string(prefix) + field; };
    const int64_t d_model = x.size(x.dim() - 1);
    width = b_enc.numel();
    check_packed(name("packed"), packed, x, d_model, width);
    check_like(name("b_enc").c_str(), b_enc, x, {width});
    check_like(name("threshold").c_str(), threshold, x, {width});
    check_like(name("W_dec").c_str(), dec, x, {width, d_model});
    check_like(name("b_dec").c_str(), b_dec, x, {d_model});
    for (const Tensor* tensor : {&packed, &b_enc, &threshold, &dec, &b_dec}) {
      tensors.push_back(torch::stable::contiguous(*tensor));
    }
  }

  template <typename T>
  Part<T> part(const std::optional<int64_t>& k) const {
    const auto pointer = [&](int i) { return static_cast<const T*>(tensors[i].data_ptr()); };
    return {static_cast<const Packed<T>*>(tensors[0].data_ptr()), pointer(1), pointer(2), pointer(3), pointer(4), width,
            k.value_or(width)};
  }

  std::vector<Tensor> tensors;
  int64_t width = 0;
};

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using MaybeTensor = std::optional<Tensor>;
using MaybeInt = std::optional<int64_t>;

Stats transcode_packed(Tensor x, Tensor packed, Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec,
                       MaybeTensor delta_packed, MaybeTensor delta_b_enc, MaybeTensor delta_threshold,
                       MaybeTensor delta_W_dec, MaybeTensor delta_b_dec, Tensor alpha, MaybeInt k_base,
                       MaybeInt k_delta, bool want_stats) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() >= 1, "x is a scalar; expected [..., d_model]");
  STD_TORCH_CHECK(x.is_cpu(), "x is not on the CPU");
  STD_TORCH_CHECK(alpha.dim() == 0 && alpha.is_cpu(), "alpha has shape ", shape_text(alpha),
                  "; expected a scalar [] on the CPU");
  const PartTensors base("", x, packed, b_enc, threshold, W_dec, b_dec);
  check_k("k_base", k_base, base.width);
  const bool has_delta = delta_packed.has_value();
  for (const MaybeTensor* tensor : {&delta_b_enc, &delta_threshold, &delta_W_dec, &delta_b_dec}) {
    STD_TORCH_CHECK(tensor->has_value() == has_delta, "the delta_* tensors: expected all five or none");
  }
  STD_TORCH_CHECK(has_delta || !k_delta, "k_delta is given without a delta");
  std::optional<PartTensors> delta;
  if (has_delta) {
    delta.emplace("delta_", x, *delta_packed, *delta_b_enc, *delta_threshold, *delta_W_dec, *delta_b_dec);
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

using Sparse = std::tuple<Tensor, Tensor, Tensor>;

// All tokens' acts, kFew tokens at a time; then values, indices [tokens, capacity] and counts [tokens]. A row that is
// not finite has one act, NaN at latent 0, so that decoding it gives NaN.
template <typename T>
Sparse encode_as(const Tensor& x, const Part<T>& part, MaybeInt capacity) {
  using torch::headeronly::ScalarType;
  using Acc = Accumulator<T>;
  const Kernels<T> kernel = kernels<T>();
  const int64_t d_model = x.size(x.dim() - 1);
  const std::vector<int64_t> leading(x.sizes().begin(), x.sizes().end() - 1);
  int64_t n_tokens = 1;
  for (int64_t size : leading) n_tokens *= size;
  const T* from = static_cast<const T*>(x.data_ptr());
  std::vector<std::vector<Act<Acc>>> rows_acts(n_tokens);
  std::vector<Panel<T>> panels;
  add_panels(part, panels);
  const Scratch<Acc> tokens(padded(std::min(kFew, n_tokens)) * (d_model + 1));
  bool not_finite[kFew];
  for (int64_t first = 0; first < n_tokens; first += kFew) {
    const int64_t rows = std::min(kFew, n_tokens - first);
    kernel.pack_tokens(from + first * d_model, rows, d_model, tokens.get(), not_finite);
    const auto found = encode_few(kernel, panels, tokens.get(), rows, d_model);
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::vector<Act<Acc>>& acts = rows_acts[first + row];
        if (collect(panels, found, part, row, acts) || not_finite[row]) {
          acts = {{std::numeric_limits<Acc>::quiet_NaN(), 0}};
        }
      }
    });
  }
  int64_t largest = 0;
  for (const auto& acts : rows_acts) largest = std::max(largest, static_cast<int64_t>(acts.size()));
  STD_TORCH_CHECK(!capacity || largest <= *capacity, "a token has ", largest, " active latents, over capacity = ",
                  capacity.value_or(0), "; raise capacity, or give None for no limit");
  std::vector<int64_t> shape = leading;
  shape.push_back(capacity.value_or(largest));
  Tensor values = torch::stable::empty(shape, x.scalar_type());
  Tensor indices = torch::stable::empty(shape, ScalarType::Int);
  const Tensor counts = torch::stable::empty(leading, ScalarType::Int);
  torch::stable::zero_(values);
  torch::stable::zero_(indices);
  for (int64_t row = 0; row < n_tokens; ++row) {
    static_cast<int32_t*>(counts.data_ptr())[row] = static_cast<int32_t>(rows_acts[row].size());
    T* value = static_cast<T*>(values.data_ptr()) + row * shape.back();
    int32_t* index = static_cast<int32_t*>(indices.data_ptr()) + row * shape.back();
    for (const auto& act : rows_acts[row]) *value++ = static_cast<T>(act.value), *index++ = act.index;
  }
  return {values, indices, counts};
}

Sparse encode_packed(Tensor x, Tensor packed, Tensor b_enc, Tensor threshold, MaybeInt k, MaybeInt capacity) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_cpu(), "x has shape ", shape_text(x), "; expected [..., d_model] on the CPU");
  const int64_t width = b_enc.numel();
  check_packed("packed", packed, x, x.size(x.dim() - 1), width);
  check_like("b_enc", b_enc, x, {width});
  check_like("threshold", threshold, x, {width});
  check_k("k", k, width);
  STD_TORCH_CHECK(!capacity || *capacity >= 1, "capacity = ", capacity.value_or(0), "; expected 1 or more, or None");
  const Tensor rows = torch::stable::contiguous(x), bias = torch::stable::contiguous(b_enc),
               theta = torch::stable::contiguous(threshold);
  const auto encode = [&](auto zero) {
    using T = decltype(zero);
    Part<T> part;
    part.packed = static_cast<const Packed<T>*>(packed.data_ptr());
    part.b_enc = static_cast<const T*>(bias.data_ptr());
    part.threshold = static_cast<const T*>(theta.data_ptr());
    part.width = width;
    part.k = k.value_or(width);
    return encode_as<T>(rows, part, capacity);
  };
  switch (x.scalar_type()) {
    case ScalarType::Double: return encode(double());
    case ScalarType::Float: return encode(float());
    case ScalarType::BFloat16: return encode(c10::BFloat16());
    default: STD_TORCH_CHECK(false, "x has a dtype without a CPU kernel; expected float64, float32 or bfloat16");
  }
}

// One part's acts as decode reads them, contiguous: values, indices, counts, W_dec, b_dec.
struct SparsePart {
  SparsePart(const std::string& prefix, const Tensor& values, const Tensor& indices, const Tensor& counts,
             const Tensor& W_dec, const Tensor& b_dec) {
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(values.dim() >= 1 && values.is_cpu(), prefix, "values has shape ", shape_text(values),
                    "; expected [..., capacity] on the CPU");
    STD_TORCH_CHECK(W_dec.dim() == 2, prefix, "W_dec has shape ", shape_text(W_dec), "; expected [d_sae, d_model]");
    capacity = values.size(values.dim() - 1);
    n_tokens = 1;
    for (int64_t axis = 0; axis + 1 < values.dim(); ++axis) n_tokens *= values.size(axis);
    width = W_dec.size(0);
    d_model = W_dec.size(1);
    check_like((prefix + "W_dec").c_str(), W_dec, values, {width, d_model});
    check_like((prefix + "b_dec").c_str(), b_dec, values, {d_model});
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int && counts.scalar_type() == ScalarType::Int &&
                        indices.is_cpu() && counts.is_cpu() && indices.numel() == n_tokens * capacity &&
                        counts.numel() == n_tokens,
                    prefix, "indices has shape ", shape_text(indices), " and counts ", shape_text(counts),
                    "; expected int32 [..., capacity] and [...] beside values ", shape_text(values));
    for (const Tensor* tensor : {&values, &indices, &counts, &W_dec, &b_dec}) {
      tensors.push_back(torch::stable::contiguous(*tensor));
    }
    const int32_t* count = static_cast<const int32_t*>(tensors[2].data_ptr());
    const int32_t* index = static_cast<const int32_t*>(tensors[1].data_ptr());
    for (int64_t row = 0; row < n_tokens; ++row) {
      STD_TORCH_CHECK(count[row] >= 0 && count[row] <= capacity, prefix, "counts holds ", count[row],
                      "; expected 0 to the capacity ", capacity);
      for (int64_t i = 0; i < count[row]; ++i) {
        const int32_t latent = index[row * capacity + i];
        STD_TORCH_CHECK(latent >= 0 && latent < width, prefix, "indices holds ", latent, "; expected 0 to ", width - 1);
      }
    }
  }

  // total += scale * (acts of one token @ W_dec + b_dec)
  template <typename T>
  void add(const Kernels<T>& kernel, int64_t row, double scale, std::vector<Act<Accumulator<T>>>& acts,
           Accumulator<T>* sums, double* total) const {
    using Acc = Accumulator<T>;
    const T* value = static_cast<const T*>(tensors[0].data_ptr()) + row * capacity;
    const int32_t* index = static_cast<const int32_t*>(tensors[1].data_ptr()) + row * capacity;
    acts.clear();
    for (int32_t i = 0; i < static_cast<const int32_t*>(tensors[2].data_ptr())[row]; ++i) {
      acts.push_back({static_cast<Acc>(value[i]), index[i]});
    }
    Part<T> part;
    part.b_dec = static_cast<const T*>(tensors[4].data_ptr());
    add_b_dec(part, d_model, scale, total);
    const T* W_dec = static_cast<const T*>(tensors[3].data_ptr());
    if (scale != 0.0) kernel.decode(acts.data(), acts.size(), W_dec, d_model, scale, sums, total);
  }

  std::vector<Tensor> tensors;
  int64_t capacity = 0, n_tokens = 0, width = 0, d_model = 0;
};

Tensor decode(Tensor values, Tensor indices, Tensor counts, Tensor W_dec, Tensor b_dec, MaybeTensor delta_values,
              MaybeTensor delta_indices, MaybeTensor delta_counts, MaybeTensor delta_W_dec, MaybeTensor delta_b_dec,
              Tensor alpha) {
  using torch::headeronly::ScalarType;
  const SparsePart base("", values, indices, counts, W_dec, b_dec);
  STD_TORCH_CHECK(alpha.dim() == 0 && alpha.is_cpu(), "alpha has shape ", shape_text(alpha),
                  "; expected a scalar [] on the CPU");
  std::optional<SparsePart> delta;
  for (const MaybeTensor* tensor : {&delta_indices, &delta_counts, &delta_W_dec, &delta_b_dec}) {
    STD_TORCH_CHECK(tensor->has_value() == delta_values.has_value(), "the delta's tensors: expected all five or none");
  }
  if (delta_values) {
    delta.emplace("delta_", *delta_values, *delta_indices, *delta_counts, *delta_W_dec, *delta_b_dec);
    STD_TORCH_CHECK(delta->n_tokens == base.n_tokens && delta->d_model == base.d_model &&
                        delta_values->scalar_type() == values.scalar_type(),
                    "delta_values has shape ", shape_text(*delta_values), "; expected the base's tokens and dtype, ",
                    shape_text(values), ", and its d_model");
  }
  std::vector<int64_t> shape(values.sizes().begin(), values.sizes().end() - 1);
  shape.push_back(base.d_model);
  const Tensor recon = torch::stable::empty(shape, values.scalar_type());
  const Tensor scale_tensor = torch::stable::to(alpha, ScalarType::Double);
  const double scale = *static_cast<const double*>(scale_tensor.data_ptr());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    using Acc = Accumulator<T>;
    const Kernels<T> kernel = kernels<T>();
    Transcode<T> job;
    job.d_model = base.d_model;
    job.recon = static_cast<T*>(recon.data_ptr());
    torch::stable::parallel_for(0, base.n_tokens, 8, [&](int64_t begin, int64_t end) {
      std::vector<double> total(base.d_model);
      std::vector<Acc> sums(base.d_model);
      std::vector<Act<Acc>> acts;
      for (int64_t row = begin; row < end; ++row) {
        std::fill(total.begin(), total.end(), 0.0);
        base.template add<T>(kernel, row, 1.0, acts, sums.data(), total.data());
        if (delta) delta->template add<T>(kernel, row, scale, acts, sums.data(), total.data());
        write_recon(job, row, total.data(), false);
      }
    });
  };
  switch (values.scalar_type()) {
    case ScalarType::Double: run(double()); break;
    case ScalarType::Float: run(float()); break;
    case ScalarType::BFloat16: run(c10::BFloat16()); break;
    default: STD_TORCH_CHECK(false, "values has a dtype without a CPU kernel; expected float64, float32 or bfloat16");
  }
  return recon;
}

}  // namespace
}  // namespace deltatc

STABLE_TORCH_LIBRARY_IMPL(deltatc, CPU, m) {
  m.impl("pack", TORCH_BOX(&deltatc::pack));
  m.impl("transcode_packed", TORCH_BOX(&deltatc::transcode_packed));
  m.impl("encode_packed", TORCH_BOX(&deltatc::encode_packed));
  m.impl("decode", TORCH_BOX(&deltatc::decode));
}

STABLE_TORCH_LIBRARY_IMPL(deltatc, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&deltatc::cpu_kernels));
}
