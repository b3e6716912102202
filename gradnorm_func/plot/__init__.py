"""Figures of what the losses do. Each function takes a history, draws into an axis, and returns the axis.

A history is what `gn.train` returns (an Info stacked over the steps), a list of Infos, one Info, a dict with the same
fields, or the plain (steps, T) numbers of the field that is drawn: a tensor of any dtype and device, an array, nested
lists, or a dict from task name to curve. NaN leaves a gap. `names` are the tasks' names: a list, or the losses or
heads themselves.

With `ax=None` a new figure is made. Where pyplot has a notebook or a window to show it in, pyplot has it; elsewhere it
is `ax.figure` alone, and nothing stays open. Nothing here needs a display. Positive numbers that span more than a
factor of 3 get a logarithmic axis. A task has one colour, dash and marker in all panels, on light and dark styles; of
more than twelve tasks the extremes are named and the others pale. Runs of more than 600 steps are drawn in 300 bins.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("gradnorm_func.plot needs matplotlib: pip install 'gradnorm_func[plot]'") from error

from gradnorm_func.plot._compare import compare
from gradnorm_func.plot._conflicts import conflict_course, conflicts
from gradnorm_func.plot._courses import grad_norms, inverse_rates, loss_ratios, weights
from gradnorm_func.plot._layers import layers
from gradnorm_func.plot._overview import overview
from gradnorm_func.plot._pareto import pareto
from gradnorm_func.plot._results import results
from gradnorm_func.plot._shares import shares
from gradnorm_func.plot._sweep import sweep

__all__ = [
    "compare",
    "conflict_course",
    "conflicts",
    "grad_norms",
    "inverse_rates",
    "layers",
    "loss_ratios",
    "overview",
    "pareto",
    "results",
    "shares",
    "sweep",
    "weights",
]
