"""The training programs that `adai-dist train` and configs/recipes/ run."""
