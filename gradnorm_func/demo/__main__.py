"""The command line: `python -m gradnorm_func.demo [digits|toy|gradinit|rotograd|pinn] [options]`."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gradnorm_func.demo import gradinit, pinn, rotograd

DESCRIPTION = """\
Loss balancing at work, on a laptop's CPU, in about a minute.

  digits   (the default) real handwritten digits, six tasks with six units: equal weights,
           tuned static weights, GradNorm and fixed gradient ratios; a table and a figure
  toy      the toy of the GradNorm paper: GradNorm against equal and uncertainty weighting
  gradinit deep networks that default initialisation cannot train, rescaled by GradInit (minutes)
  rotograd the toys of the RotoGrad paper with and without rotations, and RotoGrad on the digits
  pinn     Burgers' and Helmholtz' equations solved by networks, under seven ways to weight their losses (minutes)
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
    """All commands and their options."""
    keep = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m gradnorm_func.demo", description=DESCRIPTION, formatter_class=keep)
    commands = parser.add_subparsers(dest="command", metavar="{digits,toy,gradinit,rotograd,pinn}", parser_class=Parser)
    count, seed = number(int, 1, 1000), number(int, 0, 2**31)

    digits = commands.add_parser(
        "digits",
        help="six tasks on overlaid pairs of real digits",
        description="Trains on pairs of scikit-learn's 8x8 digits overlaid in one image. Tasks: left digit, right "
        "digit, their sum, parity of their product, number of active pixels, reconstruction. Prints each task's test "
        "error with its spread over the seeds, and saves a figure of one run.",
    )
    digits.add_argument("--seeds", type=count, default=3, metavar="N", help="runs per method (default: 3)")
    digits.add_argument("--first-seed", type=seed, default=0, metavar="S", help="seeds are S ... S+N-1 (default: 0)")
    digits.add_argument("--steps", type=number(int, 2, 10**6), default=500, help="training steps a run (default: 500)")
    digits.add_argument(
        "--trials", type=count, default=5, metavar="K",
        help="search runs for each tuned method: weights, alpha, ratios (default: 5; 1 takes the first guess)",
    )  # fmt: skip
    digits.add_argument(
        "--alpha", type=number(float, 0, 10),
        help="GradNorm's restoring force; given here, it is not searched (0 aims at equal gradient norms)",
    )  # fmt: skip
    digits.add_argument("--quick", action="store_true", help="one seed, 150 steps, no search: a look in seconds")

    toy = commands.add_parser(
        "toy",
        help="the toy regression of the GradNorm paper",
        description="T regression tasks f_i(x) = s_i tanh((B + E_i) x) that differ in their scale s_i, one shared "
        "trunk. Prints and plots the task weights and the sum of L_i / L_i(0) on test data.",
    )
    toy.add_argument("--tasks", type=number(int, 2, 100), default=10, metavar="T", help="tasks (default: 10)")
    toy.add_argument("--seed", type=seed, default=0, help="of functions, data and parameters (default: 0)")
    toy.add_argument("--steps", type=number(int, 2, 10**6), default=1500, help="training steps (default: 1500)")
    toy.add_argument(
        "--alpha",
        type=number(float, 0, 10),
        default=0.12,
        help="GradNorm's restoring force (default: 0.12, the paper's)",
    )
    for command, name in ((digits, "digits"), (toy, "toy")):
        command.add_argument(
            "--weight-lr", type=number(float, 0, 10, open_low=True), default=0.025, metavar="LR",
            help="learning rate of Adam for the task weights (default: 0.025, the paper's)",
        )  # fmt: skip
        default = f"gradnorm_{name}.png"
        command.add_argument(
            "--out", type=figure_path, default=default, metavar="FILE", help=f"the figure (default: {default})"
        )
    rescaling = commands.add_parser(
        "gradinit",
        help="deep networks without normalisation, Post-LN transformers without warm-up",
        description="Trains on scikit-learn's 8x8 digits from the default initialisation and from GradInit's, with "
        "SGD and Adam, at three learning rates each. Prints test accuracies with their spread over the seeds and how "
        "many runs diverge, and saves a figure.",
    )
    gradinit.add_arguments(rescaling, figure_path)
    rotating = commands.add_parser(
        "rotograd",
        help="the toys of the RotoGrad paper, and RotoGrad on the digits",
        description="Two tasks on one point of the plane, without and with rotations: does each reach its optimum? "
        "Then plain training, GradNorm, RotoGrad and RotoGradNorm on the six digit tasks. Prints both tables and "
        "saves a figure of the toys.",
    )
    rotograd.add_arguments(rotating, figure_path)
    physics = commands.add_parser(
        "pinn",
        help="Burgers' and Helmholtz' equations solved by networks",
        description="Trains physics-informed networks on two equations with known solutions: equal, tuned static and "
        "time-averaged weights, GradNorm, and the two rules of jaxpi. Prints the relative L2 errors with their spread "
        "over the seeds, and saves a figure.",
    )
    pinn.add_arguments(physics, figure_path)
    parser.epilog = "\n".join(["", *(command.format_help() for command in (digits, toy, rescaling, rotating, physics))])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "digits")
    parser = build_parser()
    options = parser.parse_args(arguments)
    for module in ("matplotlib", "sklearn") if options.command not in ("toy", "pinn") else ("matplotlib",):
        try:
            importlib.import_module(module)
        except ImportError as error:
            parser.exit(1, f'{parser.prog}: {error}: pip install "gradnorm_func[demo]"\n')

    import torch

    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share among cores
    try:
        if options.command == "toy":
            from gradnorm_func.demo import toy

            toy.main(options)
        elif options.command == "gradinit":
            gradinit.run(options)
        elif options.command == "rotograd":
            rotograd.run(options)
        elif options.command == "pinn":
            pinn.run(options)
        else:
            from gradnorm_func.demo import compare

            compare.main(options)
    finally:
        torch.set_num_threads(threads)
    print(f"{time.perf_counter() - start:.0f} s in all. Figure: {os.path.abspath(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
