"""What the documentation makes of the package itself: the reference, from docstrings, and pages of the notebooks."""

import inspect
import re
from pathlib import Path

import gradnorm_func as gn

# The reference is grouped as the package is: by the room in which a thing stands. Title, introduction, its modules.
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
    "methods": ("Other methods", "Each is a balancer; {doc}`../methods` compares them.", ("_balance",)),
    "losses": ("Losses, tasks, optimizers of the weights", "What a loss is, and the order of its tasks.", ("_core",)),
    "measure": ("Measure and reduce", "The first two parts of a step.", ("_measure", "_reduce")),
    "tools": ("Around a step", "Analysis, plain autograd, modules, checkpoints, loops.", ("_tools",)),
    "rotograd": ("RotoGrad", "A view of z of its own for each task, turned until the gradients agree.", ("_rotograd",)),
    "gradinit": ("GradInit", "Scales of a network's initial values, learned before training.", ("_gradinit",)),
}


def grouped() -> dict[str, list[str]]:
    """The public names by group; a name belongs to the first group that has its module or the folder of it."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in gn.__all__:
        module = getattr(gn, name).__module__.removeprefix("gradnorm_func.")
        places = (module, module.partition(".")[0])
        group = next(group for place in places for group, (_, _, rooms) in GROUPS.items() if place in rooms)
        groups[group].append(name)
    # States and Infos after what makes them.
    return {group: sorted(names, key=lambda name: hasattr(getattr(gn, name), "_fields")) for group, names in groups.items()}


def write_reference(folder: Path) -> None:
    """One page for each group, and one for the figures."""
    folder.mkdir(exist_ok=True)
    for group, names in grouped().items():
        title, intro, _ = GROUPS[group]
        _write(folder / f"{group}.md", _page(title, intro, "gradnorm_func", {n: getattr(gn, n) for n in names}))
    from gradnorm_func import plot

    intro = "`from gradnorm_func import plot`, with the extra `plot`. {doc}`../gallery` shows all of them."
    figures = {name: getattr(plot, name) for name in plot.__all__}
    _write(folder / "plot.md", _page("Figures", intro, "gradnorm_func.plot", figures))


def _page(title: str, intro: str, module: str, things: dict[str, object]) -> str:
    entries = []
    for name, thing in things.items():
        if inspect.isclass(thing):
            members = "" if hasattr(thing, "_fields") else "   :members:\n   :exclude-members: __init__, __new__\n"
            entries.append(f".. autoclass:: {name}\n{members}")
        else:
            entries.append(f".. autofunction:: {name}\n")
    rows = "\n".join(f"   {name}" for name in things)
    body = f".. currentmodule:: {module}\n\n.. autosummary::\n   :nosignatures:\n\n{rows}\n\n" + "\n".join(entries)
    return f"# {title}\n\n{intro}\n\n```{{eval-rst}}\n{body}```\n"


def describe_fields(app, what, name, thing, options, lines) -> None:
    """A NamedTuple says what its fields are in comments beside them: a list of these goes below its docstring."""
    fields = getattr(thing, "_fields", ()) if what == "class" else ()
    if not fields:
        return
    comments = dict(re.findall(r"^    (\w+): .*?#\s+(?!type: )(.+)$", inspect.getsource(thing), re.MULTILINE))
    escaped = {field: ": " + re.sub(r"([*_|])", r"\\\1", text) for field, text in comments.items()}
    lines += ["", *(f"- **{field}**{escaped.get(field, '')}" for field in fields), ""]


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
