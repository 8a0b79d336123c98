// The kernel of a step: a block steps one chunk of one segment. step_cuda.cu has it for plain
// dtypes, low_memory_cuda.cu for the formats for low memory.
//
// The step is bound by memory: per float32 parameter 28 bytes move (p, g, m, v in; p, m, v out). An
// H100 can issue some 280 instructions in that time; the update needs 50, IEEE division and
// square root among them. So the design keeps many bytes in flight: a thread issues all of its
// 16-byte loads, of four vectors from each of four streams, before it uses the first. Measured on
// an H100, 2^28 float32 elements, as a share of a copy that moves as many bytes: one vector at a
// time 95%, two 96%, four 98%, and four without streaming cache hints (ld.cs, st.cs) 99.6%. Fewer
// threads are resident then, as four vectors take 104 registers. That is enough: 128 KiB in flight
// on a multiprocessor, where 25 KiB hide the latency. bench/gpu/machine_code.py counts all this for
// every dtype set, and bench/gpu/tune.py measures variants of the constants.
//
// The moments of block8 come in blocks of 128 elements. A thread steps 16 neighbours, so 8 lanes
// share a block: they find its largest elements by shuffles, while the new moments stay in
// registers.
#pragma once

#include <algorithm>

#include "core/update.h"
#include "cuda/formats_cuda.h"
#include "cuda/launch.h"
#include "cuda/step_cuda.h"

namespace radam {
namespace {

// StepScalars as the kernel wants them; the host makes them where it can.
template <typename T>
struct Row {
  Scalars<T> s;
  Action action;
  Key key;

