// What one block does for one token: bring its acts of a part together, in the order of their latents, and add up the
// rows of W_dec that they choose.
#pragma once

#include "select.h"

namespace deltatc {

struct Collected {
  int n;          // acts, in `kept`; 0 where broken or too many
  bool broken;    // a pre_act is not finite
  bool too_many;  // more than its lists hold
};

// Acts of one token and part, as keys by index, sorted, into kept[capacity of the lists, at least min(k, width)]. `found`
// has room for as many acts as the lists hold.
__device__ __forceinline__ Collected collect(const CudaPart& part, int64_t token, Act* found, uint64_t* kept,
                                             SelectMemory& memory) {
  const Lists& lists = part.lists;
  Collected out{0, false, false};
  for (int split = 0; split < lists.splits; ++split) {
    const int count = lists.counts[token * lists.splits + split];
    out.broken |= count == kBroken;
    out.too_many |= count > lists.capacity;
    const Act* acts = lists.acts + (token * lists.splits + split) * lists.capacity;
    for (int i = threadIdx.x; i < min(count, lists.capacity); i += blockDim.x) found[out.n + i] = acts[i];
    out.n += max(0, min(count, lists.capacity));
  }
  if (out.broken || out.too_many) out.n = 0;
  __syncthreads();
  if (part.k > 0 && out.n > part.k) {
    select_largest(found, out.n, part.k, kept, memory);
    out.n = part.k;
  } else {
    for (int i = threadIdx.x; i < out.n; i += blockDim.x) kept[i] = key_by_index(found[i]);
  }
  sort_keys(kept, out.n);
  return out;
}

// l0 and l1 of sorted acts, by one warp; every lane gets both.
__device__ __forceinline__ float sum_acts(const uint64_t* kept, int n, int lane) {
  float sum = 0.0f;
  for (int i = lane; i < n; i += 32) sum += act_of_index_key(kept[i]).value;
  return warp_sum(sum);
}

struct Columns {
  float values[8];
};

__device__ __forceinline__ void add_row(Columns& sum, float value, const bf16x8& row) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.values[i] += value * to_float(row.values[i]);
}

// sum += acts first, first + step, ... at columns [column, column + 8) of W_dec
__device__ __forceinline__ void add_acts(Columns& sum, const uint64_t* kept, int n, int first, int step,
                                         const bf16* W_dec, int64_t d_model, int64_t column) {
#pragma unroll 8
  for (int i = first; i < n; i += step) {
    const Act act = act_of_index_key(kept[i]);
    add_row(sum, act.value, *reinterpret_cast<const bf16x8*>(W_dec + act.index * d_model + column));
  }
}

struct Whole {
  int l0;
  float l1;
  bool broken;
};

// The same from all of the part's latents where the lists do not hold the acts (JumpReLU only): pre_acts again, as many at
// a time as `pre` holds, a warp each. Threads with `mine` false only help.
__device__ __forceinline__ Whole add_all_latents(Columns& sum, const CudaPart& part, const bf16* x, int d_model,
                                                 bool mine, int64_t column, float* pre, int pre_size) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  Whole out{0, 0.0f, false};
  for (int first = 0; first < part.width; first += pre_size) {
    const int count = min(pre_size, part.width - first);
    __syncthreads();
    for (int j = warp; j < count; j += warps) {
      const bf16* weights = part.W_enc + static_cast<int64_t>(first + j) * d_model;
      float dot = 0.0f;
      for (int c = lane * 8; c < d_model; c += 256) {
        const bf16x8 left = *reinterpret_cast<const bf16x8*>(x + c), right = *reinterpret_cast<const bf16x8*>(weights + c);
        for (int i = 0; i < 8; ++i) dot += to_float(left.values[i]) * to_float(right.values[i]);
      }
      dot = warp_sum(dot);
      if (lane == 0) pre[j] = dot + to_float(part.b_enc[first + j]);
    }
    __syncthreads();
    for (int j = 0; j < count; ++j) {
      out.broken |= !is_finite(pre[j]);
      if (!(pre[j] > fmaxf(to_float(part.threshold[first + j]), 0.0f))) continue;
      out.l0 += 1, out.l1 += pre[j];
      const bf16* row = part.W_dec + static_cast<int64_t>(first + j) * d_model;
      if (mine) add_row(sum, pre[j], *reinterpret_cast<const bf16x8*>(row + column));
    }
  }
  __syncthreads();
  return out;
}

__device__ __forceinline__ void write_stats(const CudaPart& part, int64_t token, bool broken, int l0, float l1) {
  if (part.l0 == nullptr) return;
  part.l0[token] = broken ? bits_float(0x7fc00000u) : static_cast<float>(l0);
  part.l1[token] = broken ? bits_float(0x7fc00000u) : l1;
}

}  // namespace deltatc
