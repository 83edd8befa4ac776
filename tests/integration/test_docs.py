"""README and docs say what is true today: their Python runs, their links lead somewhere, every public name is told."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"(?P<exempt><!-- not run: \S.*? -->\s*)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\((?!https?://|#)([^)#\s]+)")
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
COMMAND = re.compile(r"^\$ (?:\.venv/bin/)?spectralnorm (?P<name>[a-z]+)(?P<rest>.*?)(?:\s#.*)?$", re.MULTILINE)
PUBLIC_MODULES = (
    "spectralnorm",
    "spectralnorm.gan",
    "spectralnorm.layers",
    "spectralnorm.metrics",
    "spectralnorm.records",
    "spectralnorm.report",
    "spectralnorm.errors",
)


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and code of each Python block that is meant to run."""
    text = page.read_text(encoding="utf-8")
    found = (match for match in FENCE.finditer(text) if not match["exempt"])
    return [(text.count("\n", 0, match.start("code")), match["code"]) for match in found]


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page)], ids=_name)
def test_python_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for line, code in _blocks(page):
        # The blank lines before it make a traceback point into the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def _told_options() -> dict[str, set[str]]:
    """The options that the pages use, by subcommand."""
    told: dict[str, set[str]] = {}
    for page in PAGES:
        for match in COMMAND.finditer(page.read_text(encoding="utf-8")):
            told.setdefault(match["name"], set()).update(re.findall(r"(?<!\S)--[a-z-]+", match["rest"]))
    return told


@pytest.mark.parametrize("command", sorted(_told_options()))
def test_commands_of_the_pages_have_the_options_told(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from spectralnorm.cli import main

    monkeypatch.setattr("sys.argv", ["spectralnorm", command, "--help"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code in (None, 0)
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert _told_options()[command] <= known


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_lead_to_files(page: Path):
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def _public(target: str) -> object:
    """What a dotted name stands for: a name in a module, or a module, whether anybody has imported it or not."""
    module_name, _, name = target.rpartition(".")
    module = importlib.import_module(module_name)
    return getattr(module, name) if hasattr(module, name) else importlib.import_module(target)


def _told_objects() -> list[object]:
    """What the reference shows; a module stands for all that it makes public."""
    told: list[object] = []
    for page in ROOT.glob("docs/**/*.md"):
        for target in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            if target in PUBLIC_MODULES:
                module = importlib.import_module(target)
                told += [getattr(module, name) for name in module.__all__]
            else:
                told.append(_public(target))
    return told


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_every_public_name_stands_in_the_reference(module_name: str):
    told = _told_objects()
    module = importlib.import_module(module_name)
    public = [name for name in module.__all__ if not name.startswith("__")]
    assert [name for name in public if not any(getattr(module, name) is item for item in told)] == []


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_every_public_object_explains_itself(module_name: str):
    module = importlib.import_module(module_name)
    objects = {name: getattr(module, name) for name in module.__all__}
    silent = [name for name, value in objects.items() if callable(value) and not getattr(value, "__doc__", None)]
    assert silent == []


@pytest.mark.parametrize("name", ["weights loaded, then eval", "another direction grew", "after one NaN step, undone"])
def test_figure_of_the_readme_shows_what_its_script_measures(name: str):
    specification = importlib.util.spec_from_file_location("figure", ROOT / "tools" / "draw_promised_norm.py")
    assert specification is not None
    assert specification.loader is not None
    figure = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(figure)
    drawn = dict(re.findall(r"(?:^|; |<desc>)([^;<]+): (torch [^;<]+)", figure.OUTPUT.read_text(encoding="utf-8")))

    theirs, ours = (
        figure.median_norm(figure.SITUATIONS[name], normalize)
        for normalize in (figure.torch_spectral_norm, figure.spectral_norm)
    )

    assert set(drawn) == set(figure.SITUATIONS)
    assert drawn[name] == f"torch {figure.show(theirs)}, spectralnorm {figure.show(ours)}"


def formulas_hook():
    specification = importlib.util.spec_from_file_location("formulas", ROOT / "tools" / "formulas_in_pages.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_formulas_become_what_browsers_draw_by_themselves() -> None:
    page = r'<p>of <span class="arithmatex">\(a &lt; b\)</span>:</p><div class="arithmatex">\[\sum_a K_a\]</div>'
    drawn = formulas_hook().on_page_content(page)
    assert "arithmatex" not in drawn
    assert drawn.count("<math") == 2
    assert 'display="block"' in drawn.split("</p>")[1]
    with pytest.raises(ValueError, match=r"page\.md: the formula '.*nosuch"):
        formulas_hook().on_page_content(r'<span class="arithmatex">\(\nosuch{a}\)</span>', page="page.md")


def test_every_formula_of_the_documentation_can_be_drawn() -> None:
    hook, count = formulas_hook(), 0
    for path in (ROOT / "docs").rglob("*.md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for formula in re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL):
            hook._drawn(formula, True, path.name)
            count += 1
        for formula in re.findall(
            r"(?<!\$)\$([^$\n][^$]*?)\$(?!\$)", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL)
        ):
            hook._drawn(formula, False, path.name)
            count += 1
    assert count >= 50


def test_every_file_of_the_layer_has_its_place_on_the_map():
    page = (ROOT / "docs" / "library" / "inside-the-layer.md").read_text(encoding="utf-8")
    table = page[page.index("## Which file does what") :]
    files = {path.name for path in (ROOT / "src/spectralnorm/parametrizations").glob("*.py")} - {"__init__.py"}
    assert sorted(re.findall(r"`(\w+\.py)`", table)) == sorted(files)
