"""Bytes that a step has to move between memory and processor.

The numbers describe algorithms, not implementations: a pass reads every tensor that it needs once, and writes it once
if it changes it. Two passes over a model larger than the cache read it twice. An implementation that moves more bytes
takes longer and shows a lower rate; one that finds some of them in the cache shows a higher rate.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Number of tensors read plus number of tensors written, each with as many elements as the model."""

    num_params: int
    """Parameters; a parameter with master weights includes their remainder."""
    num_gradients: int
    """Gradients, in the dtype of the parameters."""
    num_states: int
    """States other than the remainder."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.num_params + other.num_params,
            self.num_gradients + other.num_gradients,
            self.num_states + other.num_states,
        )

    def bytes_per_parameter(self, param_bytes: int, gradient_bytes: int, state_bytes: float) -> float:
        """Return the bytes moved per parameter, given the bytes of one element of each kind of tensor.

        Args:
            state_bytes: of one state, the mean if they differ.
        """
        return self.num_params * param_bytes + self.num_gradients * gradient_bytes + self.num_states * state_bytes


OBSERVE = Traffic(0, 1, 0)
"""Reads the gradient."""
OBSERVE_COUPLED = Traffic(1, 1, 0)
"""Reads gradient and parameter."""
ADVANCE = Traffic(2, 1, 6)
"""Reads parameter, gradient, exp_avg, exp_avg_sq, beta1_prod; writes all but the gradient."""
ADVANCE_RETIRED = Traffic(2, 1, 4)
"""Reads and writes the same tensors except beta1_prod."""
TWO_PASSES = Traffic(2, 2, 7)
"""Adai without the recursion: reads gradient and exp_avg_sq and writes exp_avg_sq; computes the mean; reads all five
tensors and writes parameter, exp_avg and beta1_prod."""
ADAM = Traffic(2, 1, 4)
"""Reads parameter, gradient, exp_avg, exp_avg_sq; writes all but the gradient."""
CLIP = Traffic(0, 3, 0)
"""Reads the gradient for its norm, then reads and writes it to scale it (``clip_grad_norm_``)."""
