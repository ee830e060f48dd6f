// Gradients of the delta's five tensors and of alpha (JumpReLU; the threshold's is straight-through, arXiv 2407.14435).
// The delta is narrow, so all of this is dense: gradient_kernel makes alpha * acts and the gradient of pre_acts, tokens x
// d_new; product_kernel multiplies them with the tokens' grad and x. Sums over tokens are made of parts that are added up
// in one fixed order, so that they are the same every time.
#include "kernels.h"
#include "tile.h"

namespace deltatc {
namespace {

constexpr int kSumRows = 256;  // tokens of one partial sum of grad

int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
int64_t padded_width(const CudaBackward& job) { return (job.delta.width + 7) / 8 * 8; }

struct GradientMemory {
  Stages stages;
  float columns[2][2][kTile];  // [gradient][half of the tokens][latent]
  float alphas[kThreads];
};

// sums: [token tiles][2][width] of b_enc and threshold, then [token tiles][latent tiles] of alpha
__global__ void __launch_bounds__(kThreads) gradient_kernel(CudaBackward job) {
  GradientMemory& memory = *reinterpret_cast<GradientMemory*>(shared_memory());
  const CudaPart& delta = job.delta;
  const int thread = threadIdx.x, latent = blockIdx.y * kTile, stride = (delta.width + 7) / 8 * 8;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTile;
  const float alpha = *job.alpha;
  const Place at;
  Accumulators pre, up;
  clear(pre);
  clear(up);
  multiply<false>(job.x, token, job.tokens, delta.W_enc, latent, delta.width, 0, job.d_model, job.d_model, memory.stages,
                  at, pre);
  multiply<false>(job.grad, token, job.tokens, delta.W_dec, latent, delta.width, 0, job.d_model, job.d_model,
                  memory.stages, at, up);
  float of_alpha = 0.0f;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int j = latent + at.column(n, side);
      const bool real = j < delta.width;
      const float bias = real ? to_float(delta.b_enc[j]) : 0.0f;
      const float theta = real ? to_threshold(delta.threshold[j]) : 0.0f;
      float of_bias = 0.0f, of_theta = 0.0f;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = token + at.row(m, half * 2);
          if (row >= job.tokens || j >= stride) continue;
          const float value = pre[m][n][half * 2 + side] + bias, unscaled = up[m][n][half * 2 + side];
          const bool finite = is_finite(value);
          const float act = finite ? (real && value > theta ? value : 0.0f) : bits_float(0x7fc00000u);
          const float slope = finite ? (act > 0.0f ? alpha * unscaled : 0.0f) : act;
          job.acts[row * stride + j] = to_bf16(alpha * act);
          job.slopes[row * stride + j] = to_bf16(slope);
          of_alpha += act * unscaled;
          of_bias += slope;
          if (fabsf(value - theta) < job.bandwidth / 2) of_theta -= theta / job.bandwidth * alpha * unscaled;
        }
      }
      for (int step = 4; step < 32; step *= 2) {  // over the lanes with the same columns
        of_bias += __shfl_xor_sync(0xffffffffu, of_bias, step);
        of_theta += __shfl_xor_sync(0xffffffffu, of_theta, step);
      }
      if (at.lane < 4) {
        memory.columns[0][at.m0 / 64][at.column(n, side)] = of_bias;
        memory.columns[1][at.m0 / 64][at.column(n, side)] = of_theta;
      }
    }
  }
  memory.alphas[thread] = of_alpha;
  __syncthreads();
  float* sums = job.sums + static_cast<int64_t>(blockIdx.x) * 2 * delta.width;
  if (thread < kTile && latent + thread < delta.width) {
    for (int i = 0; i < 2; ++i) {
      sums[i * delta.width + latent + thread] = memory.columns[i][0][thread] + memory.columns[i][1][thread];
    }
  }
  if (thread == 0) {
    float total = 0.0f;
    for (int i = 0; i < kThreads; ++i) total += memory.alphas[i];
    job.sums[static_cast<int64_t>(gridDim.x) * 2 * delta.width + blockIdx.x * gridDim.y + blockIdx.y] = total;
  }
}

