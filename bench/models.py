"""The shapes of the parameters of well-known models, in the order of model.parameters()."""

from collections.abc import Callable
from typing import NamedTuple

Shape = tuple[int, ...]
Shapes = list[Shape]


def affine(*shape: int) -> Shapes:
    """A weight, and a bias for its first dimension."""
    return [shape, shape[:1]]


def norm(width: int) -> Shapes:
    return [(width,), (width,)]


def resnet50() -> Shapes:
    """torchvision's: bottlenecks of expansion 4, 1,000 classes."""
    shapes = [(64, 3, 7, 7), *norm(64)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), *norm(width)]
            shapes += [(width, width, 3, 3), *norm(width)]
            shapes += [(4 * width, width, 1, 1), *norm(4 * width)]
            if block == 0:  # the downsampling shortcut
                shapes += [(4 * width, channels, 1, 1), *norm(4 * width)]
            channels = 4 * width
    return [*shapes, *affine(1000, channels)]


def gpt2() -> Shapes:
    """OpenAI's smallest. The output layer is the embedding, and weights are (input, output)."""
    width = 768

    def linear(outputs: int, inputs: int) -> Shapes:
        return [(inputs, outputs), (outputs,)]

    layer = [*norm(width), *linear(3 * width, width), *linear(width, width)]
    layer += [*norm(width), *linear(4 * width, width), *linear(width, 4 * width)]
    return [(50257, width), (1024, width), *12 * layer, *norm(width)]


def llama() -> Shapes:
    """Llama 3.2 1B: 32 heads, 8 for keys and values; the output layer is the embedding."""
    width, inner, kv = 2048, 8192, 8 * 2048 // 32
    layer = [(width, width), (kv, width), (kv, width), (width, width)]
    layer += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(128256, width), *16 * layer, (width,)]


def vit() -> Shapes:
    """torchvision's ViT-B/16 for images of 224 pixels, 1,000 classes."""
    width, inner, patch = 768, 3072, 16
    layer = [*norm(width), *affine(3 * width, width), *affine(width, width)]
    layer += [*norm(width), *affine(inner, width), *affine(width, inner)]
    head = [(1, 1, width), *affine(width, 3, patch, patch), (1, (224 // patch) ** 2 + 1, width)]
    return [*head, *12 * layer, *norm(width), *affine(1000, width)]


def bert() -> Shapes:
    """Hugging Face's BertModel, base and uncased, with the pooler."""
    width, inner = 768, 3072
    layer = [*4 * affine(width, width), *norm(width)]
    layer += [*affine(inner, width), *affine(width, inner), *norm(width)]
    embeddings = [(30522, width), (512, width), (2, width), *norm(width)]
    return [*embeddings, *12 * layer, *affine(width, width)]


class Model(NamedTuple):
    """The shapes, and the published counts that the tests compare them with."""

    shapes: Callable[[], Shapes]
    tensors: int
    parameters: int


MODELS = {
    "ResNet-50": Model(resnet50, 161, 25_557_032),
    "GPT-2 124M": Model(gpt2, 148, 124_439_808),
    "Llama 3.2 1B": Model(llama, 146, 1_235_814_400),
    "ViT-B/16": Model(vit, 152, 86_567_656),
    "BERT-base": Model(bert, 199, 109_482_240),
}
