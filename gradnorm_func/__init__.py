"""GradNorm as pure functions on torch.func."""

from gradnorm_func._analysis import task_cosine_similarity, task_grad_norms, task_gramian, task_grads
from gradnorm_func._gradnorm import (
    GradNormInfo,
    GradNormState,
    balance,
    gradnorm,
    gradnorm_grad,
    gradnorm_update,
    init_state,
    reset_initial_losses,
)
from gradnorm_func._loss import multi_task_loss, shared_linear, stacked_heads, task_names
from gradnorm_func._measure import measure
from gradnorm_func._optim import Optimizer, adam, sgd
from gradnorm_func._stats import TaskStats, merge
from gradnorm_func._step import Balancer, balancer
