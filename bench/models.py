"""The parameter lists of well-known models, names and shapes, built here and without weights."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

Shapes = dict[str, tuple[int, ...]]  # by name, in the order of model.parameters()


def resnet50() -> Shapes:
    """ResNet-50 as torchvision has it: bottlenecks of expansion 4, 1,000 classes."""
    shapes: Shapes = {}

    def convolution(name: str, norm: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)
        shapes.update({f"{norm}.weight": (out,), f"{norm}.bias": (out,)})

    convolution("conv1", "bn1", 64, 3, 7)
    into = 64
    for layer, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            at = f"layer{layer}.{block}"
            convolution(f"{at}.conv1", f"{at}.bn1", width, into, 1)
            convolution(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            convolution(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if block == 0:
                convolution(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, into, 1)
            into = 4 * width
    return {**shapes, "fc.weight": (1000, into), "fc.bias": (1000,)}


def gpt2(
    layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024
) -> Shapes:
    """GPT-2 as OpenAI released it, 124M by default; the output layer is the embedding (tied)."""
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}

    def affine(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[-1:]})

    for layer in range(layers):
        affine(f"h.{layer}.ln_1", width)
        affine(f"h.{layer}.attn.c_attn", width, 3 * width)
        affine(f"h.{layer}.attn.c_proj", width, width)
        affine(f"h.{layer}.ln_2", width)
        affine(f"h.{layer}.mlp.c_fc", width, 4 * width)
        affine(f"h.{layer}.mlp.c_proj", 4 * width, width)
    affine("ln_f", width)
    return shapes


def llama(
    layers: int = 16,
    width: int = 2048,
    inner: int = 8192,
    heads: int = 32,
    kv_heads: int = 8,
    vocabulary: int = 128256,
    tied: bool = True,
) -> Shapes:
    """A Llama; by default Llama 3.2 1B: 16 layers of 2048, MLP 8192, 32 heads, 8 for keys and
    values, a vocabulary of 128,256, the output layer tied to the embedding."""
    kv = width // heads * kv_heads
    shapes: Shapes = {"embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        for name, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    shapes["norm.weight"] = (width,)
    return shapes if tied else {**shapes, "lm_head.weight": (vocabulary, width)}


class Model(NamedTuple):
    """A list and what is published of it, which the tests hold it to."""

    shapes: Callable[[], Shapes]
    tensors: int
    parameters: int


MODELS = {
    "ResNet-50": Model(resnet50, 161, 25_557_032),
    "GPT-2 124M": Model(gpt2, 148, 124_439_808),
    "Llama 3.2 1B": Model(llama, 146, 1_235_814_400),
}


def count(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(map(prod, shapes.values()))
