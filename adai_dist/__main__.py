"""`python -m adai_dist` is `adai-dist`."""

from adai_dist.cli import main

main()
