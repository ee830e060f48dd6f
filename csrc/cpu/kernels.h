// What the CPU kernels share: a call's plain pointers, a block of tokens, a strip of latents, a token's list of acts.
// exact.inc and screen.inc hold the inner loops and are compiled once for each instruction set (kernels.cpp);
// transcode.cpp and sparse.cpp say in which order they run.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

namespace deltatc {

constexpr int64_t kStrip = 32;   // latents that are encoded together
constexpr int64_t kBlock = 480;  // tokens that are encoded together: so many use each weight while it is in cache
constexpr int64_t kTile = 12;    // tokens of a tile of the screen; with the matrix unit, 32
constexpr int64_t kGroup = 64;   // acts summed in Acc before they are added to the double total
constexpr int64_t kAhead = 8;    // acts by which the rows of W_dec are fetched before they are added

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t strips(int64_t width) { return (width + kStrip - 1) / kStrip; }

// Elements of a packed row: whole cache lines, zeros behind d_model.
template <typename T>
constexpr int64_t padded(int64_t d_model) {
  return round_up(d_model, 64 / int64_t(sizeof(T)));
}

// The screen of a strip (screen.inc): what the 32 latents are in eight bits, and how far that is from them.
struct ScreenHead {
  float scale[kStrip], norm[kStrip], error[kStrip];
};
constexpr int64_t quads(int64_t d_model) { return round_up(d_model + !d_model, 64) / 4; }  // groups of four steps
constexpr int64_t screen_bytes(int64_t d_model) { return sizeof(ScreenHead) + quads(d_model) * kStrip * 4; }
constexpr int64_t kMaxScreened = 1 << 16;  // d_model up to which the screen's sums fit in 32 bits

// One transcoder's weights, contiguous. `k` latents are kept of each token's active ones (width: all of them).
template <typename T>
struct Part {
  const T* rows = nullptr;          // W_enc as [width][padded(d_model)]
  const uint8_t* screen = nullptr;  // [strips][screen_bytes], or null
  const T* b_enc = nullptr;         // [width]
  const T* threshold = nullptr;     // [width]
  const T* W_dec = nullptr;         // [width, d_model]
  const T* b_dec = nullptr;         // [d_model]
  int64_t width = 0;
  int64_t k = 0;
  float* l0 = nullptr;  // [tokens], or null where nobody asks
  float* l1 = nullptr;
};

template <typename T>
struct Transcode {
  int64_t tokens = 0;
  int64_t d_model = 0;
  const T* x = nullptr;  // [tokens, d_model]
  T* recon = nullptr;    // [tokens, d_model]
  Part<T> base;
  Part<T> delta;
  bool has_delta = false;
  double alpha = 1.0;
};

template <typename Acc>
struct Act {
  Acc value;
  int32_t index;
};

// One token's active latents, in the order of their indices.
template <typename Acc>
struct List {
  std::vector<Act<Acc>> acts;  // the first `size` are real
  int64_t size = 0;
  Acc floor = 0;  // what is not above it cannot be among the k largest any more
};

// Uninitialised memory on a cache line's boundary: a vector load never straddles two.
template <typename V>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<V*>(::operator new(size * sizeof(V), kAlign))) {}
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  V* get() const { return data_; }
  V& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  V* data_;
};

// A block of tokens as the inner loops read them.
template <typename T>
struct Tokens {
  explicit Tokens(int64_t rows, int64_t d)
      : d_model(d), exact(rows * padded<T>(d)), quads((rows + 32) * deltatc::quads(d)),
        scale(rows), norm(rows), error(rows), offset(rows), broken(rows) {}
  int64_t d_model;
  int64_t rows = 0;
  Scratch<Accumulator<T>> exact;  // [rows][padded], as exact.inc's Exact<T>
  Scratch<int32_t> quads;         // [tile of kTile][quad][kTile]: four signed bytes each; matrix unit: [rows][quad]
  Scratch<float> scale, norm, error;
  Scratch<int32_t> offset;  // what the weights' offset of 128 adds to a screen's sum
  Scratch<bool> broken;     // not finite
};

// Up to kStrip latents of a part, with what is compared in Acc; a negative threshold acts as 0.
template <typename T>
struct Strip {
  Strip(const Part<T>& part, int64_t strip, int64_t d_model);
  int64_t first, count;
  const T* rows;
  const uint8_t* screen;
  Accumulator<T> bias[kStrip], threshold[kStrip];
};

// What one thread needs beside the lists while it encodes.
template <typename T>
struct Workspace {
  explicit Workspace(int64_t rows) : pre(rows * kStrip) {}
  Scratch<Accumulator<T>> pre;   // [rows][kStrip]
  uint32_t candidates[kBlock];   // of each row, one bit a latent
  uint16_t hits[kStrip][kBlock];  // of each latent, the rows that have it as a candidate
  double share = 0.0;            // of candidates among the last strip's pairs
};

// One instruction set's inner loops, by pointer.
template <typename T>
struct Kernels {
  using Acc = Accumulator<T>;
  bool screens;
  // rows [count][padded] -> a strip of the screen
  void (*screen_latents)(const T* rows, int64_t count, int64_t d_model, uint8_t* strip);
  void (*pack_tokens)(const T* x, int64_t begin, int64_t end, Tokens<T>& tokens);
  // Appends the strip's active latents to each row's list; marks rows with a pre_act that is not finite.
  void (*encode_strip)(const Strip<T>& strip, const Tokens<T>& tokens, List<Acc>* lists, bool* broken,
                       Workspace<T>& work);
  // total += scale * acts @ W_dec
  void (*decode)(const Act<Acc>* acts, int64_t size, const T* W_dec, int64_t d_model, double scale, Acc* sums,
                 double* total);
};

template <typename T>
Kernels<T> kernels();
std::string cpu_kernels();

}  // namespace deltatc
