"""The pages of this repository, taken apart: prose, links, headings, blocks of code and the commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".", "docs", "examples", "benchmarks", "benchmarks/results", "ggml_patch")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
COMMAND = re.compile(r"^(?:\$ )?(?:\w+=\S+ )*((?:[\w.]+/)*(?:ernie-gguf|make|python|llama-[a-z-]+)(?: .*)?)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, "" if none is named, and its text; `line` is that of the fence."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    """The page as tests name it."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found, fence, language, lines = [], 0, "", list[str]()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            if fence:
                found.append(Block(page, fence, language, "\n".join(lines) + "\n"))
            fence, language, lines = (0, "", []) if fence else (number, line[3:].strip(), [])
        elif fence:
            lines.append(line)
    assert not fence, f"{name(page)}:{fence}: the block does not end"
    return found


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """Targets of links and images in the prose."""
    return re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))


def spans(page: Path) -> list[str]:
    """Inline code, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may have after the #, as GitHub makes it."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(next(each for each in (slug, *(f"{slug}-{i}" for i in range(1, 9))) if each not in found))
    return found


def commands(page: Path) -> Iterator[str]:
    """Command lines of our programs and llama.cpp's, in blocks and in inline code, without comments and pipes."""
    lines = [line for block in blocks(page) for line in block.text.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(page)]:
        if found := COMMAND.match(line.strip()):
            yield re.split(r"\s(?:#|\||<|>|&&|2>)\s?|…", found[1])[0].strip()
