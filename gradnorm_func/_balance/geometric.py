"""Scale-invariant losses: the sum of logarithms, or the geometric mean (Chennupati et al., CVPR Workshops 2019)."""

from __future__ import annotations

from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.numerics import brought


def geometric(*, mean: bool = False, every: int = 1) -> Balancer[State, Info]:
    r"""The gradient of :math:`\sum_i \log L_i`: weights :math:`w_i = 1 / L_i`, whatever the scale of the losses.

    It is at once the scale-invariant baseline (SI), and what `uncertainty` (halved) and IMTL-L reach where their
    learned scales are at the optimum. With `mean` the objective is the geometric mean, and the same direction has
    another length, which a factor c on one loss multiplies by :math:`c^{1/T}`:

    .. math:: w_i = \frac{M}{T L_i}, \qquad M = \Big(\prod_j L_j\Big)^{1/T}

    A loss that is 0 or negative has no logarithm: it refuses the step, `info.finite` is False.

    Args:
        mean: True minimises the geometric mean of the losses (GLS) and not the sum of their logarithms.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer. T and M are those of the tasks that are present.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> losses = gn.TaskStats(torch.tensor([1.0, 4.0]))
        >>> for balancer in (gn.geometric(), gn.geometric(mean=True)):
        ...     balancer.balance(balancer.init(2), losses)[1].weights
        tensor([1.0000, 0.2500])
        tensor([1.0000, 0.2500])

    Source: Chennupati et al. 2019 for the mean; SI as in Navon et al. 2022. The product is never formed, which
    overflows in LibMTL's GLS where tasks are many.
    """

    def rule(_state: State, seen: Seen) -> tuple[Tensor, tuple[()]]:
        logs = seen.losses.log()
        shift = seen.mean(logs) - _log(seen.num_active(), logs) if mean else 0.0
        return (shift - logs).exp(), ()

    return balancer(rule, needs="losses", same_step=True, every=every)


def _log(count: int | Tensor, like: Tensor) -> Tensor:
    return brought(count, like).clamp(min=1).log()
