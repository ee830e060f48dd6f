// 128 x 128 tiles of a matrix product by one block of 256 threads: eight warps, 2 x 4, of 64 x 32 each; 32 steps of the
// inner dimension at a time, three stages in shared memory of which two are on their way.
#pragma once

#include "device.h"

namespace deltatc {

constexpr int kThreads = 256;
constexpr int kTile = 128;
constexpr int kDepth = 32;
constexpr int kStages = 3;
constexpr int kAlong = kDepth + 8;   // bfloat16 a row of a K-major stage: 80 bytes, so that eight rows meet no bank twice
constexpr int kAcross = kTile + 8;   // the same of a stage that holds kDepth rows of kTile
constexpr int kStageSize = kTile * kAlong > kDepth * kAcross ? kTile * kAlong : kDepth * kAcross;

struct Stages {
  bf16 a[kStages][kStageSize];
  bf16 b[kStages][kStageSize];
};

struct Place {  // of a thread in its tile: acc[m][n][e] is row(m, e), column(n, e)
  __device__ Place() : lane(threadIdx.x % 32), m0(threadIdx.x / 32 / 4 * 64), n0(threadIdx.x / 32 % 4 * 32) {}
  __device__ int row(int m, int e) const { return m0 + m * 16 + lane / 4 + e / 2 * 8; }
  __device__ int column(int n, int e) const { return n0 + n * 8 + lane % 4 * 2 + e % 2; }
  int lane, m0, n0;
};

using Accumulators = float[4][4][4];

__device__ __forceinline__ void clear(Accumulators& acc) {
  for (int m = 0; m < 4; ++m)
    for (int n = 0; n < 4; ++n)
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
}

// A stage of kTile rows x kDepth columns from row-major [n_rows][depth], `depth` a multiple of 8; zeros outside.
__device__ __forceinline__ void fetch_along(bf16* to, const bf16* from, int64_t row, int64_t n_rows, int64_t depth,
                                            int64_t k) {
  for (int i = threadIdx.x; i < kTile * (kDepth / 8); i += kThreads) {
    const int r = i / (kDepth / 8), c = i % (kDepth / 8) * 8;
    const bool real = row + r < n_rows && k + c < depth;
    copy_async(to + r * kAlong + c, real ? from + (row + r) * depth + k + c : from, real);
  }
}

// A stage of kDepth rows x kTile columns from row-major [n_rows][n_columns], n_columns a multiple of 8; zeros outside.
__device__ __forceinline__ void fetch_across(bf16* to, const bf16* from, int64_t row, int64_t n_rows, int64_t n_columns,
                                             int64_t column) {
  for (int i = threadIdx.x; i < kDepth * (kTile / 8); i += kThreads) {
    const int r = i / (kTile / 8), c = i % (kTile / 8) * 8;
    const bool real = row + r < n_rows && column + c < n_columns;
    copy_async(to + r * kAcross + c, real ? from + (row + r) * n_columns + column + c : from, real);
  }
}

// acc += a stage's a @ b; each K-major (kAlong) or with the inner dimension as its rows (kAcross).
template <bool kAcrossA, bool kAcrossB>
__device__ __forceinline__ void multiply_stage(const bf16* a, const bf16* b, const Place& at, Accumulators& acc) {
  const int i = at.lane % 8, matrix = at.lane / 8;  // of the four matrices of a load: whose row this lane points to
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t left[4][4], right[4][2];
#pragma unroll
    for (int m = 0; m < 4; ++m) {  // rows 0, 8; then the same 8 steps on
      const int row = at.m0 + m * 16 + matrix % 2 * 8, depth = k + matrix / 2 * 8;
      if constexpr (kAcrossA) load_matrices<true>(left[m], a + (depth + i) * kAcross + row);
      else load_matrices<false>(left[m], a + (row + i) * kAlong + depth);
    }
#pragma unroll
    for (int n = 0; n < 4; n += 2) {  // steps 0, 8 of one column of eight; then of the next
      const int column = at.n0 + n * 8 + matrix / 2 * 8, depth = k + matrix % 2 * 8;
      uint32_t pair[4];
      if constexpr (kAcrossB) load_matrices<true>(pair, b + (depth + i) * kAcross + column);
      else load_matrices<false>(pair, b + (column + i) * kAlong + depth);
      right[n][0] = pair[0], right[n][1] = pair[1], right[n + 1][0] = pair[2], right[n + 1][1] = pair[3];
    }
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply_add(acc[m][n], left[m], right[n][0], right[n][1]);
  }
}

// acc += A[row_a ...][first ... last] @ B[row_b ...][first ... last]^T, both row-major [rows][depth]; kTransposed:
// A[first ... last][row_a ...]^T @ B[first ... last][row_b ...], both row-major [depth][rows]. Of a K-major operand
// `last` is its depth. The stages are free when it returns.
template <bool kTransposed>
__device__ __forceinline__ void multiply(const bf16* A, int64_t row_a, int64_t rows_a, const bf16* B, int64_t row_b,
                                         int64_t rows_b, int64_t first, int64_t last, int64_t depth, Stages& stages,
                                         const Place& at, Accumulators& acc) {
  const int n_steps = static_cast<int>((last - first + kDepth - 1) / kDepth);
  const auto fetch = [&](int step) {
    if (step < n_steps) {
      const int64_t k = first + static_cast<int64_t>(step) * kDepth;
      bf16 *a = stages.a[step % kStages], *b = stages.b[step % kStages];
      if constexpr (kTransposed) {
        fetch_across(a, A, k, last, rows_a, row_a);
        fetch_across(b, B, k, last, rows_b, row_b);
      } else {
        fetch_along(a, A, row_a, rows_a, depth, k);
        fetch_along(b, B, row_b, rows_b, depth, k);
      }
    }
    copy_commit();  // also an empty group: then the count of groups under way is the same at every step
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step < n_steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this stage is whole, and everyone has left the one that is fetched next
    fetch(step + kStages - 1);
    multiply_stage<kTransposed, kTransposed>(stages.a[step % kStages], stages.b[step % kStages], at, acc);
  }
  copy_wait<0>();
  __syncthreads();
}

}  // namespace deltatc
