"""Hooks for mkdocs: what a plain repository viewer shows well becomes a site as it is.

Pages outside of docs/ (the README and others) become pages of the site; links to files that are no
pages (sources, Dockerfiles) become their paths, as there is no public address to link to; and lists
are indented as mkdocs' Markdown wants them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Pages of the site by the files that they are made of, from the repository's root.
OUTSIDE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
# Sections of the README that are pages, too: the title, the headings.
SECTIONS = {"limits.md": ("Supported, and not", ("What is supported", "Limits"))}

_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_ITEM = re.compile(r"( *)([-*] +|\d+\. +)\S")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages whose sources are elsewhere."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    readme = (ROOT / "README.md").read_text()
    for page, (title, headings) in SECTIONS.items():
        text = "\n".join(_section(readme, heading) for heading in headings)
        files.append(File.generated(config, page, content=f"# {title}\n\n{text}"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns what repository viewers show into what mkdocs does."""
    uri = page.file.src_uri
    source = "README.md" if uri in SECTIONS else OUTSIDE.get(uri, f"docs/{uri}")

    def site_link(match: re.Match[str]) -> str:
        return _site_link(match, source, uri)

    text = _outside_fences(markdown, lambda part: _LINK.sub(site_link, part))
    return _as_lists(text)


def _section(text: str, heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise PluginError(
            f"README.md has no section '{heading}', which docs/mkdocs_hooks.py makes a page of"
        )
    return found[0]


def _outside_fences(text: str, change) -> str:
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def _site_link(match: re.Match[str], source: str, uri: str) -> str:
    """A link of a file in the repository as one of a page, or as a path."""
    image, text, target = match.groups()
    path, hash_sign, anchor = target.partition("#")
    if ":" in path or not path:
        return match[0]
    in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    pages = {file: page for page, file in OUTSIDE.items()}
    if in_repository.startswith("docs/"):
        goal = in_repository.removeprefix("docs/")
    elif in_repository in pages:
        goal = pages[in_repository]
    elif (ROOT / in_repository).exists():
        plain = text.replace("`", "")
        named = plain.rstrip("/") == in_repository.rstrip("/")
        return f"`{in_repository}`" if named else f"{text} (`{in_repository}`)"
    else:
        return match[0]  # mkdocs complains of it
    relative = posixpath.relpath(goal, posixpath.dirname(uri) or ".")
    return f"{image}[{text}]({relative}{hash_sign}{anchor})"


def _as_lists(text: str) -> str:
    """Indents what belongs to a list's item by four spaces a level, with a blank line before lists.

    Repository viewers follow CommonMark: what is below an item's text belongs to it, and a list may
    follow a paragraph at once.
    """
    lines: list[str] = []
    levels: list[int] = []  # columns at which the text of the items around this line begins
    fence = ""
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        item = None if fence else _ITEM.match(line)
        if line.strip() and not fence:
            blank_before = not lines or not lines[-1].strip()
            while (
                levels and indent < levels[-1] and (item or blank_before or line[indent:] == "```")
            ):
                levels.pop()
            if item and not levels and not blank_before and not _ITEM.match(lines[-1]):
                previous_in_list = any(_ITEM.match(before) for before in _paragraph(lines))
                if not previous_in_list:
                    lines.append("")
        depth, column = len(levels), levels[-1] if levels else 0
        lines.append(" " * 4 * depth + line[min(column, indent) :] if line.strip() else line)
        if found := re.match(r" *(```+|~~~+)", line):
            fence = "" if fence and line.strip() == fence else fence or found[1]
        if item:
            levels.append(len(item[1]) + len(item[2]))
    return "\n".join(lines)


def _paragraph(lines: list[str]) -> list[str]:
    """The lines since the last blank one."""
    for number, line in enumerate(reversed(lines)):
        if not line.strip():
            return lines[len(lines) - number :]
    return lines
