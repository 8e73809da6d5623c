"""What a step has to move between memory and processor: the only place where bytes are counted.

The count is of the algorithm, not of an implementation: every tensor that a pass needs is read once and written once if
the pass changes it. Two passes over a model larger than the cache read it twice. An implementation that moves more
takes longer, and shows fewer bytes per second; one that finds some of it in the cache shows more.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Tensors read plus tensors written, each as large as the model."""

    num_model: int
    """In the dtype of the parameters: parameters and gradients."""
    num_states: int
    """In the dtype of the optimizer's states."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.num_model + other.num_model, self.num_states + other.num_states)

    def bytes_per_parameter(self, model_bytes: int, state_bytes: int) -> int:
        """Args: model_bytes, state_bytes: of one element."""
        return self.num_model * model_bytes + self.num_states * state_bytes


OBSERVE = Traffic(1, 0)
"""Reads the gradient."""
OBSERVE_COUPLED = Traffic(2, 0)
"""Reads gradient and parameter."""
ADVANCE = Traffic(3, 6)
"""Reads parameter, gradient, exp_avg, exp_avg_sq, beta1_prod; writes all but the gradient."""
ADVANCE_RETIRED = Traffic(3, 4)
"""The same without beta1_prod."""
TWO_PASSES = Traffic(4, 7)
"""Adai without the recursion: reads gradient and exp_avg_sq, writes exp_avg_sq; takes the mean; reads all five tensors,
writes parameter, exp_avg, beta1_prod."""
ADAM = Traffic(3, 4)
"""Reads parameter, gradient, exp_avg, exp_avg_sq; writes all but the gradient."""
CLIP = Traffic(3, 0)
"""``clip_grad_norm_`` reads the gradient for the norm, then reads and writes it to scale it."""
