"""The optimizers."""

from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.mean_source import MeanSource
from adai_dist.optimizer.share_mean import share_mean
from adai_dist.optimizer.variants import Adai, AdaiV2, AdaiW

__all__ = ["Adai", "AdaiV2", "AdaiW", "AdaptiveInertia", "MeanSource", "share_mean"]
