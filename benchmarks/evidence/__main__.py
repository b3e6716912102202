"""Every method against equal weights on equal terms.

    python -m benchmarks.evidence --quick            # under ten minutes on two cores; prints its report
    python -m benchmarks.evidence                    # hours: all data, all methods, three conditions
    python -m benchmarks.evidence --data enb,digits --methods equal,gradnorm --conditions normalised,x100 --out FILE
    python -m benchmarks.evidence.report FILE ...    # the tables; results/ has those of results.md

What has been measured is in FILE and is not measured again, so that it may be run in pieces, and in several processes
with a FILE each. A method is a row's name, "static from NAME", or an expression such as "gn.gradnorm(alpha=0.5)".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

from . import data, results
from .methods import CONTROLS, EXPORT, METHODS, Case, method_of
from .problems import CONDITIONS, PINNS, make
from .protocol import Protocol, measure
from .report import report

MAIN_CONDITIONS = ("normalised", "raw", "x100")
QUICK = ("equal", "equal, total held", "1 / L(0)", "uncertainty", "gradnorm", "gradnorm, as published")


def names(text: str) -> list[str]:
    """A list with commas, but those within brackets, or followed by a space, which are a part of a name."""
    out, depth = [""], 0
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth and text[i + 1 : i + 2] != " ":
            out.append("")
        else:
            out[-1] += letter
    return [name for name in out if name]


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=names, help=f"of {', '.join([*data.ALL, *PINNS])} (default: all that are here)")
    parser.add_argument("--folder", help="where rf1, enb, adult and mnist are (default: ../shared/data)")
    parser.add_argument("--methods", type=names, help=f"of {'; '.join(METHODS)} (default: all)")
    parser.add_argument("--conditions", type=names, default=[], help=f"of {', '.join(CONDITIONS)}")
    parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk-size", type=int, help="runs at a time")
    parser.add_argument("--compile", action="store_true", help="pays for many steps on an idle machine")
    parser.add_argument("--out", default="evidence.json", help="what was measured (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three data sets, six methods, 400 steps, three seeds")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.seeds = min(args.steps, 400), min(args.seeds, 3)
        args.data = args.data or ["diabetes", "teacher", "digits"]
        args.methods = args.methods or list(QUICK)
        args.conditions = args.conditions or ["normalised", "x100"]
    if min(args.steps, args.seeds) < 1:
        parser.error("--steps and --seeds must be at least 1")
    data.use(args.folder)
    args.data = args.data or [*data.available(), *PINNS]
    args.conditions = args.conditions or list(MAIN_CONDITIONS)
    args.methods = args.methods or [*METHODS, *(EXPORT + name for name in METHODS if name not in CONTROLS)]
    for chosen, known in ((args.data, [*data.ALL, *PINNS]), (args.conditions, CONDITIONS)):
        for name in set(chosen) - set(known):
            parser.error(f"{name!r} is none of {', '.join(known)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    torch.set_num_threads(args.threads)
    protocol = Protocol(args.steps, args.seeds, args.optimizer, args.compile, args.chunk_size)
    begin = time.perf_counter()
    for name in args.data:
        problem = make(name)
        for method_name in args.methods:
            method = method_of(method_name)
            if method.alone and name in PINNS:
                continue  # a loss of a PINN alone has no solution
            for condition in args.conditions:
                key = results.Key(name, args.optimizer, condition, method_name)
                if results.has(args.out, key, protocol):
                    continue
                case = Case(problem, condition, list(range(args.seeds)), weights_of(args.out, key))
                record = measure(case, method, protocol)
                results.add(args.out, key, record)
                print(
                    f"[{time.perf_counter() - begin:5.0f} s] {' / '.join(key)}: learning rate "
                    f"{', '.join(f'{rate:.2g}' for rate in record['rates'])} {', '.join(record['settings'])}",
                    file=sys.stderr,
                    flush=True,
                )
    if args.quick:
        print(report(results.load(args.out)))


def weights_of(path: str, key: results.Key) -> Callable[[str], list[list[float]]]:
    """The mean weights of another method's run in the same case."""

    def find(method: str) -> list[list[float]]:
        other = key._replace(method=method)
        record = results.load(path).get(other)
        if record is None:
            raise SystemExit(f"{' / '.join(key)} needs {' / '.join(other)} first: name it before it in --methods")
        return record["weights"]

    return find


if __name__ == "__main__":
    main()