  RADAM_INLINE Row() : Row(StepScalars{}) {}
  RADAM_INLINE explicit Row(const StepScalars& scalars)
      : s(scalars),
        action(action_of(scalars)),
        key{static_cast<uint32_t>(scalars.key_low), static_cast<uint32_t>(scalars.key_high)} {}
};

template <typename T>
struct Arguments {
  const Segment* segments;
  const uintptr_t* grads;
  const LowMemory* low_memory;
  const Work* work;
  int run;
  const StepScalars* device_scalars;
  const double* factor;
  Row<T> rows[kInlineScalars];
};

// A row of scalars, with the factor in float64, as on the host.
template <typename T>
__device__ __forceinline__ Row<T> row_of(const Arguments<T>& arguments, int64_t index) {
  if (arguments.device_scalars) {
    StepScalars scalars = arguments.device_scalars[index];
    if (arguments.factor) scalars.grad_scale *= *arguments.factor;
    return Row<T>(scalars);
  }
  Row<T> row = arguments.rows[index];
  if (arguments.factor) {
    row.s.grad_scale = static_cast<T>(static_cast<double>(row.s.grad_scale) * *arguments.factor);
  }
  return row;
}

template <typename P, typename G, typename S>
constexpr int kWidest = std::max({sizeof(P), sizeof(G), sizeof(S)});

// Elements of a vector: 16 bytes of the widest stream, so that neighbours in a warp access
// neighbouring bytes of every stream; but no less than 8 bytes of any stream, and all that a thread
// steps of block8. bench/gpu/tune.py tries RADAM_NARROWEST.
template <typename P, typename G, typename S>
constexpr int vector_elements() {
  if (kSame<S, block8>) return 16;
  if (kSame<P, master24>) return 8;
#ifdef RADAM_NARROWEST
  return 16 / std::min({sizeof(P), sizeof(G), sizeof(S)});
#else
  return 16 / kWidest<P, G, S>;
#endif
}
template <typename P, typename G, typename S>
constexpr int kVector = vector_elements<P, G, S>();

// Vectors that a thread loads at once: fewer if they are wider than 16 bytes.
template <typename P, typename G, typename S>
constexpr int kVectorsOf =
    kSame<S, block8>     ? 1
    : kSame<P, master24> ? kVectors * 16 / (kWidest<P, G, S> * kVector<P, G, S>)
                         : kVectors;

template <typename P, typename G, typename S>
constexpr int64_t kChunk = int64_t{kThreads} * kVectorsOf<P, G, S> * kVector<P, G, S>;

// Whether the vectors of a segment can be accessed: 16 bytes of four streams, and a remainder's.
template <typename P, typename G, typename S>
__device__ __forceinline__ bool aligned(const Segment& s, uintptr_t grad, const void* remainder) {
  using Word = typename Pack<Remainder<P>, kVector<P, G, S>>::Word;
  const uintptr_t all = reinterpret_cast<uintptr_t>(s.param) | grad |
                        reinterpret_cast<uintptr_t>(s.exp_avg) |
                        reinterpret_cast<uintptr_t>(s.exp_avg_sq);
  const bool remainders = reinterpret_cast<uintptr_t>(remainder) % sizeof(Word) == 0;
  return all % 16 == 0 && (remainders || !kHasRemainder<P>);
}

// Steps one element, for moments that have no blocks.
template <typename P, typename G, typename S, typename T = Compute<P>>
__device__ __forceinline__ void step_element(P& p, Remainder<P>& r, G g, S& m, S& v,
                                             const Scalars<T>& s, bool l2, Action action,
                                             uint32_t word) {
  T p_ = decode_weight(p, r), m_ = decode_moment<T>(m), v_ = decode_moment<T>(v);
  radam_update(p_, static_cast<T>(widen(g)), m_, v_, s, l2, action);
  encode_weight(p_, word, p, r);
  m = encode_moment<kExpAvgMoment, S>(m_, word);
  v = encode_moment<kExpAvgSqMoment, S>(v_, word);
}

// The elements that a lane steps of a block.
template <typename P, typename G, int kN>
struct BlockPart {
  Pack<P, kN> p;
  Pack<Remainder<P>, kN> r;
  Pack<G, kN> g;
  Pack<block8, kN> m, v;
  uint8_t m_exponent, v_exponent;
};

// Steps a block that kLanes lanes share; word(j) is the random word of element j of the part. All
// lanes of the warp take part. Elements that are not there are 0: these stay 0, unless the whole
// block becomes NaN.
template <int kLanes, typename P, typename G, int kN, typename Word>
__device__ __forceinline__ void step_block(BlockPart<P, G, kN>& part, Scalars<float> s, bool l2,
                                           Action action, const Word& word) {
  uint32_t m_codes[kN / 4], v_codes[kN / 4];
  memcpy(m_codes, part.m.x, kN);
  memcpy(v_codes, part.v.x, kN);
  const uint32_t m_exponents = add_exponents<kExpAvgMoment>(part.m_exponent);
  const uint32_t v_exponents = add_exponents<kExpAvgSqMoment>(part.v_exponent);
  // A block of NaN stays one, whatever its codes are.
  if (part.m_exponent == 255) s.one_minus_beta1 = bit_cast<float>(0x7fc00000u);
  if (part.v_exponent == 255) s.beta2 = bit_cast<float>(0x7fc00000u);

  float p[kN], m[kN], v[kN];
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    p[j] = decode_weight(part.p.x[j], part.r.x[j]);
    m[j] = decode_code<kExpAvgMoment>(code_of(m_codes[j / 4], j % 4), m_exponents);
    v[j] = decode_code<kExpAvgSqMoment>(code_of(v_codes[j / 4], j % 4), v_exponents);
    update_moments(p[j], widen(part.g.x[j]), m[j], v[j], s, l2);
  }
  const uint32_t m_exponent =
      block_exponent<kExpAvgMoment>(largest_of_lanes<kLanes>(largest_of(m)));
  const uint32_t v_exponent =
      block_exponent<kExpAvgSqMoment>(largest_of_lanes<kLanes>(largest_of(v)));
  if (action == kRectified) {
#pragma unroll
    for (int j = 0; j < kN; ++j) take_step(p[j], m[j], v[j], s, kRectified);
  } else if (action == kMomentum) {
#pragma unroll
    for (int j = 0; j < kN; ++j) take_step(p[j], m[j], v[j], s, kMomentum);
  }

  const int32_t m_base = subtract_base<kExpAvgMoment>(m_exponent);
  const int32_t v_base = subtract_base<kExpAvgSqMoment>(v_exponent);
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const uint32_t word_ = word(j);
    encode_weight(p[j], word_, part.p.x[j], part.r.x[j]);
    part.m.x[j] = {static_cast<uint8_t>(encode_code<kExpAvgMoment>(m[j], m_base, word_) >> 24)};
    part.v.x[j] = {static_cast<uint8_t>(encode_code<kExpAvgSqMoment>(v[j], v_base, word_) >> 24)};
  }
  part.m_exponent = static_cast<uint8_t>(m_exponent);
  part.v_exponent = static_cast<uint8_t>(v_exponent);
}

