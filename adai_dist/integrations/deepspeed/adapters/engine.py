"""The settings of an engine, which differ between releases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adai_dist.integrations.deepspeed.adapters.releases import installed_release

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def setting(engine: Any, name: str) -> Any:
    """Return what the method ``name`` of the engine returns, or None if the installed release has no such setting."""
    return getattr(engine, name)() if name in installed_release().methods["DeepSpeedEngine"] else None


def requested(engine: Any, section: str, key: str) -> Any:
    """Return the value of a key in a section of the configuration as the user wrote it, or None."""
    content: Any = engine._config._param_dict.get(section)
    return content.get(key) if isinstance(content, dict) else None


def clips_without_being_asked(engine: Any) -> bool:
    """Return whether DeepSpeed clips gradients although the configuration does not set ``gradient_clipping``."""
    return installed_release().clips_by_default and "gradient_clipping" not in engine._config._param_dict


def model_parallel_group(engine: Any) -> ProcessGroup | None:
    """Return the ranks that share one copy of the model by tensor or pipeline parallelism; None without an mpu."""
    mpu = engine.mpu
    if mpu is None or hasattr(mpu, "initialize_sequence_parallel"):
        return None
    return mpu.get_model_parallel_group()
