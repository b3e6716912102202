"""RotoGrad: one rotation of the representation per task, so that the task gradients agree (Javaloy & Valera 2022)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.guard import due
from gradnorm_func._balance.passes import Goal, Job, Pass
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.start import NumTasks, given_by_name
from gradnorm_func._core import optim, tree
from gradnorm_func._core.loss import MultiTaskLoss, StackedHeads
from gradnorm_func._core.numerics import full_precision
from gradnorm_func._core.tasks import check_named
from gradnorm_func._core.tracing import no_graph
from gradnorm_func._measure.measure import run_engine
from gradnorm_func._measure.plan import Plan, plan_of
from gradnorm_func._measure.seam import seam
from gradnorm_func._rotograd.balance import RotoGradInfo, balance
from gradnorm_func._rotograd.crossing import Rotations, RotoGradFactors, RotoGradStats, factors_of
from gradnorm_func._rotograd.settings import Hyper, RotoGradState, check_state, checked, layout_of, start_state


def rotograd(
    rotation_shape: int | tuple[int, ...],
    *,
    trailing_shape: int | tuple[int, ...] = (),
    rotate: str | None = None,
    scale: Literal["rotograd", "none", "gradnorm"] = "rotograd",
    form: Literal["paper", "0.1.6", "0.1.2"] = "paper",
    map: Literal["cayley", "exp"] = "cayley",  # noqa: A002
    moving: bool = True,
    alpha: float | Tensor = 0.0,
    normalize: bool = False,
    burn_in: int | None = 20,
    cooperative: int | Tensor | None = None,
    optimizer: optim.Optimizer | None = None,
    weight_optimizer: optim.Optimizer | None = None,
    backbone_loss: Callable[[Any, Any, Any], Tensor] | None = None,
    every: int = 1,
) -> Balancer[RotoGradState, RotoGradInfo]:
    r"""RotoGrad with its hyperparameters bound: rotate, scale, or both.

    Head k sees :math:`r_k = R_k z`. With :math:`g_k = \partial L_k / \partial z = R_k^\top \partial L_k/\partial r_k`
    over the whole batch and :math:`u_k = g_k / \|g_k\|`, the rotations descend

    .. math:: L_\mathrm{rot}^k = -\sum_n \langle R_k^\top \tilde g_{n,k}, v_n \rangle, \qquad
              \tilde g_k = \partial L_k / \partial r_k, \quad v = \tfrac1K \sum_k u_k,

    both constant; never a task's loss. Heads get the gradients of their own losses, and the backbone that of
    :math:`\sum_k f_k g_k`, where `scale` chooses f:

    - `"none"`, rotations only: :math:`f_k = 1`.
    - `"rotograd"`, the ICLR paper's: :math:`C \sum_k u_k` with :math:`C = \sum_k \alpha_k \|g_k\|` and
      :math:`\alpha_k \propto \|g_k\| / \|g_k(0)\|`, summing to 1.
    - `"gradnorm"`, RotoGradNorm: learned weights :math:`w = K\,\mathrm{softmax}(\lambda)` that descend
      :math:`\sum_k |w_k \|g_k\| - \bar G r_k^\alpha|` with :math:`\bar G = \mathrm{mean}_k w_k \|g_k\|`.

    Args:
        rotation_shape: the axes of z that are rotated, before the trailing ones: one number m for the first m
            features of one axis (all of them, or m ≪ d), or several for axes that are rotated as one.
        trailing_shape: the axes behind them, each position of which is rotated alike:
            `rotograd(64, trailing_shape=(8, 8))` for the channels of an image.
        rotate: the path of the tensor to rotate, where z is a pytree of several. The others reach every head as they
            are, and their gradients count in all norms.
        scale: "rotograd", "none" or "gradnorm".
        form: "paper", or a published version to agree with step by step. "0.1.6" (and 0.1.5): v times
            :math:`2 \|\mathrm{mean}_k g_k\|`, and :math:`\bar G = \|\mathrm{mean}_k w_k g_k\|`. "0.1.2": also
            :math:`v = \tfrac1K \sum_k u_k \|\bar g\| r_k^\alpha`, the loss a mean over the batch, and in
            RotoGradNorm the softmax's sum held constant; it had no "rotograd" scale, and normalised losses by default.
        map: "cayley", :math:`(I + A/2)(I - A/2)^{-1}`, or "exp", from skew matrices to rotations.
        moving: True moves the base point along, :math:`R \leftarrow R\,\mathrm{map}(A)`: the gradient at A = 0 is the
            skew part, and no derivative of the map is needed. False is the published :math:`R = R(0)\,\mathrm{map}(A)`
            with A trained. Both start alike, and Adam's moments are those of A in either.
        alpha: GradNorm's restoring force, for `scale="gradnorm"`, and that of form "0.1.2".
        normalize: differentiate L_k / L_k(0) in place of L_k. Rates r_k always use it.
        burn_in: the step (counted from 0) at which L(0) and ‖g(0)‖ are taken anew; None is never.
        cooperative: from this step on (a number or a 0-d tensor) the rotations also descend their task's loss: both
            gradients, each scaled to the norm of their mean, added. None is never. From 0.1.2 to 0.1.4.
        optimizer: of the rotations; None is Adam at 5e-4, the paper's best on MNIST. Its learning rate may be a
            schedule: the theory asks for one that falls faster than the network's.
        weight_optimizer: of λ; None is Adam at 0.025.
        backbone_loss: `backbone_loss(params, z, batch) -> scalar`, a loss on the backbone alone, which is neither
            rotated nor scaled, but normalised if `normalize`.
        every: rotations, weights, L(0) and ‖g(0)‖ move in every k-th step only, as in `balancer`, and a burn-in waits
            for the next of these; f comes from every step's norms.

    Returns:
        Balancer. Its `init` takes `rotations`, (T, m, m) to start from such as `random_rotations(T, m)`, the identity
        by default; `initial_losses`, `dtype`, `device`. With `micro_batches` or `reduce` every part is run twice, for
        the backbone's factors need the norms of the whole batch, and `reduce` is called in both rounds.

    Raises:
        ValueError: for hyperparameters out of range.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(  # two heads that want opposite things of z
        ...     lambda w, x: x * w, [lambda w, z, x: (z - 1).square().sum(), lambda w, z, x: (z + 1).square().sum()]
        ... )
        >>> method, w, x = gn.rotograd(2, optimizer=gn.adam(0.05)), torch.ones(2), torch.tensor([[0.2, 0.1]])
        >>> state = method.init(2)
        >>> for _ in range(100):
        ...     grads, state, info = method.grad(state, w, loss_fn, x)
        >>> bool(info.head_cosines[0, 1] < 0), bool(info.cosines[0, 1] > 0.9)
        (True, True)

    Source: Javaloy & Valera, "RotoGrad: Gradient Homogenization in Multitask Learning", ICLR 2022, and the package
    rotograd 0.1.2 and 0.1.6. Departures: rotations start at the identity, those of the package at
    `random_rotations`; a task without gradient counts as 0 where it is divided by.
    """
    hyper = checked(
        Hyper(
            layout_of(rotation_shape, trailing_shape, rotate),
            scale,
            form,
            map,
            moving,
            alpha,
            normalize,
            burn_in,
            cooperative,
            optim.adam(5e-4) if optimizer is None else optim.as_optimizer(optimizer),
            optim.as_optimizer(weight_optimizer),
            backbone_loss,
            every,
        )
    )

    def init(
        num_tasks: NumTasks,
        *,
        rotations: Tensor | None = None,
        initial_losses: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RotoGradState:
        return start_state(num_tasks, hyper, rotations, initial_losses, dtype, device)

    return Balancer(init, Rotating(hyper), every)


class Rotating(NamedTuple):
    """How RotoGrad goes over a batch."""

    hyper: Hyper

    def known(self, state: RotoGradState, job: Job) -> None:
        """Nothing: the trunk's factors come from this step's norms."""
        _check_loss(state, job)

    def measure(
        self,
        state: RotoGradState,
        job: Job,
        batch: Any,
        goal: Goal,
        factors: RotoGradFactors | None,
        examples: float | None,
    ) -> Pass:
        """One pass through the seam."""
        _check_loss(state, job)
        check_named(job.loss_fn, mask=job.named_mask, **given_by_name(state))
        # The weights of the plan only say whether gradients of the parameters are wanted.
        weights = None if goal == "stats" else state.weights
        plan = plan_of(
            job.params,
            job.loss_fn,
            batch,
            None,
            weights,
            "norms",
            active=job.mask,
            whole_step=examples is None,
            **job.options,
        )
        self._check_count(state, plan)
        moves = due(state, self.hyper.every, job.update) is not False

        def crossing(plan: Plan) -> Rotations:
            return Rotations(plan, state, self.hyper, factors, moves, examples is not None)

        measured = run_engine(plan, partial(seam, crossing_of=crossing))
        stats: RotoGradStats = measured.stats
        grads = plan.params(stats.grads) if isinstance(stats.grads, list) else ()
        return Pass(stats._replace(grads=grads, num_examples=1.0 if examples is None else examples), measured.aux)

    def decide(self, state: RotoGradState, stats: RotoGradStats, job: Job) -> tuple[RotoGradFactors, tuple[()]]:
        """The factors of the whole; rotations are left to `balance`."""
        with no_graph(), full_precision(state.weights):
            return factors_of(state, stats, job.mask, self.hyper), ()

    def balance(
        self, state: RotoGradState, stats: RotoGradStats, mask: Any, update: bool | Tensor, _factors: Any = None
    ) -> tuple[RotoGradState, RotoGradInfo]:
        """The next rotations."""
        return balance(state, stats, self.hyper, mask, update)

    def weights(self, _state: RotoGradState, _stats: Any, _mask: Any) -> Tensor:
        """Not without the norms."""
        raise ValueError(
            "RotoGrad chooses the backbone's weights by the step's own gradients: they are in info.weights"
        )

    def _check_count(self, state: RotoGradState, plan: Plan) -> None:
        loss, layout = plan.loss_fn, self.hyper.layout
        assert isinstance(loss, MultiTaskLoss)
        if layout.size != state.rotations.shape[-1]:
            raise ValueError(
                f"rotation_shape={layout.shape} has {layout.size} features, but the state's rotations are "
                f"{tuple(state.rotations.shape[-2:])}: make the state with the init of the same gn.rotograd(...)"
            )
        params = plan.params(plan.leaves)
        stacked = isinstance(loss.heads, StackedHeads)
        heads = tree.flatten(tree.subtree(params, loss.heads.path))[0][0] if stacked else loss.functions
        if len(heads) != state.rotations.shape[0]:
            raise ValueError(
                f"loss_fn has {len(heads)} heads, but the state was made for {state.rotations.shape[0]} tasks: "
                f"init({len(heads)}) makes one for them"
            )


def _check_loss(state: RotoGradState, job: Job) -> None:
    check_state(state)
    loss = job.loss_fn
    if not isinstance(loss, MultiTaskLoss) or loss.backbone is None:
        kind = "a multi_task_loss without a backbone" if isinstance(loss, MultiTaskLoss) else type(loss).__name__
        raise ValueError(
            f"loss_fn is {kind}: rotations act on the representation z between backbone and heads, so give it as "
            "gn.multi_task_loss(backbone, heads)"
        )