template <typename P, typename G, typename S>
__global__ void __launch_bounds__(kThreads, kLowMemory<P, S> ? 2 : 0)
    radam_step_kernel(const __grid_constant__ Arguments<Compute<P>> arguments) {
  using T = Compute<P>;
  using R = Remainder<P>;
  constexpr int kN = kVector<P, G, S>;
  constexpr int64_t kElements = kChunk<P, G, S>;

  const auto numel = [&](int64_t index) { return arguments.segments[index].numel; };
  const Chunk chunk = chunk_of_block<kElements>(arguments.work, arguments.run, numel);
  const int64_t index = chunk.index, begin = chunk.begin;
  const int count = chunk.count;
  const Segment& segment = arguments.segments[index];
  const uintptr_t grad = arguments.grads[index];
  const Row<T> row = row_of(arguments, segment.scalars);
  const Scalars<T>& s = row.s;
  const Action action = row.action;
  if (action == kSkip) return;
  const bool l2 = s.weight_decay != 0;

  P* const params = static_cast<P*>(segment.param) + begin;
  const G* const grads = reinterpret_cast<const G*>(grad) + begin;
  S* const exp_avgs = static_cast<S*>(segment.exp_avg) + begin;
  S* const exp_avg_sqs = static_cast<S*>(segment.exp_avg_sq) + begin;
  LowMemory extra = {};
  if constexpr (kLowMemory<P, S>) extra = arguments.low_memory[index];
  R* const remainders = kHasRemainder<P> ? static_cast<R*>(extra.remainder) + begin : nullptr;
  // A step that only updates the moments leaves the weights as they are: not rounded again.
  const bool stores_weights = !kLowMemory<P, S> || action != kHold;

  // The random words. In the vectors of a chunk all indices must have the same upper half.
  const uint64_t first_index = extra.first_index + static_cast<uint64_t>(begin);
  const uint32_t index_low = static_cast<uint32_t>(first_index);
  const bool one_key = !kRandom<P, S> || ~index_low >= static_cast<uint32_t>(count - 1);
  const auto key_at = [&](uint64_t index) {
    return element_key(row.key, extra.key, static_cast<uint32_t>(index >> 32));
  };
  const Key key = kRandom<P, S> ? key_at(first_index) : Key{};
  const auto word_at = [&](int i) {
    return kRandom<P, S> ? random_word(key, index_low + static_cast<uint32_t>(i)) : 0;
  };
  const auto any_word_at = [&](int i) {
    const uint64_t index = first_index + static_cast<uint64_t>(i);
    return kRandom<P, S> ? random_word(key_at(index), static_cast<uint32_t>(index)) : 0;
  };

  const bool vectors = one_key && aligned<P, G, S>(segment, grad, extra.remainder);
  if constexpr (kSame<S, block8>) {
    uint8_t* const exp_avg_exponents =
        static_cast<uint8_t*>(extra.exp_avg_exponent) + begin / kBlock;
    uint8_t* const exp_avg_sq_exponents =
        static_cast<uint8_t*>(extra.exp_avg_sq_exponent) + begin / kBlock;
    // Whole blocks, 8 lanes each, and whole warps, which the shuffles need.
    const int done = vectors ? count - count % (kWarp * kN) : 0;
    const int i = threadIdx.x * kN;
    if (i < done) {
      BlockPart<P, G, kN> part;
      part.p = load<P, kN>(params + i);
      if constexpr (kHasRemainder<P>) part.r = load<R, kN>(remainders + i);
      part.g = load<G, kN>(grads + i);
      part.m = load<S, kN>(exp_avgs + i);
      part.v = load<S, kN>(exp_avg_sqs + i);
      part.m_exponent = exp_avg_exponents[i / kBlock];
      part.v_exponent = exp_avg_sq_exponents[i / kBlock];
      step_block<kBlock / kN>(part, s, l2, action, [&](int j) { return word_at(i + j); });
      if (stores_weights) {
        store(params + i, part.p);
        if constexpr (kHasRemainder<P>) store(remainders + i, part.r);
      }
      store(exp_avgs + i, part.m);
      store(exp_avg_sqs + i, part.v);
      if (i % kBlock == 0) {
        exp_avg_exponents[i / kBlock] = part.m_exponent;
        exp_avg_sq_exponents[i / kBlock] = part.v_exponent;
      }
    }
    // The rest of a segment, or all of one that does not start on 16 bytes: one warp for a block.
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int first = done + threadIdx.x / kWarp * kBlock; first < count;
         first += kThreads / kWarp * kBlock) {
      const auto at = [&](int j) { return first + j * kWarp + lane; };
      const auto inside = [&](int j) { return at(j) < count; };
      BlockPart<P, G, kBlock / kWarp> part = {};
#pragma unroll
      for (int j = 0; j < kBlock / kWarp; ++j) {
        if (!inside(j)) continue;
        part.p.x[j] = params[at(j)];
        if constexpr (kHasRemainder<P>) part.r.x[j] = remainders[at(j)];
        part.g.x[j] = grads[at(j)];
        part.m.x[j] = exp_avgs[at(j)];
        part.v.x[j] = exp_avg_sqs[at(j)];
      }
      part.m_exponent = exp_avg_exponents[first / kBlock];
      part.v_exponent = exp_avg_sq_exponents[first / kBlock];
      step_block<kWarp>(part, s, l2, action, [&](int j) { return any_word_at(at(j)); });
#pragma unroll
      for (int j = 0; j < kBlock / kWarp; ++j) {
        if (!inside(j)) continue;
        if (stores_weights) {
          params[at(j)] = part.p.x[j];
          if constexpr (kHasRemainder<P>) remainders[at(j)] = part.r.x[j];
        }
        exp_avgs[at(j)] = part.m.x[j];
        exp_avg_sqs[at(j)] = part.v.x[j];
      }
      if (lane == 0) {
        exp_avg_exponents[first / kBlock] = part.m_exponent;
        exp_avg_sq_exponents[first / kBlock] = part.v_exponent;
      }
    }
  } else {
    // Steps some vectors of this thread: all loads come before the first use.
    constexpr int kStride = kThreads * kN;
    const auto step_vectors = [&](int first, auto vectors) {
      constexpr int kCount = decltype(vectors)::value;
      Pack<P, kN> p[kCount];
      Pack<R, kN> r[kCount];
      Pack<G, kN> g[kCount];
      Pack<S, kN> m[kCount], v[kCount];
#pragma unroll
      for (int k = 0, i = first; k < kCount; ++k, i += kStride) {
        p[k] = load<P, kN>(params + i);
        if constexpr (kHasRemainder<P>) r[k] = load<R, kN>(remainders + i);
        g[k] = load<G, kN>(grads + i);
        m[k] = load<S, kN>(exp_avgs + i);
        v[k] = load<S, kN>(exp_avg_sqs + i);
      }
#pragma unroll
      for (int k = 0, i = first; k < kCount; ++k, i += kStride) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          step_element(p[k].x[j], r[k].x[j], g[k].x[j], m[k].x[j], v[k].x[j], s, l2, action,
                       word_at(i + j));
        }
        if (stores_weights) {
          store(params + i, p[k]);
          if constexpr (kHasRemainder<P>) store(remainders + i, r[k]);
        }
        store(exp_avgs + i, m[k]);
        store(exp_avg_sqs + i, v[k]);
      }
    };

    int done = 0;  // up to here, whole vectors
    if (vectors) {
      done = count - count % kN;
      const int first = threadIdx.x * kN;
      if (count == kElements) {
        step_vectors(first, std::integral_constant<int, kVectorsOf<P, G, S>>());
      } else {
#pragma unroll 1
        for (int i = first; i < done; i += kStride) {
          step_vectors(i, std::integral_constant<int, 1>());
        }
      }
    }
    // The rest of a segment, or all of one that does not start on 16 bytes.
