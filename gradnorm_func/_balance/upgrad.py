"""UPGrad and DualProj: no conflict with any task (Quinton & Rey 2024; Lopez-Paz & Ranzato, NeurIPS 2017)."""

from __future__ import annotations

from gradnorm_func._balance.balancer import Info, State
from gradnorm_func._balance.certified import certified
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._core.tree import Where
from gradnorm_func._solvers.cone import project_each, project_mean


def upgrad(*, where: Where = None, every: int = 1) -> Balancer[State, Info]:
    r"""The mean of the task gradients, each projected onto the directions that conflict with no task.

    .. math:: w = \frac1T \sum_k \arg\min_{v \ge e_k} v^\top G v, \qquad
              G_{ij} = \langle \nabla_W L_i, \nabla_W L_j \rangle

    Its negative is a direction in which no task's loss rises. Each projection grows with its own gradient: the larger
    one's is the larger part. It costs T problems, all of them solved together.

    Args:
        where: W, as in `measure`.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the certificate: the largest error in the conditions of any of the T problems, in
        units of unit gradients; 0 is exact.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> stats = gn.TaskStats(torch.ones(2), torch.ones(2), gramian=torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        >>> state, info = gn.upgrad().balance(gn.upgrad().init(2), stats)
        >>> info.weights
        tensor([0.7500, 0.7500])

    Source: Quinton & Rey 2024, equation 6. Departures from TorchJD: the problems are solved without a ridge, and small
    gradients as large ones, where theirs takes the plain mean if the squared norms add up to less than 1e-4.
    """
    return certified(lambda seen: project_each(seen.gramian, seen.active), where, every)


def dualproj(*, where: Where = None, every: int = 1) -> Balancer[State, Info]:
    r"""The mean of the task gradients, projected onto the directions that conflict with no task.

    .. math:: w = \arg\min_{v \ge u} v^\top G v, \qquad u_i = 1 / T

    Its negative is the direction nearest to the plain mean's in which no task's loss rises.

    Args:
        where: W, as in `measure`.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the certificate: the largest error in the conditions, in units of a T-th of the
        longest gradient; 0 is exact.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> stats = gn.TaskStats(torch.ones(2), torch.ones(2), gramian=torch.tensor([[1.0, -2.0], [-2.0, 8.0]]))
        >>> state, info = gn.dualproj().balance(gn.dualproj().init(2), stats)
        >>> info.weights
        tensor([1.0000, 0.5000])

    Source: Lopez-Paz & Ranzato 2017, equation 11, with all tasks as constraints, as in Quinton & Rey 2024.
    """
    return certified(lambda seen: project_mean(seen.gramian, seen.active), where, every)
