"""Adai, AdaiW and AdaiV2 (Adaptive Inertia, ICML 2022) for distributed training with PyTorch."""

from adai_dist.integrations import lightning, zero_redundancy
from adai_dist.integrations.deepspeed.registration import register
from adai_dist.integrations.import_hooks import import_hooks_are_on
from adai_dist.optimizer import Adai, AdaiV2, AdaiW, AdaptiveInertia, MeanSource, share_mean
from adai_dist.sharding import GlobalMean, global_mean

__version__ = "0.1.0"

__all__ = [
    "Adai",
    "AdaiV2",
    "AdaiW",
    "AdaptiveInertia",
    "GlobalMean",
    "MeanSource",
    "__version__",
    "global_mean",
    "register",
    "share_mean",
]

if import_hooks_are_on():
    register()
    zero_redundancy.register()
    lightning.register()
