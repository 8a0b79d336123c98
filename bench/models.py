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


def vit(
    layers: int = 12, width: int = 768, inner: int = 3072, patch: int = 16, image: int = 224
) -> Shapes:
    """A vision transformer as torchvision has it, ViT-B/16 by default: 1,000 classes."""
    shapes: Shapes = {"class_token": (1, 1, width)}
    shapes.update({"conv_proj.weight": (width, 3, patch, patch), "conv_proj.bias": (width,)})
    shapes["encoder.pos_embedding"] = (1, (image // patch) ** 2 + 1, width)

    def affine(name: str, *shape: int) -> None:
        shapes.update({f"{name}weight": shape, f"{name}bias": shape[:1]})

    for layer in range(layers):
        at = f"encoder.layers.encoder_layer_{layer}"
        affine(f"{at}.ln_1.", width)
        affine(f"{at}.self_attention.in_proj_", 3 * width, width)
        affine(f"{at}.self_attention.out_proj.", width, width)
        affine(f"{at}.ln_2.", width)
        affine(f"{at}.mlp.0.", inner, width)
        affine(f"{at}.mlp.3.", width, inner)
    affine("encoder.ln.", width)
    affine("heads.head.", 1000, width)
    return shapes


def bert(
    layers: int = 12,
    width: int = 768,
    inner: int = 3072,
    vocabulary: int = 30522,
    context: int = 512,
) -> Shapes:
    """BERT as Hugging Face's BertModel has it, with the pooler; BERT-base uncased by default."""
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (vocabulary, width),
        "embeddings.position_embeddings.weight": (context, width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }

    def affine(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    affine("embeddings.LayerNorm", width)
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            affine(f"{at}.attention.self.{name}", width, width)
        affine(f"{at}.attention.output.dense", width, width)
        affine(f"{at}.attention.output.LayerNorm", width)
        affine(f"{at}.intermediate.dense", inner, width)
        affine(f"{at}.output.dense", width, inner)
        affine(f"{at}.output.LayerNorm", width)
    affine("pooler.dense", width, width)
    return shapes


class Model(NamedTuple):
    """A list and what is published of it, which the tests hold it to."""

    shapes: Callable[[], Shapes]
    tensors: int
    parameters: int


# A GPU is lent for minutes: these are timed there (bench/gpu_time.py).
MODELS = {
    "ResNet-50": Model(resnet50, 161, 25_557_032),
    "GPT-2 124M": Model(gpt2, 148, 124_439_808),
    "Llama 3.2 1B": Model(llama, 146, 1_235_814_400),
}
ALL_MODELS = {
    **MODELS,
    "ViT-B/16": Model(vit, 152, 86_567_656),
    "BERT-base": Model(bert, 199, 109_482_240),
}


def count(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(map(prod, shapes.values()))