// to[split][rows][columns] = A[steps of this split][rows]^T @ B[the same][columns]
struct Product {
  const bf16 *A, *B;
  float* to;
  int64_t steps, steps_of_split;
  int32_t rows, columns, stride_a, stride_b;
};

__global__ void __launch_bounds__(kThreads, 2) product_kernel(Product job) {
  Stages& stages = *reinterpret_cast<Stages*>(shared_memory());
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTile, column = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first = blockIdx.z * job.steps_of_split, last = min(first + job.steps_of_split, job.steps);
  const Place at;
  Accumulators acc;
  clear(acc);
  multiply<true>(job.A, row, job.stride_a, job.B, column, job.stride_b, first, last, 0, stages, at, acc);
  float* to = job.to + static_cast<int64_t>(blockIdx.z) * job.rows * job.columns;
  for (int m = 0; m < 4; ++m) {
    for (int n = 0; n < 4; ++n) {
      for (int e = 0; e < 4; ++e) {
        const int64_t r = row + at.row(m, e), c = column + at.column(n, e);
        if (r < job.rows && c < job.columns) to[r * job.columns + c] = acc[m][n][e];
      }
    }
  }
}

// to[i] = scale * the sum over parts of from[part * stride + i]
struct Reduce {
  const float* from;
  float* to;
  const float* scale;  // null: 1
  int64_t size, parts, stride;
};

__global__ void reduce_kernel(Reduce job) {
  const float scale = job.scale == nullptr ? 1.0f : *job.scale;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < job.size;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    float total = 0.0f;
    for (int64_t part = 0; part < job.parts; ++part) total += job.from[part * job.stride + i];
    job.to[i] = scale * total;
  }
}

// to[part][d_model] = the sums of kSumRows rows of grad
struct ColumnSums {
  const bf16* grad;
  float* to;
  int64_t tokens;
  int32_t d_model;
};

__global__ void column_sums_kernel(ColumnSums job) {
  const int64_t column = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (column >= job.d_model) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSumRows, last = min(first + kSumRows, job.tokens);
  float total = 0.0f;
  for (int64_t row = first; row < last; ++row) total += to_float(job.grad[row * job.d_model + column]);
  job.to[static_cast<int64_t>(blockIdx.x) * job.d_model + column] = total;
}

// alpha's gradient: the parts of the tiles, and the sums of grad times b_dec
struct AlphaSum {
  const float *parts, *columns;
  const bf16* b_dec;
  float* to;
  int64_t n_parts;
  int32_t d_model;
};

__global__ void alpha_kernel(AlphaSum job) {
  const int lane = threadIdx.x;
  float total = 0.0f;
  for (int64_t i = lane; i < job.n_parts; i += 32) total += job.parts[i];
  for (int64_t i = lane; i < job.d_model; i += 32) total += job.columns[i] * to_float(job.b_dec[i]);
  total = warp_sum(total);
  if (lane == 0) *job.to = total;
}

// The workspace, from its beginning on; memory = null only counts.
struct Space {
  bf16 *acts, *slopes;
  float *tile_sums, *products, *column_parts, *columns;
  int64_t token_tiles, latent_tiles, splits, parts, bytes;
};

Space carve(const CudaBackward& job, char* memory) {
  Space space{};
  const int64_t stride = padded_width(job), d_model = job.d_model;
  space.token_tiles = tiles(job.tokens);
  space.latent_tiles = tiles(job.delta.width);
  space.parts = (job.tokens + kSumRows - 1) / kSumRows;
  space.splits = space.token_tiles < 16 ? (space.token_tiles + 1) / 2 : 8;  // each of at least a tile of tokens
  const auto take = [&](int64_t size) {
    char* at = memory == nullptr ? nullptr : memory + space.bytes;
    space.bytes += (size + 255) / 256 * 256;
    return at;
  };
  space.acts = reinterpret_cast<bf16*>(take(job.tokens * stride * 2));
  space.slopes = reinterpret_cast<bf16*>(take(job.tokens * stride * 2));
  space.tile_sums = reinterpret_cast<float*>(take(space.token_tiles * (2 * job.delta.width + space.latent_tiles) * 4));
  space.products = reinterpret_cast<float*>(take(space.splits * stride * d_model * 4));
  space.column_parts = reinterpret_cast<float*>(take(space.parts * d_model * 4));
  space.columns = reinterpret_cast<float*>(take(d_model * 4));
  return space;
}

