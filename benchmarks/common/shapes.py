"""Parameter shapes of well-known models, with the names, shapes and order that torch has.

Compression sees nothing of a model but its gradients, so shapes are all that a benchmark needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

Shapes = dict[str, tuple[int, ...]]


def resnet50() -> Shapes:
    """Returns torchvision's ResNet-50: 161 tensors, 25.6 million entries."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7)} | _pair("bn1", 64)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            kernels = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            for number, kernel in enumerate(kernels, 1):
                shapes[f"{name}.conv{number}.weight"] = kernel
                shapes |= _pair(f"{name}.bn{number}", kernel[0])
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, inputs, 1, 1)
                shapes |= _pair(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    return shapes | _linear("fc", inputs, 1000)


def resnet50_small() -> Shapes:
    """Returns ResNet-50's 161 tensors, of 2,048 entries at most: a step's cost apart from these."""
    return {name: (32, 64) if len(shape) > 1 else shape for name, shape in resnet50().items()}


def vgg16() -> Shapes:
    """Returns torchvision's VGG-16: 32 tensors, 138 million entries, most in one layer."""
    shapes: Shapes = {}
    inputs, number = 3, 0
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            shapes[f"features.{number}.weight"] = (width, inputs, 3, 3)
            shapes[f"features.{number}.bias"] = (width,)
            inputs, number = width, number + 2
        number += 1
    for number, outputs in ((0, 4096), (3, 4096), (6, 1000)):
        shapes |= _linear(f"classifier.{number}", 512 * 7 * 7 if number == 0 else 4096, outputs)
    return shapes


def bert_base() -> Shapes:
    """Returns Hugging Face's bert-base-uncased: 199 tensors, 109 million entries."""
    width, embeddings = 768, "embeddings"
    shapes: Shapes = {
        f"{embeddings}.word_embeddings.weight": (30522, width),
        f"{embeddings}.position_embeddings.weight": (512, width),
        f"{embeddings}.token_type_embeddings.weight": (2, width),
    }
    shapes |= _pair(f"{embeddings}.LayerNorm", width)
    for number in range(12):
        layer = f"encoder.layer.{number}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _linear(f"{layer}.attention.{part}", width, width)
        shapes |= _pair(f"{layer}.attention.output.LayerNorm", width)
        shapes |= _linear(f"{layer}.intermediate.dense", width, 4 * width)
        shapes |= _linear(f"{layer}.output.dense", 4 * width, width)
        shapes |= _pair(f"{layer}.output.LayerNorm", width)
    return shapes | _linear("pooler.dense", width, width)


def lstm() -> Shapes:
    """Returns a word language model: 2 x 1500 units, 10,000 words, 66 million entries."""
    words, width = 10_000, 1500
    shapes: Shapes = {"encoder.weight": (words, width)}
    for layer in (0, 1):
        for part in ("ih", "hh"):
            shapes[f"rnn.weight_{part}_l{layer}"] = (4 * width, width)
        for part in ("ih", "hh"):
            shapes[f"rnn.bias_{part}_l{layer}"] = (4 * width,)
    return shapes | _linear("decoder", width, words)


def mlp10m() -> Shapes:
    """Returns six linear layers, 10.7 million entries."""
    return _mlp(784, 1536, 1536, 1536, 1536, 1536, 10)


def mlp1m() -> Shapes:
    """Returns four linear layers, 1.3 million entries."""
    return _mlp(784, 640, 640, 640, 10)


def tiny() -> Shapes:
    """Returns six tensors for tests, three of them large enough to be compressed."""
    shapes: Shapes = {"conv.weight": (32, 16, 3, 3)} | _pair("bn", 32)
    return shapes | {"hidden.weight": (64, 128)} | _linear("fc", 128, 40)


MODELS: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "resnet50-small": resnet50_small,
    "vgg16": vgg16,
    "bert-base": bert_base,
    "lstm": lstm,
    "mlp10m": mlp10m,
    "mlp1m": mlp1m,
    "tiny": tiny,
}


def entries(shapes: Shapes) -> int:
    """Returns the number of parameters in all."""
    return sum(map(math.prod, shapes.values()))


def _pair(name: str, width: int) -> Shapes:
    """Returns the two vectors of a normalisation."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    """Returns weight and bias of a linear layer."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _mlp(*widths: int) -> Shapes:
    """Returns linear layers from each width to the next."""
    shapes: Shapes = {}
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        shapes |= _linear(f"layer{number}", inputs, outputs)
    return shapes
