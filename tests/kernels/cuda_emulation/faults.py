"""Faults to plant in the CUDA sources: the text to replace, once, and its replacement."""

WRONG_STEP = {
    "a tail is never stepped": ("i < count; i += kThreads", "i < done; i += kThreads"),
    "an int32 index": (
        "const int64_t begin = chunk * kElements",
        "const int32_t begin = static_cast<int32_t>(chunk * kElements)",
    ),
    "a wrong alignment branch": ("return all % 16 == 0;", "return all % 8 == 0;"),
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
# Only float32, which compiles faster.
SMALLER = (
    "visit_dtypes(step.dtypes, [&]",
    """\
const auto visit_float32 = [](const DTypeSet&, const auto& visit) {
    const Element<kFloat32> only;
    visit(only, only, only);
  };
  visit_float32(step.dtypes, [&]""",
)
