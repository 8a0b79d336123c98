"""Faults to plant in the CUDA sources: the text to replace, once, and its replacement."""

WRONG_STEP = {
    "a tail is never stepped": ("i < count; i += kThreads", "i < done; i += kThreads"),
    "an int32 index": (
        "const int64_t begin = chunk * kElements",
        "const int32_t begin = static_cast<int32_t>(chunk * kElements)",
    ),
    "a wrong alignment branch": ("return all % 16 == 0 &&", "return all % 8 == 0 &&"),
    "a segment one too long": (
        "left < kElements ? left : kElements",
        "left < kElements ? left + 1 : kElements",
    ),
    "a walk one too far": ("chunk >= chunks()", "chunk > chunks()"),
    "the gradient of another segment": ("arguments.grads[index]", "*arguments.grads"),
    "one moment is not stored": ("store(exp_avg_sqs + i, v[k]);", ""),
    "a count that ignores found_inf": ("a.scaling);", "{a.scaling.grad_scale, nullptr});"),
    "rows of the launch without the factor": ("row.s.grad_scale = static_cast<T>(", "(void)("),
    "rows on the device without the factor": ("scalars.grad_scale *= *arguments.factor", ""),
    "a factor that is narrowed first": (
        "scalars.grad_scale *= *arguments.factor",
        "scalars.grad_scale = float(scalars.grad_scale) * float(*arguments.factor)",
    ),
}  # fmt: skip
WRONG_NORM = {
    "the last element is left out": ("i < chunk.count ?", "i < chunk.count - 1 ?"),
    "elements without a magnitude": ("x < 0 ? -x : x", "x"),
    "a maximum that drops NaN": ("a > b || a != a ? a : b", "a > b ? a : b"),
    "no scale": ("uint32_t exponent = largest(packs) >> 24;", "uint32_t exponent = 127;"),
    "a scale of zero": ("exponent = exponent < 253 ? exponent : 253;", ""),
    "a partial sum that is not written": (
        "if (threadIdx.x == 0) arguments.partials",
        "if (threadIdx.x == 0 && blockIdx.x != 3) arguments.partials",
    ),
    "partial sums beyond a turn": ("i < arguments.blocks; i +=", "i < kTotalThreads; i +="),
    "no barrier": ("__syncthreads();", ""),
    "half of the threads": ("int half = kCount / 2;", "int half = kCount / 4;"),
    "a wrong alignment branch of the norm": ("(grads) % 16 == 0", "(grads) % 8 == 0"),
    "an int32 index of the norm": (".data) + chunk.begin;", ".data) + int32_t(chunk.begin);"),
}
WRONG_LOW_MEMORY = {
    "bfloat16 truncated": ("(u + random16) >> 16", "u >> 16"),
    "a code truncated": ("(random_exp_avg(word) << 4)", "0u"),
    "one random number for two streams": (
        "random_exp_avg_sq(uint32_t word) { return word >> 16; }",
        "random_exp_avg_sq(uint32_t word) { return random_exp_avg(word); }",
    ),
    "exp_avg_sq rounded with 8 bits": (
        "(random_exp_avg_sq(word) << 4)",
        "(random_exp_avg_sq(word) >> 8 << 12)",
    ),
    "exp_avg_sq becomes 0": ("u << 1 ? 1 << kDropped : 0", "0"),
    "the exponent before rounding": ("(largest + ((1u << kDropped) - 1)) >> 23", "largest >> 23"),
    "blocks of half the size": ("constexpr int kBlock = 128", "constexpr int kBlock = 64"),
    "blocks of a warp that overlap": (
        "done + threadIdx.x / kWarp * kBlock",
        "done + threadIdx.x / kWarp * (kBlock - 1)",
    ),
    "half of the lanes": ("distance < kLanes;", "distance < kLanes / 2;"),
    "lanes of another block": ("distance < kLanes;", "distance <= kLanes;"),
    "a warp that is not whole": ("count - count % (kWarp * kN)", "count - count % kN"),
    "an exponent for every other block": ("if (i % kBlock == 0)", "if (i % (2 * kBlock) == 0)"),
    "a block of NaN that recovers": ("if (part.v_exponent == 255)", "if (false)"),
    "a stale remainder that makes NaN": ("joined != joined ?", "false ?"),
    "NaN with random bits": ("x != x ? 0x7fc00000u :", "false ? 0 :"),
    "a weight written though it holds": (
        "!kLowMemory<P, S> || action != kHold",
        "true || action == kHold",
    ),
    "the upper half of the index ignored": ("static_cast<uint32_t>(index >> 32)", "0 * index"),
    "one key for a chunk of two": ("~index_low >= static_cast<uint32_t>(count - 1)", "true"),
    "any remainder is aligned": ("(remainders || !kHasRemainder<P>)", "remainders + 1"),
    "the key of another segment": ("arguments.low_memory[index]", "*arguments.low_memory"),
}  # fmt: skip
# Only a few sets, which compile faster.
SMALLER = (
    "visit_dtypes(step.dtypes, [&]",
    """\
const auto visit_some = [](const DTypeSet& dtypes, const auto& visit) {
    const Element<kFloat32> grad;
    const Element<kBFloat16Stochastic> rounded;
    if (dtypes.param == kMaster24) {
      visit(Element<kMaster24>(), grad, Element<kBlock8>());
    } else if (dtypes.param == kBFloat16Stochastic) {
      visit(rounded, grad, rounded);
    } else {
      const Element<kFloat32> plain;
      visit(plain, plain, plain);
    }
  };
  visit_some(step.dtypes, [&]""",
)
