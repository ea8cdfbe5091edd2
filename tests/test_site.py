"""The documentation site: it is whole, loads nothing from elsewhere, and a broken link stops it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

yaml = pytest.importorskip("yaml")
griffe = pytest.importorskip("griffe")
build = pytest.importorskip("mkdocs.commands.build").build
load_config = pytest.importorskip("mkdocs.config").load_config

ROOT = Path(__file__).parent.parent
DIRECTIVE = re.compile(r"^::: ([\w.]+)(?:\n    options: \{(.*)\})?", re.MULTILINE)
MODULES = [
    "mmixer_kernels",
    "mmixer_kernels.functional",
    "mmixer_kernels.reference",
    "mmixer_kernels.network",
    "mmixer_kernels.engines",
    "mmixer_kernels.data",
    "mmixer_kernels.training.options",
    "mmixer_kernels.training.metrics",
]
"""What of the package is documented with every public symbol."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CI builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return folder


class Loaded(HTMLParser):
    """Collects the addresses that a browser loads by itself with a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster") or (tag, name) == ("link", "href"):
                self.addresses.append(value or "")


@pytest.mark.slow
def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        addresses = Loaded(text).addresses
        assert addresses, page
        for address in addresses:
            assert not re.match(r"(https?:)?//", address), f"{page.relative_to(site)}: {address}"
        # The theme's scripts would fetch a program for the one, and a count of stars for the other.
        for fetched in ("mermaid", 'data-md-component="source"'):
            assert fetched not in text, f"{page.relative_to(site)}: {fetched}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import) *['\"]?(https?:)?//", sheet.read_text()), sheet


def symbols(module: ModuleType) -> list[str]:
    """The module's public names: those of `__all__`, or what it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def found(path: str) -> object:
    """The object of a path "package.module.Class.attribute". Modules are looked up as such, since
    the face hides the module `engines` behind the function of that name."""
    module, names = path, list[str]()
    while module not in sys.modules:
        module, _, name = module.rpartition(".")
        names.insert(0, name)
    return functools.reduce(getattr, names, sys.modules[module])


@pytest.mark.slow
def test_every_public_symbol_has_an_entry(site: Path) -> None:
    modules = [importlib.import_module(name) for name in MODULES]
    documented = set[int]()
    for page in (site / "api").rglob("*.html"):
        for path in re.findall(r'id="(mmixer_kernels[\w.]*)"', page.read_text()):
            with contextlib.suppress(AttributeError):  # of what instances alone have
                documented.add(id(found(path)))
    for module in modules:
        for symbol in symbols(module):
            name = f"{module.__name__}.{symbol}"
            assert id(getattr(module, symbol)) in documented, f"{name} has no entry in docs/api"


@pytest.mark.slow
def test_symbols_in_the_text_are_links(site: Path) -> None:
    page = (site / "engines" / "index.html").read_text()
    assert 'href="../api/engines/#mmixer_kernels.engines' in page
    assert "<autoref" not in "".join(page.read_text() for page in site.rglob("*.html"))


def documented() -> Iterator[griffe.Object]:
    """The functions and classes that pages of docs/api name, and those within them."""
    package = griffe.load(
        "mmixer_kernels",
        search_paths=[str(ROOT)],
        docstring_parser="google",
        docstring_options={"returns_multiple_items": False, "returns_named_value": False},
    )

    def within(entry: griffe.Object) -> Iterator[griffe.Object]:
        if entry.is_alias:
            entry = entry.final_target
        if entry.is_function or entry.is_class:
            yield entry
        if entry.is_class or entry.is_module:
            for member in entry.members.values():
                is_inherited = member.is_alias and entry.is_class
                if member.is_public and not (member.is_module or is_inherited):
                    yield from within(member)

    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for path, options in DIRECTIVE.findall(page.read_text()):
            entry = package[path.removeprefix("mmixer_kernels.")]
            chosen = re.search(r"\bmembers: \[([^]]*)\]", options)
            if chosen and entry.is_module:
                for name in re.findall(r"\w+", chosen[1]):
                    yield from within(entry[name])
            else:
                yield from within(entry)


def test_sections_of_docstrings_are_read() -> None:
    entries = {entry.path: entry for entry in documented()}
    assert len(entries) > 100
    assert {f"mmixer_kernels.{name}" for name in ("modules.FusedMCU", "functional.mcu")} < set(
        entries
    )
    for path, entry in entries.items():
        if entry.docstring is None:
            continue
        for section in entry.docstring.parsed:
            told = f"{path}, {section.kind.value}"
            if section.kind.value == "text":
                assert not re.search(
                    r"^(Args|Returns|Raises|Yields|Examples):|^>>>", section.value, re.M
                ), told
            elif section.kind.value == "raises":
                for error in section.value:
                    several = re.search(r"\b\w+(Error|Warning):", error.description)
                    assert not several, told
                    assert "," not in str(error.annotation), told
            elif section.kind.value == "parameters":
                named = {parameter.name for parameter in section.value}
                wanted = {parameter.name.lstrip("*") for parameter in entry.parameters}
                assert wanted - {"self", "cls"} == named, told


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small repository with this one's hooks, and its rules for links."""
    for name, text in {
        "README.md": "# Home\n[page](docs/page.md#a-part)\n[file](examples/one.py)\n",
        "docs/page.md": "# Page\n## A part\n[home](../README.md)\n[text](../MORE.md#more)\n",
        "MORE.md": "# More\n[file](examples/two.py)\n",
        "examples/one.py": "1\n",
        "examples/two.py": "2\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "docs" / "hooks.py", tmp_path / "docs")
    for module in ("__init__", "functional"):
        (tmp_path / "mmixer_kernels").mkdir(exist_ok=True)
        shutil.copy(ROOT / "mmixer_kernels" / f"{module}.py", tmp_path / "mmixer_kernels")
    whole = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    own = {name: whole[name] for name in ("site_name", "hooks", "exclude_docs", "validation")}
    own |= {"theme": "mkdocs", "plugins": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(own))
    return tmp_path


def built(tree: Path) -> Path:
    config = load_config(str(tree / "mkdocs.yml"), strict=True, site_dir=str(tree / "site"))
    build(config)
    return tree / "site"


def test_links_lead_to_copies_of_the_repository_s_files(tree: Path) -> None:
    site = built(tree)
    assert 'href="page/#a-part"' in (site / "index.html").read_text()
    assert 'href="repository/examples/one.py"' in (site / "index.html").read_text()
    assert (site / "repository" / "examples" / "one.py").read_text() == "1\n"
    page = (site / "page" / "index.html").read_text()
    assert 'href=".."' in page
    assert 'href="../repository/MORE/#more"' in page
    more = (site / "repository" / "MORE" / "index.html").read_text()
    assert 'href="../examples/two.py"' in more
    assert (site / "repository" / "examples" / "two.py").exists()
    assert not (site / "hooks.py").exists()


@pytest.mark.parametrize(
    ("file", "link"),
    [
        ("README.md", "docs/none.md"),
        ("README.md", "examples/none.py"),
        ("README.md", "docs/page.md#none"),
        ("docs/page.md", "#none"),
        ("docs/page.md", "../README.md#none"),
        ("docs/page.md", "../examples/none.py"),
        ("docs/page.md", "/page.md"),
        ("MORE.md", "examples/none.py"),
    ],
)
def test_a_broken_link_stops_the_build(tree: Path, file: str, link: str) -> None:
    path = tree / file
    path.write_text(path.read_text() + f"\n[broken]({link})\n")
    with pytest.raises(Exception, match="Aborted with 1 warnings in strict mode"):
        built(tree)
