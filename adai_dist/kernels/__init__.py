"""The local phases of a step: compiled operators, their build, and the choice among backends."""

from adai_dist.kernels.backends import Backend, Backends, Mode, mode_of, nothing_kept

__all__ = ["Backend", "Backends", "Mode", "mode_of", "nothing_kept"]
