"""Proxies of an optimizer, in all the ways in which trainers build them, act on the optimizer."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adai_dist import AdaiV2, AdaptiveInertia, share_mean
from adai_dist.optimizer.mean_source import ShardedMean
from tests.problems import THREE_GROUPS


class Delegating:
    """A proxy of the optimizer's class without attributes of its own, which delegates to the optimizer."""

    def __init__(self, optimizer: AdaiV2) -> None:
        self.inner = optimizer
        self.__class__ = type("Delegating" + type(optimizer).__name__, (Delegating, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Subclass(AdaiV2):
    """A delegating proxy as an ordinary subclass."""

    def __init__(self, optimizer: AdaiV2) -> None:
        self.inner = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class Copied:
    """A proxy with a copy of the attributes."""

    def __init__(self, optimizer: AdaiV2) -> None:
        self.__dict__ = {name: value for name, value in vars(optimizer).items() if name != "step"}
        self.__class__ = type("Copied" + type(optimizer).__name__, (Copied, type(optimizer)), {})
        self.inner = optimizer


class Updated(AdaiV2):
    """A proxy whose subclass updates its attributes from the optimizer's."""

    def __init__(self, optimizer: AdaiV2) -> None:
        self.__dict__.update(vars(optimizer))


def lightning(optimizer: AdaiV2) -> Any:
    return pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(optimizer)


def fabric(optimizer: AdaiV2) -> Any:
    module = pytest.importorskip("lightning.fabric")
    environment = module.plugins.environments.LightningEnvironment()  # otherwise it looks for Slurm
    return module.Fabric(accelerator="cpu", devices=1, plugins=[environment]).setup_optimizers(optimizer)


def nested(optimizer: AdaiV2) -> Any:
    return Copied(Delegating(optimizer))  # type: ignore[arg-type]


BUILDS: list[Callable[[AdaiV2], Any]] = [Delegating, Subclass, Copied, Updated, lightning, fabric, nested]
INHERIT_STEP = [Delegating, Subclass, Copied, Updated, nested]

each_build = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)


class Pair:
    """Two runs of one problem, with and without a proxy around the optimizer."""

    def __init__(self, build: Callable[[AdaiV2], Any], **settings: Any) -> None:
        self.parameters, self.twins = THREE_GROUPS.parameters(), THREE_GROUPS.parameters()
        self.optimizer = AdaiV2(THREE_GROUPS.param_groups(self.parameters), lr=1.0, **settings)
        self.twin = AdaiV2(THREE_GROUPS.param_groups(self.twins), lr=1.0, **settings)
        self.proxy = build(self.optimizer)
        self.num_steps = 0

    def backward(self) -> None:
        for parameters in (self.parameters, self.twins):
            THREE_GROUPS.set_gradients(parameters, self.num_steps)
        self.num_steps += 1

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.twin.step()

    def check(self) -> None:
        for name, parameter in self.parameters.items():
            assert torch.equal(parameter, self.twins[name])
        for name in ("grad_norm", "inertia_mean", "num_skipped_steps", "num_undefined_steps"):
            assert torch.equal(getattr(self.proxy, name), getattr(self.twin, name))


@each_build
def test_a_proxy_is_an_instance_of_the_class(build: Callable[[AdaiV2], Any]) -> None:
    assert isinstance(Pair(build).proxy, AdaptiveInertia)


@each_build
def test_clipping_through_a_proxy_reaches_the_optimizer(build: Callable[[AdaiV2], Any]) -> None:
    pair = Pair(build)
    for _ in range(3):
        pair.backward()
        norms = pair.proxy.clip_grad_norm_(1e-3), pair.twin.clip_grad_norm_(1e-3)
        assert torch.equal(*norms)
        pair.optimizer.step()
        pair.twin.step()
        pair.check()


@pytest.mark.parametrize("build", INHERIT_STEP, ids=lambda build: build.__name__)
def test_a_step_through_the_proxy_is_a_step_of_the_optimizer(build: Callable[[AdaiV2], Any]) -> None:
    pair = Pair(build)
    for step in range(6):
        pair.backward()
        (pair.optimizer if step % 2 else pair.proxy).clip_grad_norm_(1e-3)
        pair.twin.clip_grad_norm_(1e-3)
        (pair.proxy if step % 3 else pair.optimizer).step()
        pair.twin.step()
        pair.check()


@each_build
def test_settings_are_shared_in_both_directions(build: Callable[[AdaiV2], Any]) -> None:
    pair = Pair(build)
    source = ShardedMean()
    new = {"max_grad_norm": 1e-3, "retire_beta1_prod": False, "independent": True, "mean_source": source}
    for name, value in new.items():
        setattr(pair.proxy, name, value)
        assert getattr(pair.optimizer, name) is value
        setattr(pair.optimizer, name, getattr(pair.twin, name))
        assert getattr(pair.proxy, name) is getattr(pair.twin, name)
    pair.proxy.max_grad_norm = pair.twin.max_grad_norm = 1e-3
    for _ in range(3):
        pair.step()
        pair.check()


@each_build
def test_attributes_that_a_scaler_sets_and_deletes_are_shared(build: Callable[[AdaiV2], Any]) -> None:
    pair = Pair(build)
    pair.step()
    pair.backward()
    pair.proxy.grad_scale, pair.proxy.found_inf = None, torch.ones(())
    before = {name: parameter.clone() for name, parameter in pair.parameters.items()}
    pair.optimizer.step()
    del pair.proxy.grad_scale, pair.proxy.found_inf
    assert all(torch.equal(parameter, before[name]) for name, parameter in pair.parameters.items())
    assert pair.proxy.num_skipped_steps == pair.optimizer.num_skipped_steps == 1
    for one in (pair.proxy, pair.optimizer):
        assert not hasattr(one, "found_inf")
        with pytest.raises(AttributeError):
            del one.grad_scale


@pytest.mark.parametrize("build", INHERIT_STEP, ids=lambda build: build.__name__)
def test_a_scaler_steps_a_proxy(build: Callable[[AdaiV2], Any]) -> None:
    pair = Pair(build)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(4):
        pair.backward()
        scaler.scale(torch.zeros(()))
        for parameter in pair.parameters.values():
            if parameter.grad is not None:
                parameter.grad = parameter.grad * scaler.get_scale()
        scaler.step(pair.proxy)
        scaler.update()
        pair.twin.step()
    for name, parameter in pair.parameters.items():
        torch.testing.assert_close(parameter, pair.twins[name], rtol=1e-13, atol=1e-14)


@each_build
@pytest.mark.parametrize("through", ["proxy", "optimizer"])
def test_a_proxy_survives_a_checkpoint(build: Callable[[AdaiV2], Any], through: str) -> None:
    pair = Pair(build)
    for _ in range(3):
        pair.step()
    saved = copy.deepcopy(pair.optimizer.state_dict())
    pair.step()
    (pair.proxy if through == "proxy" else pair.optimizer).load_state_dict(saved)
    pair.twin.load_state_dict(copy.deepcopy(saved))
    assert pair.proxy.state is pair.optimizer.state
    assert pair.proxy.param_groups is pair.optimizer.param_groups
    for param_group in (*pair.proxy.param_groups, *pair.twin.param_groups):
        param_group["lr"] = 0.125
    for _ in range(3):
        pair.step()
        pair.check()


@each_build
@pytest.mark.parametrize("through", ["proxy", "optimizer"])
def test_replaced_states_and_groups_are_shared(build: Callable[[AdaiV2], Any], through: str) -> None:
    """Users replace them to restart with the same optimizer, engines to step other parameters."""
    pair = Pair(build)
    for _ in range(3):
        pair.step()
    through_this = pair.proxy if through == "proxy" else pair.optimizer
    through_this.state, pair.twin.state = defaultdict(dict), defaultdict(dict)
    through_this.param_groups = [dict(param_group, lr=0.125) for param_group in through_this.param_groups]
    pair.twin.param_groups = [dict(param_group, lr=0.125) for param_group in pair.twin.param_groups]
    assert pair.proxy.state is pair.optimizer.state
    assert pair.proxy.param_groups is pair.optimizer.param_groups
    for _ in range(3):
        pair.step()
        pair.check()


@each_build
@pytest.mark.parametrize("through", ["proxy", "optimizer"])
def test_a_group_that_is_added_later_is_shared(build: Callable[[AdaiV2], Any], through: str) -> None:
    pair = Pair(build)
    pair.step()
    late, twin = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    (pair.proxy if through == "proxy" else pair.optimizer).add_param_group({"params": [late], "lr": 0.5})
    pair.twin.add_param_group({"params": [twin], "lr": 0.5})
    late.grad, twin.grad = torch.full_like(late, 2.0), torch.full_like(twin, 2.0)
    pair.step()
    pair.check()
    assert torch.equal(late, twin)
    assert pair.proxy.params()[-1] is late
    assert not pair.proxy.replaced_params


@each_build
def test_a_checkpoint_saved_through_a_proxy_is_the_optimizers(build: Callable[[AdaiV2], Any]) -> None:
    pair = Pair(build)
    pair.step()
    found, expected = pair.proxy.state_dict(), pair.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for key, state in expected["state"].items():
        assert all(torch.equal(found["state"][key][name], value) for name, value in state.items())


@each_build
@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_the_optimizer_has_separate_attributes(
    build: Callable[[AdaiV2], Any], make_copy: Callable[[AdaiV2], AdaiV2]
) -> None:
    pair = Pair(build, max_grad_norm=0.5, independent=True)
    pair.step()
    copied = make_copy(pair.optimizer)
    assert (copied.max_grad_norm, copied.independent) == (0.5, True)
    assert copied.grad_norm.isnan()
    pair.proxy.max_grad_norm = 2.0
    copied.max_grad_norm = 1.0
    assert (pair.optimizer.max_grad_norm, copied.max_grad_norm) == (2.0, 1.0)
    assert build(copied).max_grad_norm == 1.0


@each_build
def test_proxies_share_a_mean_as_their_optimizers_do(build: Callable[[AdaiV2], Any]) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizers = [AdaiV2([param], lr=0.1) for param in params[:2]]
    proxies = [build(optimizer) for optimizer in optimizers]
    share_mean(proxies)
    twin = AdaiV2(params[2:], lr=0.1)
    for step in range(3):
        for index, param in enumerate(params):
            param.grad = torch.full_like(param, 1.0 + index % 2 + step)
        stepped = optimizers if build in (lightning, fabric) else [proxies[0], optimizers[1]]
        for optimizer in stepped:
            optimizer.step()
        twin.step()
        assert torch.equal(proxies[0].inertia_mean, twin.inertia_mean)
        assert torch.equal(proxies[1].grad_norm, twin.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(params[:2], params[2:], strict=True))
    with pytest.raises(ValueError, match="1 distinct"):
        share_mean([build(AdaiV2([params[0]], lr=0.1))] * 2)
    fresh = AdaiV2([params[0]], lr=0.1)
    with pytest.raises(ValueError, match="1 distinct"):
        share_mean([fresh, build(fresh)])


@each_build
def test_a_proxy_configures_the_optimizer(build: Callable[[AdaiV2], Any]) -> None:
    pair = Pair(build)
    source = pair.optimizer.mean_source
    pair.proxy.configure_sharding()
    assert pair.optimizer.mean_source is not source
    assert pair.proxy.mean_source is pair.optimizer.mean_source
    pair.step()
    pair.proxy.refresh()
    pair.step()
    pair.check()


@each_build
def test_zeroing_gradients_through_a_proxy_drops_a_pending_clipping(build: Callable[[AdaiV2], Any]) -> None:
    pair = Pair(build)
    pair.backward()
    pair.proxy.clip_grad_norm_(1e-3)
    pair.proxy.zero_grad()
    pair.twin.zero_grad()
    pair.step()
    pair.check()


def test_a_proxy_outlives_its_optimizer() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    proxy = Updated(AdaiV2([param], lr=0.1))
    param.grad = torch.ones(3)
    proxy.clip_grad_norm_(0.5)
    proxy.step()
    proxy.load_state_dict(proxy.state_dict())
    assert proxy.grad_norm == pytest.approx(3**0.5)
    assert not torch.equal(param.detach(), torch.ones(3))


class Empty(AdaiV2):
    def __init__(self) -> None:
        pass


def test_an_object_without_the_attributes_raises_an_error_that_says_so() -> None:
    empty = Empty()
    with pytest.raises(AttributeError, match=r"must have been constructed.*got an object of type Empty.*__getattr__"):
        empty.max_grad_norm = 1.0
    with pytest.raises(AttributeError, match="an optimizer must have been constructed"):
        empty.clip_grad_norm_(1.0)
