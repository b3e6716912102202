"""Figures of what the losses do. Each function takes a history, draws into an axis, and returns the axis.

A history is what `gn.train` returns (an Info stacked over the steps), a list of Infos, one Info, a dict with the same
fields, or the plain (steps, T) numbers of the field that is drawn: a tensor of any dtype and device, an array, nested
lists, or a dict from task name to curve. NaN leaves a gap. `names` are the tasks' names: a list, or the losses or
heads themselves.

With `ax=None` a new pyplot figure is made, which notebooks show by themselves; nothing here needs a display. Positive
numbers that span more than a factor of 3 get a logarithmic axis. Up to eight tasks each have a colour, dash and
marker; of more only the extremes are told apart.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("gradnorm_func.plot needs matplotlib: pip install 'gradnorm_func[plot]'") from error

from gradnorm_func.plot._compare import compare, pareto
from gradnorm_func.plot._conflicts import conflict_course, conflicts
from gradnorm_func.plot._courses import grad_norms, inverse_rates, loss_ratios, weights
from gradnorm_func.plot._layers import layers
from gradnorm_func.plot._overview import overview

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
    "weights",
]
