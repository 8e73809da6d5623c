"""One thread per process: where several test processes share the cores, more threads wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
