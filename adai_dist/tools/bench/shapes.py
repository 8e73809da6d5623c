"""Parameter shapes for the benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = tuple[int, ...]

MATRIX: Shape = (2**10, 2**10)


def shapes_of_numel(numel: int) -> list[Shape]:
    """Return ``numel`` parameters in matrices of 2^20 elements, and a vector of the rest."""
    num_full, remainder = divmod(numel, math.prod(MATRIX))
    return [MATRIX] * num_full + [(remainder,)] * (remainder > 0)


def gpt2_124m() -> list[Shape]:
    """Return the shapes of GPT-2 124M: 148 tensors, 124,439,808 parameters; the head shares the embedding."""
    width, vocabulary, context, num_layers = 768, 50257, 1024, 12
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(norm + attention + norm + mlp) * num_layers, *norm]


def llama_7b_layer() -> list[Shape]:
    """Return the shapes of one of the 32 layers of Llama 2 7B: 9 tensors, 202,383,360 parameters."""
    width, hidden = 4096, 11008
    return [*[(width, width)] * 4, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]


def tiny_148() -> list[Shape]:
    """Return 148 tensors of 16 elements, whose steps take only the host's time."""
    return [(16,)] * 148


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "gpt2-124m": gpt2_124m,
    "llama-7b-layer": llama_7b_layer,
    "tiny-148": tiny_148,
}
