"""Train a small model with Accelerate's DDP under torchrun: `accelerate_script.py FOLDER (save | resume)`.

`save` trains without interruption and saves a checkpoint midway; `resume` continues from it. Both write the hash of the
final state and the losses of the second half, one file per rank.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from adai_dist import AdaiV2

NUM_STEPS, SAVED_AFTER = 8, 4


def main(folder: Path, what: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.manual_seed(0 if what == "save" else 1)  # a resumed run starts from other weights
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).bfloat16()
    adai = AdaiV2(net.parameters(), lr=0.3, dampening=0.5, weight_decay=0.01, max_grad_norm=1.0)
    net, optimizer, scheduler = accelerator.prepare(net, adai, CosineAnnealingLR(adai, NUM_STEPS))
    batches = torch.randn(NUM_STEPS, 2, 4, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    if what == "resume":
        accelerator.load_state(str(folder / "checkpoint"))
        dtypes = {x.dtype for state in adai.state.values() for x in state.values()}
        assert dtypes == {torch.float32, torch.int16}, dtypes  # int16: the remainders of master weights
    losses: list[float] = []
    for step in range(SAVED_AFTER if what == "resume" else 0, NUM_STEPS):
        if step == SAVED_AFTER and what == "save":
            accelerator.save_state(str(folder / "checkpoint"))
        loss = net(batches[step, accelerator.process_index]).float().square().mean()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    end = hashlib.sha256()
    for parameter in net.parameters():
        state = adai.state[parameter]
        for tensor in (parameter.detach().float(), *(state[name] for name in sorted(state))):
            end.update(tensor.numpy().tobytes())
    found = [end.hexdigest(), *(loss.hex() for loss in losses[-(NUM_STEPS - SAVED_AFTER) :])]
    (folder / f"{what}{accelerator.process_index}").write_text(" ".join(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort in their destructors


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