int reduce(const Reduce& job, cudaStream_t stream) {
  const int64_t blocks = (job.size + kThreads - 1) / kThreads;
  return launch(reduce_kernel, dim3(static_cast<unsigned>(blocks < 1024 ? blocks : 1024)), kThreads, 0, stream, job);
}

// to[rows][columns] = A^T @ B over all tokens; stride_a and stride_b are the row lengths of A and B.
int product(const CudaBackward& job, const Space& space, const bf16* A, int stride_a, int rows, const bf16* B,
            int stride_b, int columns, float* to, cudaStream_t stream) {
  const int64_t of_split = (space.token_tiles + space.splits - 1) / space.splits * kTile;
  const Product product{A, B, space.products, job.tokens, of_split, rows, columns, stride_a, stride_b};
  const dim3 grid(static_cast<unsigned>(tiles(rows)), static_cast<unsigned>(tiles(columns)),
                  static_cast<unsigned>((job.tokens + of_split - 1) / of_split));
  const int error = launch(product_kernel, grid, kThreads, sizeof(Stages), stream, product);
  if (error != 0) return error;
  const int64_t size = static_cast<int64_t>(rows) * columns;
  return reduce({space.products, to, nullptr, size, static_cast<int64_t>(grid.z), size}, stream);
}

}  // namespace

int64_t backward_workspace(const CudaBackward& job) { return carve(job, nullptr).bytes; }

int backward(CudaBackward job, void* workspace, cudaStream_t stream) {
  if (job.tokens == 0) return 0;  // the gradients are zeros already
  const Space space = carve(job, static_cast<char*>(workspace));
  const int width = job.delta.width, d_model = job.d_model, stride = static_cast<int>(padded_width(job));
  job.acts = space.acts, job.slopes = space.slopes, job.sums = space.tile_sums;
  int error = 0;
  const auto then = [&](bool wanted, auto step) {
    if (error == 0 && wanted) error = step();
  };
  const dim3 grid(static_cast<unsigned>(space.token_tiles), static_cast<unsigned>(space.latent_tiles));
  then(true, [&] { return launch(gradient_kernel, grid, kThreads, sizeof(GradientMemory), stream, job); });
  then(job.W_dec, [&] {
    return product(job, space, job.acts, stride, width, job.grad, d_model, d_model, job.W_dec, stream);
  });
  then(job.W_enc, [&] {
    return product(job, space, job.x, d_model, d_model, job.slopes, stride, width, job.W_enc, stream);
  });
  then(job.b_enc, [&] {
    return reduce({space.tile_sums, job.b_enc, nullptr, width, space.token_tiles, 2 * width}, stream);
  });
  then(job.threshold, [&] {
    return reduce({space.tile_sums + width, job.threshold, nullptr, width, space.token_tiles, 2 * width}, stream);
  });
  const bool columns = job.b_dec != nullptr || job.scale != nullptr;
  then(columns, [&] {
    const dim3 column_grid(static_cast<unsigned>(space.parts), static_cast<unsigned>((d_model + kThreads - 1) / kThreads));
    const ColumnSums sums{job.grad, space.column_parts, job.tokens, d_model};
    return launch(column_sums_kernel, column_grid, kThreads, 0, stream, sums);
  });
  then(job.b_dec, [&] {
    return reduce({space.column_parts, job.b_dec, job.alpha, d_model, space.parts, d_model}, stream);
  });
  then(job.scale, [&] {
    return reduce({space.column_parts, space.columns, nullptr, d_model, space.parts, d_model}, stream);
  });
  then(job.scale, [&] {
    const float* of_tiles = space.tile_sums + space.token_tiles * 2 * width;
    const int64_t n = space.token_tiles * space.latent_tiles;
    const AlphaSum sum{of_tiles, space.columns, job.delta.b_dec, job.scale, n, d_model};
    return launch(alpha_kernel, dim3(1), 32, 0, stream, sum);
  });
  return error;
}

}  // namespace deltatc
