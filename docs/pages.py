"""What the documentation makes of the package itself: the reference, and pages of the notebooks."""

import inspect
import re
from pathlib import Path

import gradnorm_func as gn
from gradnorm_func import plot

# The reference is grouped as the package is, by rooms: title, introduction, modules or folders.
GROUPS = {
    "balancer": (
        "Balancers",
        "A balancing method with its hyperparameters bound, and how to write one.",
        ("_balance.balancer", "_balance.protocol", "_balance.seen"),
    ),
    "gradnorm": (
        "GradNorm",
        "The method itself, as a balancer and as functions of a state.",
        ("_balance.algorithm1", "_balance.gradnorm", "_balance.gradnorm_step"),
    ),
    "methods": (
        "Other methods",
        "Each is a balancer; {doc}`../methods` compares them.",
        ("_balance",),
    ),
    "losses": (
        "Losses, tasks, optimizers of the weights",
        "What a loss is, and the order of its tasks.",
        ("_core",),
    ),
    "measure": (
        "Measure and reduce",
        "The first two parts of a step; {doc}`../how_it_works` has a picture.",
        ("_measure", "_reduce"),
    ),
    "tools": (
        "Around a step",
        "Analysis, plain autograd, modules, checkpoints, loops.",
        ("_tools",),
    ),
    "rotograd": (
        "RotoGrad",
        "A view of z for each task, turned until their gradients agree.",
        ("_rotograd",),
    ),
    "gradinit": (
        "GradInit",
        "Scales of a network's initial values, learned before training.",
        ("_gradinit",),
    ),
}


def grouped() -> dict[str, list[str]]:
    """The public names by group: that of the module, else that of its folder."""
    rooms = {room: group for group, (_, _, modules) in GROUPS.items() for room in modules}
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in gn.__all__:
        module = getattr(gn, name).__module__.removeprefix("gradnorm_func.")
        groups[rooms.get(module) or rooms[module.partition(".")[0]]].append(name)
    is_tuple = lambda name: hasattr(getattr(gn, name), "_fields")
    # States and Infos stand behind what makes them.
    return {group: sorted(names, key=is_tuple) for group, names in groups.items()}


def write_reference(folder: Path) -> None:
    """One page for each group, and one for the figures."""
    folder.mkdir(exist_ok=True)
    for group, names in grouped().items():
        title, intro, _ = GROUPS[group]
        _write(folder / f"{group}.md", _page(title, intro, gn, names))
    intro = "`from gradnorm_func import plot`, with the extra `plot`; {doc}`../gallery` shows them."
    _write(folder / "plot.md", _page("Figures", intro, plot, plot.__all__))


def _page(title: str, intro: str, module: object, names: list[str]) -> str:
    lines = [f".. currentmodule:: {module.__name__}", ""]
    lines += [".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in names), ""]
    for name in names:
        is_class = inspect.isclass(getattr(module, name))
        lines.append(f".. {'autoclass' if is_class else 'autofunction'}:: {name}")
        if is_class and not hasattr(getattr(module, name), "_fields"):
            lines += ["   :members:", "   :exclude-members: __init__, __new__"]
        lines.append("")
    return "\n".join([f"# {title}", "", intro, "", "```{eval-rst}", *lines, "```", ""])


def describe_fields(app, what, name, thing, options, lines) -> None:
    """A NamedTuple says in comments what its fields are: they become a list below its docstring."""
    fields = getattr(thing, "_fields", ()) if what == "class" else ()
    if not fields:
        return
    comment = re.compile(r"^    (\w+): .*?#\s+(?!type: )(.+)$", re.MULTILINE)
    texts = dict(comment.findall(inspect.getsource(thing)))
    escaped = {field: ": " + re.sub(r"([*_|])", r"\\\1", text) for field, text in texts.items()}
    lines += ["", *(f"- **{field}**{escaped.get(field, '')}" for field in fields), ""]


def mark_code(app, what, name, thing, options, lines) -> None:
    """Single backticks are code in our docstrings, and a link around a public name."""
    spans = re.compile(r":\w+:`[^`]*`|``[^`]*``|`([^`]+)`")
    plain = lambda found: found[1] is None or found[1] in gn.__all__
    mark = lambda found: found[0] if plain(found) else f"``{found[1]}``"
    lines[:] = [spans.sub(mark, line) for line in lines]


def hide_constructors(app, what, name, thing, options, signature, returns):
    """A Balancer comes from its method: how it is put together is nobody's affair."""
    return ("", "") if what == "class" and not hasattr(thing, "_fields") else None


def copy_notebooks(source: Path, target: Path) -> None:
    """Notebooks are kept as Python files; jupytext makes pages of them."""
    import jupytext

    target.mkdir(exist_ok=True)
    for file in sorted(source.glob("*.py")):
        _write(target / f"{file.stem}.ipynb", jupytext.writes(jupytext.read(file), fmt="ipynb"))


def _write(file: Path, text: str) -> None:
    """Only what has changed, so that a second build is quick."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
