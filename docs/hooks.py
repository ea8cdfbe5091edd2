"""MkDocs hooks: README.md is the site's first page, and files of the repository that a page links
to are copied into the site, so that one link serves a repository's host and the site. Names of the
library's symbols lead to their entries in the API reference."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
HOME = "README.md"
COPIES = "repository"
"""The folder of the site that has the repository's files from outside of docs/."""
LINK = re.compile(r"(\]\()([^)\s#]+)")
HAS_SCHEME = re.compile(r"[a-z]+:")
CODE = re.compile(r"<code>([\w.]+)</code>(?!</a>)")


def public(module: str) -> list[str]:
    """The names in a module's `__all__`."""
    for node in ast.parse((ROOT / module).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{module} must have __all__, but has none")


SYMBOLS = {name: name for name in public("mmixer_kernels/__init__.py")}
for _name in public("mmixer_kernels/functional.py"):
    SYMBOLS[_name] = SYMBOLS[f"functional.{_name}"] = f"functional.{_name}"
SYMBOLS["reference.MCU"] = "reference.MCU"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the first page, and what is linked to, also by pages that are added."""
    files.append(copied(HOME, config))
    pages = list(files.documentation_pages())
    for page in pages:
        for path in linked(page.content_string, in_repository(page.src_uri)):
            if files.get_file_from_path(in_site(path)) is None and (ROOT / path).is_file():
                files.append(copied(path, config))
                if path.endswith(".md"):
                    pages.append(files.src_uris[in_site(path)])
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Points links at where their files are in the site; MkDocs warns of those that are nowhere."""
    uri = page.file.src_uri
    source = in_repository(uri)

    def rewritten(match: re.Match[str]) -> str:
        path = target(match[2], source)
        if path is None or not (ROOT / path).exists():
            return match[0]
        return match[1] + posixpath.relpath(in_site(path), posixpath.dirname(uri))

    return LINK.sub(rewritten, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Marks symbols in the text, which mkdocs-autorefs, a part of mkdocstrings, makes links of."""

    def marked(match: re.Match[str]) -> str:
        name = match[1].removeprefix("mmixer_kernels.")
        if name not in SYMBOLS:
            return match[0]
        return f'<autoref identifier="mmixer_kernels.{SYMBOLS[name]}">{match[0]}</autoref>'

    return CODE.sub(marked, html)


def copied(path: str, config: MkDocsConfig) -> File:
    """A file of the repository, in the site."""
    return File.generated(config, in_site(path), abs_src_path=str(ROOT / path))


def linked(markdown: str, source: str) -> Iterator[str]:
    """The files of the repository that a page's text links to, by their paths there."""
    for match in LINK.finditer(markdown):
        path = target(match[2], source)
        if path is not None:
            yield path


def target(link: str, source: str) -> str | None:
    """The path in the repository of what the file `source` links to; None for other hosts."""
    if HAS_SCHEME.match(link) or link.startswith("/"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def in_site(path: str) -> str:
    """Where a file of the repository stands in the site's sources."""
    if path == HOME:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}"


def in_repository(uri: str) -> str:
    """The inverse of `in_site`."""
    if uri == "index.md":
        return HOME
    return uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else f"docs/{uri}"
