"""Loss balancing as pure functions on torch.func: GradNorm and its kin. Start at `gradnorm_grad`."""

from gradnorm_func._balance.equal_norms import EqualNormsInfo, EqualNormsState, equal_norms
from gradnorm_func._balance.fixed_ratio import FixedRatioInfo, FixedRatioState, fixed_ratio
from gradnorm_func._balance.gradnorm import (
    GradNormInfo,
    GradNormState,
    balance,
    gradnorm,
    init_state,
    reset_initial_losses,
)
from gradnorm_func._balance.gradnorm_step import gradnorm_grad, gradnorm_update
from gradnorm_func._balance.ntk import NTKInfo, NTKState, NTKStats, ntk, ntk_kernels
from gradnorm_func._balance.protocol import Balancer, balancer, mask_vector
from gradnorm_func._balance.static import StaticInfo, StaticState, export, static
from gradnorm_func._core.loss import multi_task_loss, shared_linear, stacked_heads, task_names
from gradnorm_func._core.optim import Optimizer, adam, sgd
from gradnorm_func._gradinit.rescale_adam import rescale_adam
from gradnorm_func._gradinit.run import gradinit
from gradnorm_func._gradinit.state import GradInitInfo, GradInitState, gradinit_apply, gradinit_init_state
from gradnorm_func._gradinit.step import gradinit_step
from gradnorm_func._measure.check_seam import check_seam
from gradnorm_func._measure.measure import measure
from gradnorm_func._reduce.ranks import all_reduce
from gradnorm_func._reduce.stats import TaskStats, merge
from gradnorm_func._rotograd.balance import RotoGradInfo
from gradnorm_func._rotograd.evaluate import fold_rotations, rotograd_task_fn
from gradnorm_func._rotograd.measure import (
    RotoGradFactors,
    RotoGradStats,
    rotograd_factors,
    rotograd_measure,
)
from gradnorm_func._rotograd.merge import rotograd_merge
from gradnorm_func._rotograd.rotation import random_rotations
from gradnorm_func._rotograd.rotograd import (
    rotograd,
    rotograd_accumulate,
    rotograd_balance,
    rotograd_grad,
    rotograd_init_state,
    rotograd_update,
)
from gradnorm_func._rotograd.scale import RotoGradState
from gradnorm_func._tools.analysis import task_cosine_similarity, task_grad_norms, task_grads, task_gramian
from gradnorm_func._tools.autograd import backward_from, fork, measure_from, measure_losses
from gradnorm_func._tools.interop import check_finite, functional, load_state, log_dict, state_dict, write_grads
from gradnorm_func._tools.layers import LayerReport, layer_analysis
from gradnorm_func._tools.sweep import SweepResult, sweep
from gradnorm_func._tools.train import train

__version__ = "0.1.0"

__all__ = [
    "Balancer",
    "EqualNormsInfo",
    "EqualNormsState",
    "FixedRatioInfo",
    "FixedRatioState",
    "GradInitInfo",
    "GradInitState",
    "GradNormInfo",
    "GradNormState",
    "LayerReport",
    "NTKInfo",
    "NTKState",
    "NTKStats",
    "Optimizer",
    "RotoGradFactors",
    "RotoGradInfo",
    "RotoGradState",
    "RotoGradStats",
    "StaticInfo",
    "StaticState",
    "SweepResult",
    "TaskStats",
    "adam",
    "all_reduce",
    "backward_from",
    "balance",
    "balancer",
    "check_finite",
    "check_seam",
    "equal_norms",
    "export",
    "fixed_ratio",
    "fold_rotations",
    "fork",
    "functional",
    "gradinit",
    "gradinit_apply",
    "gradinit_init_state",
    "gradinit_step",
    "gradnorm",
    "gradnorm_grad",
    "gradnorm_update",
    "init_state",
    "layer_analysis",
    "load_state",
    "log_dict",
    "mask_vector",
    "measure",
    "measure_from",
    "measure_losses",
    "merge",
    "multi_task_loss",
    "ntk",
    "ntk_kernels",
    "random_rotations",
    "rescale_adam",
    "reset_initial_losses",
    "rotograd",
    "rotograd_accumulate",
    "rotograd_balance",
    "rotograd_factors",
    "rotograd_grad",
    "rotograd_init_state",
    "rotograd_measure",
    "rotograd_merge",
    "rotograd_task_fn",
    "rotograd_update",
    "sgd",
    "shared_linear",
    "stacked_heads",
    "state_dict",
    "static",
    "sweep",
    "task_cosine_similarity",
    "task_grad_norms",
    "task_grads",
    "task_gramian",
    "task_names",
    "train",
    "write_grads",
]
