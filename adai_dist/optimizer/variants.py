"""Adai, AdaiW and AdaiV2: one algorithm under three names, each with the defaults of the authors' code."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from adai_dist.hyper import Hyper
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia


class Adai(AdaptiveInertia):
    r"""Adai: Adam with adaptive inertia in place of an adaptive learning rate; L2 weight decay.

    .. math::
        \beta_{1,t} &= \mathrm{clamp}(1 - \beta_0 \hat v_t / \bar v_t,\ 0,\ 1 - \epsilon) \\
        m_t &= \beta_{1,t} m_{t-1} + (1 - \beta_{1,t}) g_t \\
        \theta_t &= \theta_{t-1} - \eta\, m_t / (1 - \textstyle\prod_{z \le t} \beta_{1,z})

    where :math:`\hat v` is Adam's bias-corrected second moment and :math:`\bar v` its mean over the whole model.

    Args:
        params: parameters, named parameters, or parameter groups, each with its own hyperparameters.
        lr: learning rate; that of plain SGD, or lr / (1 - momentum) of SGD with momentum. A one-element tensor may be
            changed on the device between steps.
        betas: ``(beta0, beta2)``: scale of ``1 - inertia``; decay rate of the second moment.
        eps: inertia stays at or below ``1 - eps``.
        weight_decay: decay rate.
        decoupled: decay the parameters directly (AdaiW) instead of through the gradient (L2).
        maximize: ascend.
        foreach: where the equations run uncompiled, False steps one tensor at a time; same results.
        max_grad_norm: clip the global gradient norm inside every step. ``param.grad`` is not changed.
        require_kernels: raise an error where the compiled kernels cannot be had, instead of a warning.
        retire_beta1_prod: free the state ``beta1_prod`` of a parameter once it has no effect any more (after 17,321
            steps at eps=1e-3, at the latest); not a bit of the trajectory changes.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Collective: see :meth:`AdaptiveInertia.step`.

    Source: Xie et al., ICML 2022, https://arxiv.org/abs/2006.15815.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float] = Hyper.betas,
        eps: float = Hyper.eps,
        weight_decay: float = Hyper.weight_decay,
        decoupled: bool = False,
        *,
        maximize: bool = Hyper.maximize,
        foreach: bool | None = Hyper.foreach,
        max_grad_norm: float | None = None,
        require_kernels: bool = False,
        retire_beta1_prod: bool = True,
    ) -> None:
        hyper = Hyper(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            maximize=maximize,
            foreach=foreach,
        )
        super().__init__(
            params,
            hyper,
            max_grad_norm=max_grad_norm,
            require_kernels=require_kernels,
            retire_beta1_prod=retire_beta1_prod,
        )


class AdaiW(Adai):
    """AdaiW: :class:`Adai` with decoupled weight decay, ``theta <- theta * (1 - lr * weight_decay)``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float] = Hyper.betas,
        eps: float = Hyper.eps,
        weight_decay: float = Hyper.weight_decay,
        decoupled: bool = True,
        *,
        maximize: bool = Hyper.maximize,
        foreach: bool | None = Hyper.foreach,
        max_grad_norm: float | None = None,
        require_kernels: bool = False,
        retire_beta1_prod: bool = True,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled,
            maximize=maximize,
            foreach=foreach,
            max_grad_norm=max_grad_norm,
            require_kernels=require_kernels,
            retire_beta1_prod=retire_beta1_prod,
        )


class AdaiV2(AdaptiveInertia):
    r"""AdaiV2: Adai with dampening ``d`` between 0 and 1; decoupled weight decay by default.

    .. math::
        \beta_{1,t} &= \mathrm{clamp}(1 - \beta_0 (\hat v_t / \bar v_t)^{1/(3-2d)},\ 0,\ 1 - \epsilon) \\
        m_t &= \beta_{1,t} m_{t-1} + (1 - \beta_{1,t})^d g_t \\
        \theta_t &= \theta_{t-1} - \eta\, \beta_0^{1-d} m_t / (1 - \textstyle\prod_{z \le t} \beta_{1,z})

    Args:
        dampening: ``d``; 1 is Adai, towards 0 steps grow along directions of small gradients.

    The other arguments are those of :class:`Adai`.

    Source: the authors' code, https://github.com/zeke-xie/adaptive-inertia-adai.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float] = Hyper.betas,
        eps: float = Hyper.eps,
        weight_decay: float = Hyper.weight_decay,
        dampening: float = Hyper.dampening,
        decoupled: bool = True,
        *,
        maximize: bool = Hyper.maximize,
        foreach: bool | None = Hyper.foreach,
        max_grad_norm: float | None = None,
        require_kernels: bool = False,
        retire_beta1_prod: bool = True,
    ) -> None:
        hyper = Hyper(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            dampening=dampening,
            decoupled=decoupled,
            maximize=maximize,
            foreach=foreach,
        )
        super().__init__(
            params,
            hyper,
            max_grad_norm=max_grad_norm,
            require_kernels=require_kernels,
            retire_beta1_prod=retire_beta1_prod,
        )
