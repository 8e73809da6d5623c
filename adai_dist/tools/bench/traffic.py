"""Bytes that a step has to move between memory and processor.

The numbers describe algorithms, not implementations: a pass reads every tensor that it needs once, and writes it once
if it changes it. Two passes over a model larger than the cache read it twice. An implementation that moves more bytes
takes longer and shows a lower rate; one that finds some of them in the cache shows a higher rate.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Number of tensors read plus number of tensors written, each as large as the model."""

    num_model: int
    """Parameters and gradients, in the dtype of the parameters."""
    num_states: int
    """States, in the dtype of the optimizer's states."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.num_model + other.num_model, self.num_states + other.num_states)

    def bytes_per_parameter(self, model_bytes: int, state_bytes: int) -> int:
        """Return the bytes per parameter, given the bytes of one element of the model and of a state."""
        return self.num_model * model_bytes + self.num_states * state_bytes


OBSERVE = Traffic(1, 0)
"""Reads the gradient."""
OBSERVE_COUPLED = Traffic(2, 0)
"""Reads gradient and parameter."""
ADVANCE = Traffic(3, 6)
"""Reads parameter, gradient, exp_avg, exp_avg_sq, beta1_prod; writes all but the gradient."""
ADVANCE_RETIRED = Traffic(3, 4)
"""Reads and writes the same tensors except beta1_prod."""
TWO_PASSES = Traffic(4, 7)
"""Adai without the recursion: reads gradient and exp_avg_sq and writes exp_avg_sq; computes the mean; reads all five
tensors and writes parameter, exp_avg and beta1_prod."""
ADAM = Traffic(3, 4)
"""Reads parameter, gradient, exp_avg, exp_avg_sq; writes all but the gradient."""
CLIP = Traffic(3, 0)
"""Reads the gradient for its norm, then reads and writes it to scale it (``clip_grad_norm_``)."""
