"""Loss balancing as pure functions on torch.func: GradNorm and its kin. Start at `gradnorm_grad`."""

# GradNorm
from gradnorm_func._balance.algorithm1 import GradNormInfo, GradNormState

# A balancer of one's own, and the others
from gradnorm_func._balance.aligned import aligned
from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.cagrad import cagrad
from gradnorm_func._balance.config import config
from gradnorm_func._balance.dwa import dwa
from gradnorm_func._balance.equal_norms import equal_norms
from gradnorm_func._balance.fairgrad import fairgrad, nash
from gradnorm_func._balance.famo import famo
from gradnorm_func._balance.fixed_ratio import fixed_ratio
from gradnorm_func._balance.geometric import geometric
from gradnorm_func._balance.gradnorm import gradnorm, gradnorm_balance, init_state
from gradnorm_func._balance.gradnorm_step import gradnorm_grad, gradnorm_update
from gradnorm_func._balance.imtl_g import imtl_g
from gradnorm_func._balance.mgda import mgda
from gradnorm_func._balance.normalized import normalized
from gradnorm_func._balance.ntk import ntk
from gradnorm_func._balance.pcgrad import pcgrad
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.relobralo import relobralo
from gradnorm_func._balance.rlw import rlw
from gradnorm_func._balance.seen import Seen
from gradnorm_func._balance.static import mean_weights, static
from gradnorm_func._balance.stch import stch
from gradnorm_func._balance.uncertainty import uncertainty
from gradnorm_func._balance.upgrad import dualproj, upgrad

# What a loss is, and the optimizers of the weights
from gradnorm_func._core.loss import multi_task_loss, shared_linear, stacked_heads
from gradnorm_func._core.optim import Optimizer, adam, sgd
from gradnorm_func._core.tasks import by_name, task_names, weighted_sum

# GradInit
from gradnorm_func._gradinit.rescale_adam import rescale_adam
from gradnorm_func._gradinit.run import gradinit
from gradnorm_func._gradinit.state import GradInitInfo, GradInitState, gradinit_apply, gradinit_init_state
from gradnorm_func._gradinit.step import gradinit_step

# measure → reduce
from gradnorm_func._measure.check import check
from gradnorm_func._measure.measure import measure
from gradnorm_func._reduce.ranks import all_reduce
from gradnorm_func._reduce.stats import TaskStats, merge

# RotoGrad
from gradnorm_func._rotograd.balance import RotoGradInfo
from gradnorm_func._rotograd.evaluate import fold_rotations, rotograd_task_fn
from gradnorm_func._rotograd.rotation import random_rotations
from gradnorm_func._rotograd.rotograd import rotograd
from gradnorm_func._rotograd.settings import RotoGradState

# Around a step: analysis, plain autograd, modules and checkpoints, loops
from gradnorm_func._tools.analysis import task_cosine_similarity, task_grad_norms, task_grads, task_gramian
from gradnorm_func._tools.autograd import measure_losses
from gradnorm_func._tools.fork import fork, weigh_trunk
from gradnorm_func._tools.functional import functional
from gradnorm_func._tools.interop import load_state, state_dict, write_buffers, write_grads
from gradnorm_func._tools.layers import layer_analysis
from gradnorm_func._tools.log import check_finite, log_dict
from gradnorm_func._tools.sweep import sweep
from gradnorm_func._tools.train import train

__version__ = "0.1.0"

__all__ = [
    "Balancer",
    "GradInitInfo",
    "GradInitState",
    "GradNormInfo",
    "GradNormState",
    "Info",
    "Optimizer",
    "RotoGradInfo",
    "RotoGradState",
    "Seen",
    "State",
    "TaskStats",
    "adam",
    "aligned",
    "all_reduce",
    "balancer",
    "by_name",
    "cagrad",
    "check",
    "check_finite",
    "config",
    "dualproj",
    "dwa",
    "equal_norms",
    "fairgrad",
    "famo",
    "fixed_ratio",
    "fold_rotations",
    "fork",
    "functional",
    "geometric",
    "gradinit",
    "gradinit_apply",
    "gradinit_init_state",
    "gradinit_step",
    "gradnorm",
    "gradnorm_balance",
    "gradnorm_grad",
    "gradnorm_update",
    "imtl_g",
    "init_state",
    "layer_analysis",
    "load_state",
    "log_dict",
    "mean_weights",
    "measure",
    "measure_losses",
    "merge",
    "mgda",
    "multi_task_loss",
    "nash",
    "normalized",
    "ntk",
    "pcgrad",
    "random_rotations",
    "relobralo",
    "rescale_adam",
    "rlw",
    "rotograd",
    "rotograd_task_fn",
    "sgd",
    "shared_linear",
    "stacked_heads",
    "state_dict",
    "static",
    "stch",
    "sweep",
    "task_cosine_similarity",
    "task_grad_norms",
    "task_grads",
    "task_gramian",
    "task_names",
    "train",
    "uncertainty",
    "upgrad",
    "weigh_trunk",
    "weighted_sum",
    "write_buffers",
    "write_grads",
]
