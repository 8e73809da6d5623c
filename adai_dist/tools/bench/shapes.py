"""The shapes of the parameters that the benchmark steps."""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]

TENSOR_ELEMENTS = 2**20


def of_numel(numel: int) -> list[Shape]:
    """``numel`` parameters in tensors of 2^20 elements, and what remains in one more."""
    num_whole, remainder = divmod(numel, TENSOR_ELEMENTS)
    return [(TENSOR_ELEMENTS,)] * num_whole + [(remainder,)] * (remainder > 0)


def gpt2_124m() -> list[Shape]:
    """GPT-2 124M: 148 tensors, 124,439,808 parameters; the head is the embedding."""
    width, vocabulary, context, num_layers = 768, 50257, 1024, 12
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(norm + attention + norm + mlp) * num_layers, *norm]


def llama_7b_layer() -> list[Shape]:
    """One of the 32 layers of Llama 2 7B: 9 tensors, 202,383,360 parameters."""
    width, hidden = 4096, 11008
    return [*[(width, width)] * 4, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]


def tiny_148() -> list[Shape]:
    """148 tensors of 16 elements: all the time that they take is the host's."""
    return [(16,)] * 148


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "gpt2-124m": gpt2_124m,
    "llama-7b-layer": llama_7b_layer,
    "tiny-148": tiny_148,
}
