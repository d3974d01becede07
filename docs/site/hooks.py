"""Makes the pages of the site that are no files of docs/: README.md, the notebook, and those of source files."""

from __future__ import annotations

import ast
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGES = ("hark", "grpo", "models", "data", "launch")  # directories whose modules get a page
LINK = re.compile(r"(\]\(|src=\")([^)\s\"#]+)(#[^)\s\"]*)?([)\"])")
ELSEWHERE = ("http:", "https:", "data:")
LANGUAGES = {".yaml": "yaml", ".py": "python", ".md": "markdown", ".yml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "index.md": ROOT / "README.md",
        **{file.src_uri: DOCS / file.src_uri for file in files.documentation_pages()},
    }
    texts = {uri: rewritten(path.read_text(encoding="utf-8"), path, uri) for uri, path in pages.items()}
    texts |= notebook(files, config)
    texts["reference.md"] = reference()
    texts |= {page_of(path): source_page(path) for path in {*modules(), *linked(pages.values())}}
    for uri, text in texts.items():
        if (old := files.get_file_from_path(uri)) is not None:
            files.remove(old)
        files.append(File.generated(config, uri, content=text))
    return files


def rewritten(text: str, path: Path, uri: str) -> str:
    """The text with its links to files outside of docs/ replaced by links to their pages."""

    def link(match: re.Match) -> str:
        before, name, anchor, after = match.groups()
        target = outside(name, path)
        if target is not None:
            return f"{before}{relative(page_of(target), uri)}{after}"
        if not name.startswith(ELSEWHERE):  # README.md links to docs/demo.md
            name = name.removeprefix("docs/").replace(".ipynb", ".md")
        return f"{before}{name}{anchor or ''}{after}"

    return LINK.sub(link, text)


def outside(name: str, page: Path) -> Path | None:
    """The file or directory that a link of a page names, relative to the checkout; None if it is in docs/ or a URL."""
    if name.startswith(ELSEWHERE):
        return None
    target = Path(os.path.normpath(page.parent / name))
    if not target.exists() or target.is_relative_to(DOCS):
        return None
    return target.relative_to(ROOT)


def linked(pages: object) -> Iterator[Path]:
    """The files and directories outside of docs/ that pages link to."""
    for page in pages:
        for match in LINK.finditer(page.read_text(encoding="utf-8")):
            if (target := outside(match.group(2), page)) is not None:
                yield target


def relative(uri: str, start: str) -> str:
    return os.path.relpath(uri, os.path.dirname(start) or ".")


@functools.cache
def modules() -> list[Path]:
    """The modules of the packages, relative to the checkout."""
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    # A file beside a configuration, which names it, is no module.
    return [path.relative_to(ROOT) for path in found if (path.parent / "__init__.py").exists()]


def page_of(path: Path) -> str:
    return f"source/{path}.md"


def source_page(path: Path) -> str:
    """The page of a file: the docstrings of a module, the list of a directory, or the text of another file."""
    title = f"# {path}\n\n"
    if (ROOT / path).is_dir():
        names = [module for module in modules() if module.parent == path]
        return title + "\n".join(f"- [{name}]({relative(page_of(name), page_of(path))})" for name in names)
    if path in modules():
        return f"{title}::: {module_name(path)}\n"
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"{title}````{LANGUAGES.get(path.suffix, '')}\n{text}````\n"


def module_name(path: Path) -> str:
    """The name by which a module is imported: hark.grpo.loss for grpo/loss.py."""
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    return ".".join(parts if parts[0] == "hark" else ["hark", *parts])


def reference() -> str:
    """The list of all modules, each with the first sentence of its docstring."""
    lines, directory = ["# Reference", "", "Every module, with its public names, signatures and docstrings."], None
    for path in modules():
        if path.name == "__init__.py" and path.parent.name != "hark":
            continue
        if path.parent != directory:
            directory = path.parent
            lines += ["", f"## {directory}/", ""]
        doc = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
        lines.append(f"- [{path.name}]({page_of(path)}): {' '.join(doc.partition(chr(10) * 2)[0].split())}")
    return "\n".join(lines)


def notebook(files: Files, config: MkDocsConfig) -> dict[str, str]:
    """The notebook's page; its pictures are added to the files."""
    from nbconvert import MarkdownExporter

    path = DOCS / "first_hour.ipynb"
    text, resources = MarkdownExporter().from_filename(str(path))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, name, content=content))
    if (copied := files.get_file_from_path(path.name)) is not None:
        files.remove(copied)
    return {"first_hour.md": rewritten(text, path, "first_hour.md")}
