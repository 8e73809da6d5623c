"""A benchmark of an optimizer step, in milliseconds and bytes per second, next to AdamW, a copy and other packages."""

from adai_dist.tools.bench.report import bench_table
from adai_dist.tools.bench.shapes import SHAPES
from adai_dist.tools.bench.timing import Settings, measure

__all__ = ["SHAPES", "Settings", "bench_table", "measure"]
