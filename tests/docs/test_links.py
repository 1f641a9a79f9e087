"""Every relative link and anchor in README.md and the documentation leads somewhere."""

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.jobs import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
# [text](target) and ![text](target), text over several lines, and with an image in it.
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\](?:\([^)]*\))?)*\]\(\s*([^)\s]+)")
HEADING = re.compile(r"^ {0,3}#{1,6} +(.+?) *#* *$", re.MULTILINE)
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def without_code(text):
    """The text, code in lines taken away: what looks like a link there is none."""
    return CODE.sub("", FENCE.sub("", text))


def links(text):
    return [target for target in LINK.findall(without_code(text)) if not ADDRESS.match(target)]


def anchors(text):
    """Those that repository viewers make: small letters, no punctuation, a hyphen for a space."""
    found, seen = set(), {}
    for heading in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        plain = re.sub(r"[*]", "", plain)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = seen[slug] = seen.get(slug, -1) + 1
        found.add(f"{slug}-{number}" if number else slug)
    return found


def problems(page):
    """The links of a page that lead nowhere, each with the reason."""
    found = []
    for link in links(page.read_text()):
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT):
            found.append(f"{link}: outside of the repository")
        elif not target.exists():
            found.append(f"{link}: there is no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
            found.append(f"{link}: there is no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_leads_somewhere(page):
    assert not problems(page)


def test_what_is_linked_to_is_in_the_repository():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git, or no repository")
    files = {ROOT / name for name in listed.stdout.split("\0") if name}
    known = files | {parent for file in files for parent in file.parents}
    for page in set(PAGES) & files:
        for link in links(page.read_text()):
            path = unquote(link).partition("#")[0]
            assert not path or (page.parent / path).resolve() in known, f"{page}: {link}"


def test_the_check_sees_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# A: `b` – *c*\n\n## d\n\n## d\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[one](there.md#a-b--c) [two](there.md#d-1) [three\nlines](there.md) [out](https://x.invalid)"
        " `[code](no.md)` [here](#own)\n\n```\n[fenced](no.md)\n# no heading\n```\n\n# Own\n"
    )
    assert not problems(page)
    page.write_text("[a](no.md) ![b](no.png) [c](there.md#e) [d](#no-heading) [e](../x)\n")
    assert [problem.partition(":")[0] for problem in problems(page)] == [
        "no.md",
        "no.png",
        "there.md#e",
        "#no-heading",
        "../x",
    ]


def test_each_page_is_in_the_menu_of_the_site():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in menu, page


def test_pages_are_found():
    assert Path(ROOT / "README.md") in PAGES
    assert len(PAGES) > 15
