// Prefill, first launch: pre_acts by tensor cores, and the selection in their epilogue. A block takes 128 tokens through
// its share of one part's latents, 128 at a time; what is active goes to that token's list, and no pre_act is written.
// With k, a list that could overflow is cut to its k largest, and the k-th becomes the gate for what may still enter.
#include "kernels.h"
#include "select.h"
#include "tile.h"

namespace deltatc {
namespace {

struct EncodeMemory {
  Stages stages;
  float gates[kTile];  // the k-th largest act so far; JumpReLU: 0
  int32_t counts[kTile];
  int32_t broken[kTile];
};

__global__ void __launch_bounds__(kThreads, 2) encode_kernel(CudaTranscode job) {
  EncodeMemory& memory = *reinterpret_cast<EncodeMemory*>(shared_memory());
  const bool of_delta = static_cast<int>(blockIdx.y) >= job.parts[0].lists.splits;
  const CudaPart& part = job.parts[of_delta];
  const Lists& lists = part.lists;
  const int split = static_cast<int>(blockIdx.y) - (of_delta ? job.parts[0].lists.splits : 0);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTile;
  const int thread = threadIdx.x, rows = static_cast<int>(min(static_cast<int64_t>(kTile), job.tokens - token));
  if (blockIdx.x == 0 && blockIdx.y == 0 && thread == 0) *job.dense_count = 0;  // for the decode that comes behind
  if (thread < kTile) memory.gates[thread] = 0.0f, memory.counts[thread] = 0, memory.broken[thread] = 0;
  const auto list = [&](int row) { return lists.acts + ((token + row) * lists.splits + split) * lists.capacity; };

  const Place at;
  const int64_t panels = (part.width + kTile - 1) / kTile;
  for (int64_t panel = panels * split / lists.splits; panel < panels * (split + 1) / lists.splits; ++panel) {
    const int first = static_cast<int>(panel * kTile);
    Accumulators acc;
    clear(acc);
    multiply<false>(job.x, token, job.tokens, part.W_enc, first, part.width, 0, job.d_model, job.d_model, memory.stages,
                    at, acc);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int latent = first + at.column(n, side);
        if (latent >= part.width) continue;
        const float bias = to_float(part.b_enc[latent]), threshold = to_threshold(part.threshold[latent]);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = at.row(m, half * 2);
            const float pre = acc[m][n][half * 2 + side] + bias;
            if (!is_finite(pre)) memory.broken[row] = 1;
            if (!(pre > threshold && pre > memory.gates[row]) || row >= rows) continue;
            const int slot = atomicAdd(&memory.counts[row], 1);
            if (slot < lists.capacity) list(row)[slot] = {pre, latent};
          }
        }
      }
    }
    __syncthreads();
    if (part.k > 0) {  // room for the whole next panel; the last one leaves k
      const bool last = panel + 1 == panels * (split + 1) / lists.splits;
      const int limit = last ? part.k : max(part.k, lists.capacity - kTile);
      for (int row = thread / 32; row < rows; row += kThreads / 32) {
        if (memory.counts[row] > limit) {
          const float gate = keep_largest(list(row), memory.counts[row], part.k, at.lane);
          if (at.lane == 0) memory.gates[row] = gate, memory.counts[row] = part.k;
        }
      }
      __syncthreads();
    }
  }
  __syncthreads();
  if (thread < rows) {
    lists.counts[(token + thread) * lists.splits + split] = memory.broken[thread] ? kBroken : memory.counts[thread];
  }
}

}  // namespace

int launch_encode(const CudaTranscode& job, cudaStream_t stream) {
  const int64_t tiles = (job.tokens + kTile - 1) / kTile;
  const int splits = job.parts[0].lists.splits + (job.n_parts > 1 ? job.parts[1].lists.splits : 0);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
  return launch(encode_kernel, grid, kThreads, sizeof(EncodeMemory), stream, job);
}

}  // namespace deltatc
