// The forward pass, and its encoding alone: how tokens are cut into chunks, latents into splits, and the workspace into
// lists.
#include "kernels.h"
#include "tile.h"

namespace deltatc {
namespace {

constexpr int64_t kChunk = 4096;      // tokens whose lists exist at a time
constexpr int64_t kListed = 2048;     // acts of a token and part that JumpReLU's lists hold together; more are found again
constexpr int64_t kLatentsPerDense = 72;  // an act for so many latents: from there on two dense products cost less than
                                          // its rows of W_dec (16,384 latents: 227 acts)

// Lists for `tokens` tokens. More splits keep more multiprocessors busy where tokens are few.
Lists lists_of(const CudaPart& part, int64_t tokens, int processors) {
  const int64_t panels = (part.width + kTile - 1) / kTile, token_tiles = (tokens + kTile - 1) / kTile;
  int64_t splits = (2 * processors + token_tiles - 1) / token_tiles;
  splits = splits < panels ? splits : panels;
  const int64_t most = part.k > 0 ? kMaxKeys / part.k : 64;
  splits = splits < most ? splits : most;
  splits = splits > 1 ? splits : 1;
  const int64_t width = (panels + splits - 1) / splits * kTile;  // of a split, at most
  int64_t capacity = part.k > 0 ? 2 * static_cast<int64_t>(part.k) + kTile : kListed / splits;
  capacity = capacity > 64 ? capacity : 64;
  return {nullptr, nullptr, static_cast<int32_t>(splits), static_cast<int32_t>(capacity < width ? capacity : width)};
}

struct Space {
  int32_t* counters;
  int64_t bytes;
};

// Gives the job's parts their lists in the workspace, whole ones for generation; memory = null only counts.
Space carve(CudaTranscode& job, int64_t tokens, bool whole, int processors, char* memory) {
  Space space{nullptr, 0};
  const auto take = [&](int64_t size) {
    char* at = memory == nullptr ? nullptr : memory + space.bytes;
    space.bytes += (size + 255) / 256 * 256;
    return at;
  };
  for (int p = 0; p < job.n_parts; ++p) {
    Lists& lists = job.parts[p].lists;
    lists = whole ? Lists{nullptr, nullptr, 1, job.parts[p].width} : lists_of(job.parts[p], tokens, processors);
    lists.acts = reinterpret_cast<Act*>(take(tokens * lists.splits * lists.capacity * sizeof(Act)));
    lists.counts = reinterpret_cast<int32_t*>(take(tokens * lists.splits * sizeof(int32_t)));
  }
  job.dense_rows = reinterpret_cast<int32_t*>(take(tokens * sizeof(int32_t)));
  job.dense_count = reinterpret_cast<int32_t*>(take(sizeof(int32_t)));
  space.counters = reinterpret_cast<int32_t*>(take((1 + 4 * kFewTokens) * sizeof(int32_t)));
  return space;
}

int64_t chunk_of(int64_t tokens) { return tokens < kChunk ? tokens : kChunk; }

}  // namespace

int64_t transcode_workspace(const CudaTranscode& job) {
  CudaTranscode copy = job;
  int processors = 0;
  if (multiprocessors(&processors) != 0) return -1;
  return carve(copy, chunk_of(job.tokens), job.tokens <= kFewTokens, processors, nullptr).bytes;
}

int transcode(CudaTranscode job, void* workspace, cudaStream_t stream) {
  int processors = 0;
  int error = multiprocessors(&processors);
  if (error != 0) return error;
  const int64_t tokens = job.tokens, chunk = chunk_of(tokens);
  const bool few = tokens <= kFewTokens;
  const Space space = carve(job, chunk, few, processors, static_cast<char*>(workspace));
  job.dense_above = static_cast<int32_t>(job.parts[0].width / kLatentsPerDense);
  for (int64_t first = 0; first < tokens && error == 0; first += chunk) {
    CudaTranscode part = job;
    part.tokens = chunk < tokens - first ? chunk : tokens - first;
    part.x += first * job.d_model;
    part.recon += first * job.d_model;
    for (int p = 0; p < job.n_parts; ++p) {
      if (part.parts[p].l0 != nullptr) part.parts[p].l0 += first, part.parts[p].l1 += first;
    }
    if (few) {
      error = launch_generate(part, space.counters, stream);
    } else {
      error = launch_encode(part, stream);
      if (error == 0) error = launch_decode(part, stream);
    }
  }
  return error;
}

int64_t encode_workspace(const CudaEncode& job) {
  CudaTranscode copy = job.of;
  int processors = 0;
  if (multiprocessors(&processors) != 0) return -1;
  return carve(copy, chunk_of(copy.tokens), false, processors, nullptr).bytes;
}

int encode(CudaEncode job, void* workspace, cudaStream_t stream) {
  int processors = 0;
  int error = multiprocessors(&processors);
  if (error != 0) return error;
  const int64_t tokens = job.of.tokens, chunk = chunk_of(tokens);
  carve(job.of, chunk, false, processors, static_cast<char*>(workspace));
  for (int64_t first = 0; first < tokens && error == 0; first += chunk) {
    CudaEncode part = job;
    part.of.tokens = chunk < tokens - first ? chunk : tokens - first;
    part.of.x += first * job.of.d_model;
    part.values += first * job.capacity;
    part.indices += first * job.capacity;
    part.counts += first;
    error = launch_encode(part.of, stream);
    if (error == 0) error = launch_compact(part, stream);
  }
  return error;
}

}  // namespace deltatc
