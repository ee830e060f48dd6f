// Prefill, second and third launch. A block brings one token's acts together and adds up the rows of W_dec that they
// choose. Tokens with so many acts that a matrix product is faster are listed for dense_kernel, which builds 128 of them
// at a time, 32 latents at a time, in shared memory: dense acts never exist. Which way a token goes depends on itself alone.
#include "gather.h"
#include "tile.h"

namespace deltatc {
namespace {

__global__ void __launch_bounds__(kMaxModel / 8, 1) decode_kernel(CudaTranscode job) {
  const int64_t token = blockIdx.x;
  const int thread = threadIdx.x, d_model = job.d_model, column = thread * 8;
  const bool mine = column < d_model;
  const float alpha = *job.alpha;
  SelectMemory& memory = *reinterpret_cast<SelectMemory*>(shared_memory());
  uint64_t* kept[2];
  kept[0] = reinterpret_cast<uint64_t*>(shared_memory() + kKeptAt);
  kept[1] = kept[0] + kept_room(job.parts[0]);
  Act* found = reinterpret_cast<Act*>(kept[1] + (job.n_parts > 1 ? kept_room(job.parts[1]) : 0));

  Collected acts[2] = {{0, false, false}, {0, false, false}};
#pragma unroll
  for (int p = 0; p < 2; ++p)
    if (p < job.n_parts) acts[p] = collect(job.parts[p], token, found, kept[p], memory);
  __syncthreads();

  // By the base's acts alone, so that alpha = 0 is the base bit for bit.
  const bool delta_listed = alpha == 0.0f || (!acts[1].too_many && !acts[1].broken);
  const bool dense = acts[0].n > job.dense_above && delta_listed;
  Columns sums[2] = {};
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    if (p >= job.n_parts) break;
    const CudaPart& part = job.parts[p];
    if (acts[p].too_many) {
      const bf16* x = job.x + token * d_model;
      const Whole whole = add_all_latents(sums[p], part, x, d_model, mine, column, reinterpret_cast<float*>(found), 1024);
      acts[p].broken = whole.broken;
      if (thread == 0) write_stats(part, token, whole.broken, whole.l0, whole.l1);
      continue;
    }
    if (thread < 32) {
      const float l1 = sum_acts(kept[p], acts[p].n, thread);
      if (thread == 0) write_stats(part, token, acts[p].broken, acts[p].n, l1);
    }
    if (dense && !acts[p].broken) {  // sorted now, and from the beginning of its lists on
      Act* to = part.lists.acts + token * list_room(part);
      for (int i = thread; i < acts[p].n; i += blockDim.x) to[i] = act_of_index_key(kept[p][i]);
      if (thread == 0) part.lists.counts[token * part.lists.splits] = acts[p].n;
    } else if (mine && (p == 0 || alpha != 0.0f)) {
      add_acts(sums[p], kept[p], acts[p].n, 0, 1, part.W_dec, d_model, column);
    }
  }
  if (dense) {
    if (thread == 0) job.dense_rows[atomicAdd(job.dense_count, 1)] = static_cast<int32_t>(token);
    return;
  }
  if (!mine) return;
  const bool broken = acts[0].broken || (acts[1].broken && alpha != 0.0f);
  const bf16* delta_b_dec = job.n_parts > 1 ? job.parts[1].b_dec + column : nullptr;
  write_columns(job.recon + token * d_model + column, sums, job.parts[0].b_dec + column, delta_b_dec, alpha, broken);
}

// Acts as the sum of two bfloat16, so that they lose next to nothing.
struct DenseMemory {
  bf16 high[kTile * kAlong], low[kTile * kAlong];
  bf16 weights[2][kDepth * kAcross];
};

__global__ void __launch_bounds__(kThreads, 2) dense_kernel(CudaTranscode job) {
  DenseMemory& memory = *reinterpret_cast<DenseMemory*>(shared_memory());
  const int count = *job.dense_count, first = blockIdx.x * kTile;
  if (first >= count) return;
  const int thread = threadIdx.x, rows = min(kTile, count - first);
  const int64_t d_model = job.d_model, column = static_cast<int64_t>(blockIdx.y) * kTile;
  const float alpha = *job.alpha;
  const int64_t token = thread < rows ? job.dense_rows[first + thread] : 0;
  const Place at;
  Accumulators acc;
  clear(acc);
  for (int p = job.n_parts - 1; p >= 0; --p) {  // the delta first, so that alpha scales nothing else
    if (p == 1 && alpha == 0.0f) continue;
    const CudaPart& part = job.parts[p];
    const Act* acts = part.lists.acts + token * list_room(part);
    const int n_acts = thread < rows ? part.lists.counts[token * part.lists.splits] : 0;
    const int n_steps = (part.width + kDepth - 1) / kDepth;
    int next = 0;
    fetch_across(memory.weights[0], part.W_dec, 0, part.width, d_model, column);
    copy_commit();
    for (int step = 0; step < n_steps; ++step) {
      for (int i = thread; i < kTile * kAlong / 8; i += kThreads) {
        reinterpret_cast<bf16x8*>(memory.high)[i] = bf16x8{};
        reinterpret_cast<bf16x8*>(memory.low)[i] = bf16x8{};
      }
      copy_wait<0>();
      __syncthreads();
      for (; next < n_acts && acts[next].index < (step + 1) * kDepth; ++next) {
        const int slot = thread * kAlong + acts[next].index - step * kDepth;
        memory.high[slot] = to_bf16(acts[next].value);
        memory.low[slot] = to_bf16(acts[next].value - to_float(memory.high[slot]));
      }
      if (step + 1 < n_steps) {
        fetch_across(memory.weights[(step + 1) % 2], part.W_dec, (step + 1) * kDepth, part.width, d_model, column);
      }
      copy_commit();
      __syncthreads();
      multiply_stage<false, true>(memory.high, memory.weights[step % 2], at, acc);
      multiply_stage<false, true>(memory.low, memory.weights[step % 2], at, acc);
      __syncthreads();
    }
    if (p == 1) {
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][n][e] *= alpha;
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = at.row(m, e);
      if (row >= rows) continue;
      bf16* to = job.recon + job.dense_rows[first + row] * d_model;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int64_t c = column + at.column(n, e);
        if (c >= d_model) continue;
        float total = acc[m][n][e] + to_float(job.parts[0].b_dec[c]);
        if (job.n_parts > 1 && alpha != 0.0f) total += alpha * to_float(job.parts[1].b_dec[c]);
        to[c] = to_bf16(total);
      }
    }
  }
}

}  // namespace

int launch_decode(const CudaTranscode& job, cudaStream_t stream) {
  int64_t shared = kKeptAt, found = 512;  // at least the 1024 floats of add_all_latents
  for (int p = 0; p < job.n_parts; ++p) {
    shared += kept_room(job.parts[p]) * sizeof(uint64_t);
    found = found < found_room(job.parts[p]) ? found_room(job.parts[p]) : found;
  }
  shared += found * sizeof(Act);
  const int threads = (job.d_model / 8 + 31) / 32 * 32;
  const int error = launch(decode_kernel, dim3(static_cast<unsigned>(job.tokens)), threads, shared, stream, job);
  if (error != 0) return error;
  const auto tiles = [](int64_t n) { return static_cast<unsigned>((n + kTile - 1) / kTile); };
  return launch(dense_kernel, dim3(tiles(job.tokens), tiles(job.d_model)), kThreads, sizeof(DenseMemory), stream, job);
}

}  // namespace deltatc
