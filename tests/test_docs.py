"""The code of the documentation runs, page by page; each page of it is there to be found; links lead somewhere."""

import functools
import re
import sys
import types
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def blocks(page):
    """(code, the output that stands below it or ""), each block at its own line, so that a failure names the line."""
    text = page.read_text()
    return [("\n" * text[: found.start(1)].count("\n") + found[1], found[2]) for found in BLOCK.finditer(text)]


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """What is not installed, or would take long: loggers that only listen, Inductor."""
    logged = []
    wandb = types.ModuleType("wandb")
    wandb.init, wandb.log = lambda **_: None, lambda values, step: logged.append(values)
    board = types.ModuleType("torch.utils.tensorboard")
    add = lambda _self, name, value, global_step: logged.append({name: float(value)})
    board.SummaryWriter = type("SummaryWriter", (), {"__init__": lambda _self, _folder: None, "add_scalar": add})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return logged


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, stand_ins, capsys, monkeypatch):
    if page.stem == "logging":
        pytest.importorskip("matplotlib")
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # the compiler looks there for what a function reads
    for code, output in blocks(page):
        exec(compile(code, str(page), "exec"), module.__dict__)
        printed = capsys.readouterr().out
        assert not output or printed == output
    if page.stem == "logging":
        assert len(stand_ins) > 5
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^[a-z_]+$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert {page.stem for page in PAGES} == {*listed, "index"}


def test_every_public_name_is_in_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import pages

    import gradnorm_func as gn

    groups = pages.grouped()
    assert sorted(name for names in groups.values() for name in names) == sorted(gn.__all__)
    assert all(groups.values())
    assert "gradnorm" in groups["gradnorm"]
    assert "mgda" in groups["methods"]


def test_every_figure_is_in_the_gallery():
    plot = pytest.importorskip("gradnorm_func.plot")
    text = (DOCS / "gallery.md").read_text()
    for name in plot.__all__:
        assert f"pictures/{name}.png" in text, f"plot.{name}: a picture by docs/gallery.py, and a place in gallery.md"
        assert (DOCS / "pictures" / f"{name}.png").exists()


def test_links_within_the_documentation_lead_somewhere():
    for page in PAGES:
        text = page.read_text()
        targets = re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", text)
        for target in targets:
            made = {"notebooks": "../notebooks", "reference": None}
            folder = target.partition("/")[0]
            if "/" in target and made[folder] is None:
                continue
            file = DOCS / f"{made[folder]}/{target.partition('/')[2]}.py" if "/" in target else DOCS / f"{target}.md"
            assert file.exists(), f"{page.name}: {target}"
        for target in re.findall(r"(?:literalinclude\} |image\} |:file: )(\S+)", text):
            assert (DOCS / target).exists(), f"{page.name}: {target}"


def test_no_page_names_what_is_gone():
    import gradnorm_func as gn

    for page in PAGES:
        for name in re.findall(r"\bgn\.([a-z_]+)\b", page.read_text()):
            assert hasattr(gn, name), f"{page.name}: gn.{name}"
