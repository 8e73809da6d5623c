"""The sharding of a model over ranks, and the one collective of a step."""

from adai_dist.sharding.mean import GlobalMean, global_mean

__all__ = ["GlobalMean", "global_mean"]
