"""How long a step takes, in milliseconds and in bytes per second, beside torch's AdamW, a plain copy and others."""

from adai_dist.tools.bench.report import bench_table
from adai_dist.tools.bench.run import Setting, measure
from adai_dist.tools.bench.shapes import SHAPES

__all__ = ["SHAPES", "Setting", "bench_table", "measure"]
