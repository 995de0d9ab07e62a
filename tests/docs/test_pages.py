"""The pages of the documentation: their commands, code blocks and links, and the modules that architecture.md lists."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT

from jobs import cli

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "cluster" / "README.md"])
PACKAGES = ("alit", "jobs", "serve")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(alit [^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
COMMAND_FUNCTIONS = (
    "alit.official.convert",
    "jobs.benchmarks.encoding.benchmark_encode",
    "jobs.benchmarks.tokenization.benchmark_tokenize",
    "jobs.benchmarks.training.benchmark_train",
    "jobs.dataset.verify.verify",
    "jobs.demo.demo",
    "jobs.evaluation.job.run",
    "jobs.gallery.job.show",
    "jobs.submission.client.follow",
    "jobs.submission.client.stop",
    "jobs.submission.client.submit",
    "jobs.tokenization.capacity.print_estimate",
    "jobs.tokenization.job.preview",
    "jobs.tokenization.job.tokenize",
    "jobs.training.job.train_stage",
    "serve.local.run",
)
"""What the commands call once their options are parsed."""


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """Returns the code blocks of a page in some languages."""
    return [code for language, code in FENCE.findall(page.read_text()) if language in languages]


def shell_lines(page: Path) -> list[str]:
    """Returns the lines of a page's shell blocks, with continued lines joined."""
    return [line for code in blocks(page, "sh", "bash", "shell") for line in code.replace("\\\n", " ").splitlines()]


def alit_commands(page: Path) -> list[list[str]]:
    """Returns the arguments of the `alit` commands in a page's shell blocks and, with three words or more, in its text.

    A command that `alit submit` submits is also a command by itself.
    """
    lines = [line for line in shell_lines(page) if line.startswith("alit ")]
    lines += [
        text for text in INLINE.findall(FENCE.sub("", page.read_text())) if "…" not in text and len(text.split()) > 3
    ]
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    return commands + [words[1:] for words in commands if words[0] == "submit" and words[1] in cli.COMMANDS]


def exit_code(arguments: list[str]) -> int:
    """Runs a command; returns its exit code."""
    try:
        cli.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if alit_commands(page)], ids=relative)
def test_pages_commands_are_accepted(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every `alit` command of a page is accepted with its arguments and options, and calls one function."""
    calls: list[str] = []
    for name in COMMAND_FUNCTIONS:
        monkeypatch.setattr(name, lambda *given, name=name, **options: calls.append(name))
    monkeypatch.setattr("jobs.tokenization.capacity.Rates.read", lambda *given: None)
    monkeypatch.setattr("jobs.tokenization.job.print_summary", lambda *given: None)
    monkeypatch.chdir(tmp_path)
    for words in alit_commands(page):
        calls.clear()
        assert exit_code(words) != 2, f"alit {shlex.join(words)}: {capsys.readouterr().err}"
        assert len(calls) == ("--help" not in words), f"alit {shlex.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_make_targets_exist(page: Path) -> None:
    """Every make target that a page names is one of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    lines = [*shell_lines(page), *re.findall(r"`(make [^`\n]+)`", page.read_text())]
    targets = {line.split()[1] for line in lines if line.startswith("make ")}
    assert {target for target in targets if f"\n{target}:" not in makefile} == set()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_code_blocks_parse(page: Path) -> None:
    """Python, YAML, JSON and TOML blocks parse, shell blocks are valid, and imports of our packages resolve."""
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES]
                assert all(importlib.import_module(name) for name in imported)
            elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
    parsers: dict[str, Any] = {"yaml": yaml.safe_load, "json": json.loads, "toml": tomllib.loads}
    for language, parse in parsers.items():
        for code in blocks(page, language):
            parse(code)
    for code in blocks(page, "sh", "bash", "shell"):
        checked = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page leads to a file, and its anchor to a heading of that file."""
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    """The site builds in the strict mode of mkdocs, which checks links; no page loads anything from other hosts."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in ROOT.glob("docs/*.md")}
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]*src=\"https?:|<link[^>]*rel=\"(?:stylesheet|preconnect)\"[^>]*https?:"
    )
    assert [page.name for page in pages if loaded.search(page.read_text())] == []


def test_architecture_lists_every_module() -> None:
    """The architecture page has one line for every module of the three packages, and for no other file."""
    listed: list[str] = []
    room = ""
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if heading := re.fullmatch(r"### `(\w+/(?:\w+/)?)`", line):
            room = heading[1]
        elif room and (row := re.match(r"\| `(\w+\.py)` \| .+ \|$", line)):
            listed.append(room + row[1])
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    modules = {path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"}
    assert len(listed) == len(set(listed))
    assert set(listed) == modules


def test_architecture_draws_the_enforced_layers() -> None:
    """The picture of the layers is that of the contracts in pyproject.toml, in the same order."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (picture,) = blocks(ROOT / "docs" / "architecture.md", "text")
    for contract in contracts:
        if contract["type"] == "layers":
            lines = [index for layer in contract["layers"] for index in _lines_of(picture, layer)]
            assert len(lines) == len(contract["layers"]), contract["name"]
            assert lines == list(range(lines[0], lines[0] + len(lines))), contract["name"]


def _lines_of(picture: str, layer: str) -> list[int]:
    return [i for i, line in enumerate(picture.splitlines()) if re.search(rf"│ {re.escape(layer)} *│", line)]
