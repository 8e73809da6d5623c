"""Adai, AdaiW and AdaiV2: one algorithm under three names, each with the defaults of the authors' code.

The arguments are those of :class:`AdaptiveInertia`.
"""

from __future__ import annotations

from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia


class Adai(AdaptiveInertia):
    r"""Adam with adaptive inertia in place of an adaptive learning rate; L2 weight decay by default.

    .. math::
        \beta_{1,t} &= \mathrm{clamp}(1 - \beta_0 \hat v_t / \bar v_t,\ 0,\ 1 - \epsilon) \\
        m_t &= \beta_{1,t} m_{t-1} + (1 - \beta_{1,t}) g_t \\
        \theta_t &= \theta_{t-1} - \eta\, m_t / (1 - \textstyle\prod_{z \le t} \beta_{1,z})

    where :math:`\hat v` is Adam's bias-corrected second moment and :math:`\bar v` its mean over the whole model.

    Source: Xie et al., ICML 2022, https://arxiv.org/abs/2006.15815.
    """

    decoupled_by_default = False


class AdaiW(AdaptiveInertia):
    """:class:`Adai` with decoupled weight decay by default, ``theta <- theta * (1 - lr * weight_decay)``."""

    decoupled_by_default = True


class AdaiV2(AdaptiveInertia):
    r""":class:`Adai` with dampening ``d`` between 0 and 1; decoupled weight decay by default.

    Pass ``dampening``: the default of the authors' code, 1, makes this :class:`AdaiW`. For transformers, start with
    ``dampening=0.0``.

    .. math::
        \beta_{1,t} &= \mathrm{clamp}(1 - \beta_0 (\hat v_t / \bar v_t)^{1/(3-2d)},\ 0,\ 1 - \epsilon) \\
        m_t &= \beta_{1,t} m_{t-1} + (1 - \beta_{1,t})^d g_t \\
        \theta_t &= \theta_{t-1} - \eta\, \beta_0^{1-d} m_t / (1 - \textstyle\prod_{z \le t} \beta_{1,z})

    As ``d`` decreases to 0, steps along directions with small gradients grow.

    Source: the authors' code, https://github.com/zeke-xie/adaptive-inertia-adai.
    """

    decoupled_by_default = True


OPTIMIZERS: dict[str, type[AdaptiveInertia]] = {cls.__name__: cls for cls in (Adai, AdaiW, AdaiV2)}
"""The named optimizers, by name."""