#pragma unroll 1
    for (int i = done + threadIdx.x; i < count; i += kThreads) {
      P p = params[i];
      R r = {};
      if constexpr (kHasRemainder<P>) r = remainders[i];
      step_element(p, r, grads[i], exp_avgs[i], exp_avg_sqs[i], s, l2, action, any_word_at(i));
      if (stores_weights) {
        params[i] = p;
        if constexpr (kHasRemainder<P>) remainders[i] = r;
      }
    }
  }
}

// Launches the kernel of a set that is for low memory, or of one that is not.
template <bool kForLowMemory>
void launch_step(const CudaStep& step) {
  visit_dtypes(step.dtypes, [&](auto p, auto g, auto s) {
    constexpr DTypeSet kSet = {decltype(p)::kDType, decltype(g)::kDType, decltype(s)::kDType};
    if constexpr (is_low_memory(kSet) == kForLowMemory) {
      using P = Storage<decltype(p)>;
      using T = Compute<P>;
      Arguments<T> arguments = {step.segments, step.grads,          step.low_memory, step.work,
                                step.run,      step.device_scalars, step.factor,     {}};
      for (int64_t i = 0; !step.device_scalars && i < step.scalars_count; ++i) {
        arguments.rows[i] = Row<T>(step.scalars[i]);
      }
      launch(radam_step_kernel<P, Storage<decltype(g)>, Storage<decltype(s)>>, arguments,
             step.blocks, kThreads, step.device, step.stream, "radam_step_kernel");
    }
  });
}

}  // namespace
}  // namespace radam
