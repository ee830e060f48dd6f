// The inner loops of exact.inc and screen.inc, compiled for each instruction set; which of them this CPU runs is chosen
// when a call runs.
#include "kernels.h"

#include "amx.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DTC_TARGET
#define DTC_ISA generic
#define DTC_BYTES 16
#define DTC_LATENTS 4
#define DTC_TOKENS 3
#define DTC_DOT 0
#define DTC_SCREEN 0
namespace deltatc {
#include "exact.inc"
#include "screen.inc"
}
#undef DTC_TARGET
#undef DTC_ISA
#undef DTC_BYTES

#if defined(__x86_64__)
#define DTC_TARGET __attribute__((target("avx2,fma")))
#define DTC_ISA avx2
#define DTC_BYTES 32
namespace deltatc {
#include "exact.inc"
#include "screen.inc"
}
#undef DTC_TARGET
#undef DTC_ISA
#undef DTC_BYTES
#undef DTC_TOKENS

#define DTC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define DTC_ISA avx512
#define DTC_BYTES 64
#define DTC_TOKENS 6
namespace deltatc {
#include "exact.inc"
#include "screen.inc"
}
#undef DTC_TARGET
#undef DTC_ISA
#undef DTC_SCREEN

#define DTC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
#define DTC_ISA avx512vnni
#define DTC_SCREEN 1
namespace deltatc {
#include "exact.inc"
#include "screen.inc"
}
#undef DTC_TARGET
#undef DTC_ISA
#undef DTC_DOT

#define DTC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")))
#define DTC_ISA avx512bf16
#define DTC_DOT 1
namespace deltatc {
#include "exact.inc"
#include "screen.inc"
}
#undef DTC_ISA
#undef DTC_SCREEN

#define DTC_ISA amx_model
#define DTC_SCREEN 3
namespace deltatc {
#include "exact.inc"
#include "screen.inc"
}
#undef DTC_TARGET
#undef DTC_ISA
#undef DTC_SCREEN

#define DTC_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,fma")))
#define DTC_ISA amx
#define DTC_SCREEN 2
namespace deltatc {
#include "exact.inc"
#include "screen.inc"
}
#endif

namespace deltatc {

namespace {

enum class Isa { generic, avx2, avx512, avx512vnni, avx512bf16, amx_model, amx };

#if defined(__x86_64__)
const std::vector<std::pair<const char*, Isa>> kCompiled = {{"amx", Isa::amx},
                                                            {"avx512bf16", Isa::avx512bf16},
                                                            {"avx512vnni", Isa::avx512vnni},
                                                            {"avx512", Isa::avx512},
                                                            {"avx2", Isa::avx2},
                                                            {"generic", Isa::generic},
                                                            {"amx_model", Isa::amx_model}};
#else
const std::vector<std::pair<const char*, Isa>> kCompiled = {{"generic", Isa::generic}};
#endif

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  static const bool amx = amx_available();  // asked once: CPUID costs microseconds in a virtual machine
  if (isa == Isa::amx) return bf16 && amx;
  if (isa == Isa::avx512bf16 || isa == Isa::amx_model) return bf16;
  if (isa == Isa::avx512vnni) return vnni;
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
  STD_TORCH_CHECK(false, "DELTATC_CPU_KERNEL = ", wanted,
                  "; expected generic, or avx2, avx512, avx512vnni, avx512bf16 or amx where the CPU has it");
}

}  // namespace

std::string cpu_kernels() {
  const auto chosen = chosen_isa();
  std::string names = chosen.first;
  for (const auto& isa : kCompiled) {
    if (isa.second != chosen.second) names += std::string(" ") + isa.first;
  }
  return names;
}

template <typename T>
Kernels<T> kernels() {
  using Acc = Accumulator<T>;
#define DTC_KERNELS(isa, screens)                                                                          \
  Kernels<T> {                                                                                             \
    screens && !std::is_same_v<T, double>, &isa::screen_latents<T>, &isa::pack_tokens<T>, &isa::encode_strip<T>, \
        &isa::decode<T, Acc>                                                                               \
  }
  switch (chosen_isa().second) {
#if defined(__x86_64__)
    case Isa::amx: return DTC_KERNELS(amx, true);
    case Isa::amx_model: return DTC_KERNELS(amx_model, true);
    case Isa::avx512bf16: return DTC_KERNELS(avx512bf16, true);
    case Isa::avx512vnni: return DTC_KERNELS(avx512vnni, true);
    case Isa::avx512: return DTC_KERNELS(avx512, false);
    case Isa::avx2: return DTC_KERNELS(avx2, false);
#endif
    default: return DTC_KERNELS(generic, false);
  }
#undef DTC_KERNELS
}

template Kernels<double> kernels<double>();
template Kernels<float> kernels<float>();
template Kernels<c10::BFloat16> kernels<c10::BFloat16>();

}  // namespace deltatc

STABLE_TORCH_LIBRARY_IMPL(deltatc, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&deltatc::cpu_kernels));
}
