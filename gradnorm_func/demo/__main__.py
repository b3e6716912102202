"""The command line: `python -m gradnorm_func.demo [digits|toy] [options]`."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

DESCRIPTION = """\
Loss balancing at work, on a laptop's CPU, in about a minute.

  digits   (the default) real handwritten digits, six tasks with six units: equal weights,
           tuned static weights, GradNorm and fixed gradient ratios; a table and a figure
  toy      the toy of the GradNorm paper: GradNorm against equal and uncertainty weighting
"""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is answered by one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help shows the options)\n")


def number(kind: Callable[[str], Any], low: float, high: float, open_low: bool = False) -> Callable[[str], Any]:
    """A converter for argparse that refuses what is out of range, and says what the range is."""
    bounds = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if open_low else low <= value) or not value <= high or math.isinf(value):
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} must be {noun} {bounds}")
        return value

    return convert


def figure_path(text: str) -> str:
    """A path that can be written to; better to know before the training than after."""
    folder = os.path.dirname(text) or "."
    if os.path.splitext(text)[1].lower() not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png, .pdf or .svg")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK) or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {folder!r} must be an existing, writable folder")
    return text


def build_parser() -> Parser:
    """Both commands and their options."""
    keep = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m gradnorm_func.demo", description=DESCRIPTION, formatter_class=keep)
    commands = parser.add_subparsers(dest="command", metavar="{digits,toy}", parser_class=Parser)
    digits = commands.add_parser(
        "digits",
        help="six tasks on overlaid pairs of real digits",
        description="Trains on pairs of scikit-learn's 8x8 digits overlaid in one image. Tasks: left digit, right "
        "digit, their sum, parity of their product, number of active pixels, reconstruction. Prints each task's test "
        "error with its spread over the seeds, and saves a figure of one run.",
    )
    toy = commands.add_parser(
        "toy",
        help="the toy regression of the GradNorm paper",
        description="T regression tasks f_i(x) = s_i tanh((B + E_i) x) that differ in their scale s_i, one shared "
        "trunk. Prints and plots the task weights and the sum of L_i / L_i(0) on test data.",
    )
    add_digits_options(digits)
    add_toy_options(toy)
    rate = number(float, 0, 10, open_low=True)
    for command, name in ((digits, "digits"), (toy, "toy")):
        text = "learning rate of Adam for the task weights (default: 0.025, the paper's)"
        command.add_argument("--weight-lr", type=rate, default=0.025, metavar="LR", help=text)
        path = f"gradnorm_{name}.png"
        command.add_argument(
            "--out", type=figure_path, default=path, metavar="FILE", help=f"the figure (default: {path})"
        )
    parser.epilog = "\n".join(["", digits.format_help(), toy.format_help()])
    return parser


def add_digits_options(parser: argparse.ArgumentParser) -> None:
    count, seed, steps = number(int, 1, 1000), number(int, 0, 2**31), number(int, 2, 10**6)
    parser.add_argument("--seeds", type=count, default=3, metavar="N", help="runs per method (default: 3)")
    parser.add_argument("--first-seed", type=seed, default=0, metavar="S", help="seeds are S ... S+N-1 (default: 0)")
    parser.add_argument("--steps", type=steps, default=500, help="training steps a run (default: 500)")
    text = "search runs for each tuned method: weights, alpha, ratios (default: 5; 1 takes the first guess)"
    parser.add_argument("--trials", type=count, default=5, metavar="K", help=text)
    text = "GradNorm's restoring force; given here, it is not searched (0 aims at equal gradient norms)"
    parser.add_argument("--alpha", type=number(float, 0, 10), help=text)
    parser.add_argument("--quick", action="store_true", help="one seed, 150 steps, no search: a look in seconds")


def add_toy_options(parser: argparse.ArgumentParser) -> None:
    seed, steps, alpha = number(int, 0, 2**31), number(int, 2, 10**6), number(float, 0, 10)
    parser.add_argument("--tasks", type=number(int, 2, 100), default=10, metavar="T", help="tasks (default: 10)")
    parser.add_argument("--seed", type=seed, default=0, help="of functions, data and parameters (default: 0)")
    parser.add_argument("--steps", type=steps, default=1500, help="training steps (default: 1500)")
    text = "GradNorm's restoring force (default: 0.12, the paper's)"
    parser.add_argument("--alpha", type=alpha, default=0.12, help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "digits")
    parser = build_parser()
    options = parser.parse_args(arguments)
    for module in ("matplotlib", "sklearn") if options.command == "digits" else ("matplotlib",):
        try:
            importlib.import_module(module)
        except ImportError as error:
            parser.exit(1, f'{parser.prog}: {error}: pip install "gradnorm_func[demo]"\n')

    import torch

    from gradnorm_func.demo import compare, toy

    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share among cores
    try:
        (toy if options.command == "toy" else compare).main(options)
    finally:
        torch.set_num_threads(threads)
    print(f"{time.perf_counter() - start:.0f} s in all. Figure: {os.path.abspath(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
