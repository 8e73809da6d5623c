"""Lightning's Trainer and Fabric: clipping under mixed precision, manual optimization, lr schedules as with AdamW."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from adai_dist import AdaiV2

lightning = pytest.importorskip("lightning.pytorch")
from lightning.fabric import Fabric  # noqa: E402
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision  # noqa: E402
from lightning.fabric.plugins.environments import LightningEnvironment  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # caused by Lightning's use of torch
]

NUM_STEPS, OVERFLOW, SCALE = 6, 2, 2.0**10
MAX_NORM = 0.05


def adaiv2(params: Any) -> AdaiV2:
    return AdaiV2(params, lr=1.0, dampening=0.5)


def adamw(params: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=0.01)


def fused(params: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=0.01, fused=True)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def batches() -> Tensor:
    return torch.randn(NUM_STEPS, 5, 6, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).float().square().mean()


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Module whose schedule halves the lr after every step."""

    def __init__(self, make_optimizer: Callable[[Any], Any], *, overflows: bool = False) -> None:
        super().__init__()
        self.net = net()
        self.make_optimizer = make_optimizer
        self.overflows = overflows
        self.lrs: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.net.parameters())
        return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}]

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.lrs.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = loss_of(self.net, batch)
        return loss * math.inf if self.overflows and index == OVERFLOW else loss


def precision(name: str, cls: Any = MixedPrecision) -> Any:
    """Create the precision plugin with a scaler for the CPU, since Lightning creates scalers only for accelerators."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE) if name == "16-mixed" else None
    return cls(name, "cpu", scaler)


def fit(module: Any, **settings: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings | {"plugins": [LightningEnvironment(), *settings.get("plugins", [])]},
    )
    trainer.fit(module, DataLoader(list(batches()), batch_size=None))
    return trainer


def plain_loop(dtype: torch.dtype, max_norm: float | None, skipped: int | None = None) -> list[Tensor]:
    model = net()
    optimizer = adaiv2(model.parameters())
    scheduler = StepLR(optimizer, 1, 0.5)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, cache_enabled=False):
            loss = loss_of(model, batch)
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if step != skipped:
            optimizer.step()
        else:
            optimizer._opt_called = True  # type: ignore[attr-defined]
        scheduler.step()
    return [param.detach() for param in model.parameters()]


def check(model: nn.Module, expected: list[Tensor]) -> None:
    """Compare bitwise, as the scale is a power of two."""
    for param, twin in zip(model.parameters(), expected, strict=True):
        assert torch.equal(param.detach(), twin)


@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_bf16_with_clipping_is_the_plain_loop(max_norm: float | None) -> None:
    module = Module(adaiv2)
    fit(module, plugins=[precision("bf16-mixed")], gradient_clip_val=max_norm)
    check(module.net, plain_loop(torch.bfloat16, max_norm))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_fp16_with_clipping_unscales_first(algorithm: str) -> None:
    module = Module(adaiv2)
    trainer = fit(
        module, plugins=[precision("16-mixed")], gradient_clip_val=MAX_NORM, gradient_clip_algorithm=algorithm
    )
    if algorithm == "norm":
        check(module.net, plain_loop(torch.float16, MAX_NORM))
        assert trainer.optimizers[0].grad_norm == pytest.approx(MAX_NORM, rel=1e-4)
    else:
        assert trainer.optimizers[0].grad_norm <= MAX_NORM * sum(p.numel() for p in module.net.parameters()) ** 0.5


@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_after_an_overflow_lr_and_scale_are_those_of_adamw(max_norm: float | None) -> None:
    found: list[tuple[list[float], float]] = []
    for make in (adaiv2, adamw):
        module = Module(make, overflows=True)
        plugin = precision("16-mixed")
        trainer = fit(module, plugins=[plugin], gradient_clip_val=max_norm)
        found.append(([lr / module.lrs[0] for lr in module.lrs], plugin.scaler.get_scale()))
        if make is adaiv2:
            assert trainer.optimizers[0].num_skipped_steps == 1
            check(module.net, plain_loop(torch.float16, max_norm, skipped=OVERFLOW))
    assert found[0] == found[1]
    assert found[0][1] == SCALE / 2


class Manual(Module):
    """Module that clips with the optimizer's own method, through Lightning's proxy."""

    def __init__(self) -> None:
        super().__init__(adaiv2)
        self.automatic_optimization = False
        self.norms: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> None:
        optimizer = self.optimizers()
        assert optimizer is not self.trainer.optimizers[0]
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        self.norms.append(float(optimizer.clip_grad_norm_(MAX_NORM)))
        optimizer.step()
        assert float(optimizer.grad_norm) == self.norms[-1]
        self.lr_schedulers().step()


def test_manual_optimization_clips_through_the_proxy() -> None:
    module = Manual()
    fit(module)
    model = net()
    optimizer = adaiv2(model.parameters())
    scheduler = StepLR(optimizer, 1, 0.5)
    for batch in batches():
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        scheduler.step()
    check(module.net, [param.detach() for param in model.parameters()])
    assert min(module.norms) > MAX_NORM


def fabric_with(name: str) -> Any:
    plugins = [LightningEnvironment(), precision(name, FabricMixedPrecision)]
    return Fabric(accelerator="cpu", devices=1, plugins=plugins)


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed"])
def test_fabric_clips_under_mixed_precision(name: str) -> None:
    fabric = fabric_with(name)
    inner = net()
    model, optimizer = fabric.setup(inner, adaiv2(inner.parameters()))
    scheduler = StepLR(optimizer.optimizer, 1, 0.5)
    for batch in batches():
        optimizer.zero_grad()
        fabric.backward(model(batch).square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        scheduler.step()
        assert optimizer.grad_norm == pytest.approx(MAX_NORM, rel=1e-3)
    expected = plain_loop(torch.bfloat16 if name == "bf16-mixed" else torch.float16, MAX_NORM)
    check(inner, expected)


def test_settings_through_fabric_take_effect() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[LightningEnvironment()])
    inner = net()
    optimizer = adaiv2(inner.parameters())
    model, proxy = fabric.setup(inner, optimizer)
    proxy.max_grad_norm = MAX_NORM
    fabric.backward(model(batches()[0]).square().mean())
    proxy.step()
    assert optimizer.max_grad_norm == MAX_NORM
    assert proxy.grad_norm > MAX_NORM


def test_lightning_still_refuses_other_optimizers() -> None:
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Module(fused), plugins=[precision("16-mixed")], gradient_clip_val=MAX_NORM)


IN_ANY_ORDER = """
import warnings
warnings.simplefilter("error")
{first}
{second}
import torch
for name in ("lightning.fabric", "lightning.pytorch", "lightning_fabric", "pytorch_lightning"):
    for module in ("amp", "fsdp"):
        __import__(f"{{name}}.plugins.precision.{{module}}")
import sys
optimizer = adai_dist.Adai([torch.nn.Parameter(torch.ones(1))], lr=0.1)
fused = torch.optim.AdamW(optimizer.params(), fused=True)
for name in ("lightning.fabric", "lightning.pytorch", "lightning_fabric", "pytorch_lightning"):
    for module in ("amp", "fsdp"):
        handles = sys.modules[f"{{name}}.plugins.precision.{{module}}"]._optimizer_handles_unscaling
        assert not handles(optimizer) and handles(fused)
"""


@pytest.mark.parametrize("first", ["adai_dist", "lightning.pytorch", "pytorch_lightning", "lightning.fabric"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    code = IN_ANY_ORDER.format(first=f"import {first}", second="import adai_dist")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
