// The dense classification loss of one image and level in one pass: sums and gradient.
//
// Compiled by native.py for the machine it runs on, which also defines the label codes RETINA_* and
// the formulas' numbers. There are no intrinsics: the compiler vectorises the loops, because the
// arithmetic has no branches and calls no library, so one source serves every processor. Symbols
// are those of functional.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

// A loop is vectorised only if everything that it calls is inlined. Compilers may decide not to
// inline long functions.
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace {

// A product is cheaper than a power, so the gammas in use have their own code.
enum Kind { kCrossEntropy, kFocal1, kFocal2, kFocal, kFocalStar };

struct Loss {
  float gamma, beta;
};

struct Terms {
  float value, derivative;  // l(x_t) and dl/dz at x_t = -z: a logit z with label 0
};

ALWAYS_INLINE float select(bool condition, float a, float b) { return condition ? a : b; }

ALWAYS_INLINE float from_bits(int32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

ALWAYS_INLINE int32_t to_bits(float f) {
  int32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

// exp(y) for y <= 0, or exp(y + low) with a small correction low; at least 1e-38.
// exp(y) = 2^n exp(r), |r| <= ln(2) / 2: minimax polynomial of degree 6, relative error 7e-8.
template <bool with_low>
ALWAYS_INLINE float exp_negative(float y, float low) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = select(y < -87.0f, -87.0f, y);  // keeps NaN
  const float shifted = std::fma(bounded, 1.44269504f, shift);  // n is in its low bits
  const float n = shifted - shift;
  float r = std::fma(n, -0.693145752f, bounded);  // ln 2 as a sum; n times its first part is exact
  r = std::fma(n, -1.42860677e-6f, r);
  // the low part of an infinite or huge y is meaningless
  if (with_low) r += select(y < -87.0f, 0.0f, low);
  float p = 0.001383683760650456f;
  p = std::fma(p, r, 0.008374815806746483f);
  p = std::fma(p, r, 0.04166822507977486f);
  p = std::fma(p, r, 0.16666419804096222f);
  p = std::fma(p, r, 0.49999991059303284f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  // multiply by 2^n: add n to the exponent of p
  const uint32_t exponent = static_cast<uint32_t>(to_bits(shifted)) << 23;
  return select(y == y, from_bits(to_bits(p) + static_cast<int32_t>(exponent)), y);
}

// log(1 + e) for e in [0, 1]: e times a minimax polynomial of degree 9, relative error 1.4e-7.
ALWAYS_INLINE float log1p_unit(float e) {
  float p = -0.003243928076699376f;
  p = std::fma(p, e, 0.019851025193929672f);
  p = std::fma(p, e, -0.05695871263742447f);
  p = std::fma(p, e, 0.10603571683168411f);
  p = std::fma(p, e, -0.15305542945861816f);
  p = std::fma(p, e, 0.19675922393798828f);
  p = std::fma(p, e, -0.2495412975549698f);
  p = std::fma(p, e, 0.3332996070384979f);
  p = std::fma(p, e, -0.4999990165233612f);
  p = std::fma(p, e, 1.0f);
  return p * e;
}

template <Kind kind>
ALWAYS_INLINE Terms terms(float x, const Loss& loss) {
  float z = x, z_low = 0.0f;
  if (kind == kFocalStar) {  // z = gamma x - beta, and its rounding error z_low
    z = std::fma(loss.gamma, x, -loss.beta);
    z_low = std::fma(loss.gamma, x, -(z + loss.beta));
  }
  const float a = std::fabs(z);
  const float e = exp_negative<kind == kFocalStar>(-a, select(z < 0, z_low, -z_low));
  const float r = 1.0f / (1.0f + e);
  const float p = select(z < 0, e * r, r);  // sigmoid(z) = 1 - p_t
  const float log1p_e = log1p_unit(e);
  const float softplus = select(z < 0, 0.0f, z) + log1p_e;  // -log p_t
  if (kind == kCrossEntropy) return {softplus, p};
  if (kind == kFocalStar) return {softplus / loss.gamma, p};
  const float p_t = select(z < 0, r, e * r);
  float modulating;  // (1 - p_t)^gamma
  if (kind == kFocal1) {
    modulating = p;
  } else if (kind == kFocal2) {
    modulating = p * p;
  } else {  // exp(gamma log p), log p = min(z, 0) - log1p(e), with the product as high + low
    const float negative = select(z < 0, select(z < -1e30f, -1e30f, z), 0.0f);
    const float high = loss.gamma * negative;
    const float low = std::fma(loss.gamma, negative, -high) - loss.gamma * log1p_e;
    // |low| > |high| only near z = 0, where the rounding of the sum does not matter
    const float sum = high + low;
    modulating = exp_negative<true>(sum, low - (sum - high));
  }
  return {modulating * softplus, modulating * std::fma(loss.gamma * p_t, softplus, p)};
}

struct BFloat16 {
  uint16_t bits;
};

ALWAYS_INLINE float load(const float* x) { return *x; }
ALWAYS_INLINE float load(const BFloat16* x) { return from_bits(static_cast<int32_t>(x->bits) << 16); }
ALWAYS_INLINE void store(float* out, float value) { *out = value; }
ALWAYS_INLINE void store(BFloat16* out, float value) {  // to nearest, ties to even; keeps NaN
  const uint32_t bits = static_cast<uint32_t>(to_bits(value));
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  out->bits = static_cast<uint16_t>((value == value ? rounded : (bits | 0x400000)) >> 16);
}

constexpr int16_t kBackground = RETINA_BACKGROUND, kIgnored = RETINA_IGNORED;
constexpr int64_t kBlock = 128;  // entries (or a few more) of a Block
constexpr int64_t kMaxFloatSum = 1024;  // entries that are summed in float; the rest is in double
constexpr int64_t kLanes = 32;  // of the widest vector; a remainder takes as long as a whole one

struct Sums {
  double background = 0.0, foreground = 0.0;
};

struct Job {
  const void* x;
  void* grad;
  const int16_t* labels;
  const float *weight_neg, *weight_pos;  // (K,)
  int64_t classes, places;               // K, H * W
  bool channels_last;
  Loss loss;
  float scale;
};

// The labels of a block's entries. sign is 1 for label 0, -1 for label 1, 0 for an ignored anchor.
// The loss is l(x_t) with x_t = -z and z = sign x. weight is alpha_t.
struct Block {
  std::vector<float> sign, weight;

  explicit Block(int64_t size) : sign(size, 1.0f), weight(size) {}
};

// Sums and gradient of entries that are all background and have one weight.
template <Kind kind, bool want_grad, class T>
void run_background(const T* x, T* grad, int64_t count, float weight, const Loss& loss,
                    float scale, Sums& sums) {
  const float factor = weight * scale;
  for (int64_t start = 0; start < count; start += kMaxFloatSum) {
    const int64_t stop = std::min(start + kMaxFloatSum, count);
    float background = 0.0f;
#pragma omp simd reduction(+ : background)
    for (int64_t j = start; j < stop; ++j) {
      const Terms t = terms<kind>(load(x + j), loss);
      background += t.value;
      if (want_grad) store(grad + j, factor * t.derivative);
    }
    sums.background += static_cast<double>(weight) * background;
  }
}

// Sums and gradient of entries with any labels and weights.
template <Kind kind, bool want_grad, class T>
void run(const T* x, T* grad, int64_t count, const Block& block, const Loss& loss, float scale,
         Sums& sums) {
  const float *sign = block.sign.data(), *weight = block.weight.data();
  for (int64_t start = 0; start < count; start += kMaxFloatSum) {
    const int64_t stop = std::min(start + kMaxFloatSum, count);
    float background = 0.0f, foreground = 0.0f;
#pragma omp simd reduction(+ : background, foreground)
    for (int64_t j = start; j < stop; ++j) {
      const Terms t = terms<kind>(sign[j] * load(x + j), loss);
      // select, not a product with 0: an ignored logit may be infinite or NaN
      const float value = select(sign[j] == 0, 0.0f, weight[j] * t.value);
      background += select(sign[j] < 0, 0.0f, value);
      foreground += select(sign[j] < 0, value, 0.0f);
      if (want_grad) {
        const float factor = sign[j] * weight[j] * scale;
        store(grad + j, select(sign[j] == 0, 0.0f, factor * t.derivative));
      }
    }
    sums.background += background;
    sums.foreground += foreground;
  }
}

bool all_background(const int16_t* labels, int64_t count) {
  int16_t different = 0;  // no early exit, so that the loop is vectorised
  for (int64_t j = 0; j < count; ++j) different |= labels[j] ^ kBackground;
  return different == 0;
}

// NCHW logits: the planes [begin, end) of the image's A * K.
template <Kind kind, bool want_grad, class T>
void work_planes(const Job& job, int64_t begin, int64_t end, Sums& sums) {
  Block block(kBlock);
  float *sign = block.sign.data(), *weight = block.weight.data();
  std::vector<char> background((job.places + kBlock - 1) / kBlock);
  for (int64_t plane = begin; plane < end; ++plane) {
    const int32_t k = static_cast<int32_t>(plane % job.classes);
    const int16_t* labels = job.labels + plane / job.classes * job.places;
    const float negative = job.weight_neg[k], positive = job.weight_pos[k];
    if (plane == begin || k == 0) {  // another anchor
      for (size_t i = 0; i < background.size(); ++i) {
        const int64_t start = static_cast<int64_t>(i) * kBlock;
        background[i] = all_background(labels + start, std::min(kBlock, job.places - start));
      }
    }
    for (int64_t start = 0, stop; start < job.places; start = stop) {
      const bool plain = background[start / kBlock];
      stop = std::min(start + kBlock, job.places);
      while (plain && stop < job.places && background[stop / kBlock]) {
        stop = std::min(stop + kBlock, job.places);
      }
      const int64_t count = stop - start;
      const T* x = static_cast<const T*>(job.x) + plane * job.places + start;
      T* grad = want_grad ? static_cast<T*>(job.grad) + plane * job.places + start : nullptr;
      if (plain) {
        run_background<kind, want_grad>(x, grad, count, negative, job.loss, job.scale, sums);
        continue;
      }
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        const int32_t label = labels[start + j];
        sign[j] = select(label == kIgnored, 0.0f, select(label == k, -1.0f, 1.0f));
        weight[j] = select(label == k, positive, negative);
      }
      run<kind, want_grad>(x, grad, count, block, job.loss, job.scale, sums);
    }
  }
}

// NHWC logits: the anchors [begin, end) of the image's H * W * A.
template <Kind kind, bool want_grad, class T>
void work_anchors(const Job& job, int64_t begin, int64_t end, Sums& sums) {
  // the fewest anchors whose entries fill whole vectors
  const int64_t whole = kLanes / std::gcd(kLanes, job.classes);
  const int64_t step = (kBlock / (job.classes * whole) + 1) * whole;
  const float first = job.weight_neg[0];
  const bool one_weight =
      std::all_of(job.weight_neg, job.weight_neg + job.classes, [=](float w) { return w == first; });
  Block block(step * job.classes);
  float *sign = block.sign.data(), *weight = block.weight.data();
  bool filled = false;  // whether all signs and weights of the block are those of background
  for (int64_t start = begin, stop; start < end; start = stop) {
    stop = std::min(start + step, end);
    const bool plain = all_background(job.labels + start, stop - start);
    while (plain && one_weight && stop < end) {
      const int64_t next = std::min(stop + step, end);
      if (!all_background(job.labels + stop, next - stop)) break;
      stop = next;
    }
    const int64_t count = stop - start;
    const T* x = static_cast<const T*>(job.x) + start * job.classes;
    T* grad = want_grad ? static_cast<T*>(job.grad) + start * job.classes : nullptr;
    if (plain && one_weight) {
      run_background<kind, want_grad>(x, grad, count * job.classes, first, job.loss, job.scale,
                                      sums);
      continue;
    }
    if (!filled) {
      std::fill(block.sign.begin(), block.sign.end(), 1.0f);
      for (int64_t i = 0; i < step; ++i) {
        std::copy_n(job.weight_neg, job.classes, weight + i * job.classes);
      }
    }
    filled = plain;
    for (int64_t i = 0; i < count; ++i) {
      const int16_t label = job.labels[start + i];
      if (label == kIgnored) std::fill_n(sign + i * job.classes, job.classes, 0.0f);
      if (label >= 0) {
        weight[i * job.classes + label] = job.weight_pos[label];
        sign[i * job.classes + label] = -1.0f;
      }
    }
    run<kind, want_grad>(x, grad, count * job.classes, block, job.loss, job.scale, sums);
  }
}

template <Kind kind, bool want_grad, class T>
void work(const Job& job, int64_t begin, int64_t end, Sums& sums) {
  if (job.channels_last) {
    work_anchors<kind, want_grad, T>(job, begin, end, sums);
  } else {
    work_planes<kind, want_grad, T>(job, begin, end, sums);
  }
}

template <Kind kind>
void dispatch(const Job& job, bool bfloat16, int64_t begin, int64_t end, Sums& sums) {
  if (bfloat16) {
    job.grad ? work<kind, true, BFloat16>(job, begin, end, sums)
             : work<kind, false, BFloat16>(job, begin, end, sums);
  } else {
    job.grad ? work<kind, true, float>(job, begin, end, sums)
             : work<kind, false, float>(job, begin, end, sums);
  }
}

void dispatch(int formula, const Job& job, bool bfloat16, int64_t begin, int64_t end, Sums& sums) {
  const float gamma = job.loss.gamma;
  if (formula == RETINA_FOCAL_STAR) return dispatch<kFocalStar>(job, bfloat16, begin, end, sums);
  if (gamma == 0) return dispatch<kCrossEntropy>(job, bfloat16, begin, end, sums);
  if (gamma == 1) return dispatch<kFocal1>(job, bfloat16, begin, end, sums);
  if (gamma == 2) return dispatch<kFocal2>(job, bfloat16, begin, end, sums);
  return dispatch<kFocal>(job, bfloat16, begin, end, sums);
}

}  // namespace

// One image of one level; the arguments are explained in interface.py.
// labels: (A, H * W), or (H * W, A) if channels_last. grad: may be x, or null. formula: a RETINA_*
// number. sums: the background and the foreground sum are added to it.
extern "C" void retina_dense_loss(const void* x, void* grad, const int16_t* labels,
                                  const float* weight_neg, const float* weight_pos,
                                  int64_t anchors, int64_t classes, int64_t places,
                                  int32_t channels_last, int32_t bfloat16, int32_t formula,
                                  float gamma, float beta, float scale, int32_t threads,
                                  double* sums) {
  const Job job{x,      grad,   labels,             weight_neg,    weight_pos,
                classes, places, channels_last != 0, {gamma, beta}, scale};
  const int64_t units = channels_last ? places * anchors : anchors * classes;
  // starting a thread takes as long as computing some ten thousand entries
  const int64_t parts_wanted = std::min<int64_t>(threads, 1 + anchors * classes * places / 65536);
  std::vector<Sums> parts(parts_wanted);
  std::vector<std::thread> pool;
  const auto do_part = [&](int64_t i) {
    dispatch(formula, job, bfloat16 != 0, units * i / parts_wanted, units * (i + 1) / parts_wanted,
             parts[i]);
  };
  for (int64_t i = 1; i < parts_wanted; ++i) {
    try {
      pool.emplace_back(do_part, i);
    } catch (const std::system_error&) {  // the system has no more threads: do it in this one
      do_part(i);
    }
  }
  do_part(0);
  for (auto& thread : pool) thread.join();
  for (const Sums& part : parts) {  // in a fixed order: the same sum every time
    sums[0] += part.background;
    sums[1] += part.foreground;
  }
}
