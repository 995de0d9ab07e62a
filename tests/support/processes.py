"""The processes of this machine, read from /proc."""

from __future__ import annotations

import os
from pathlib import Path


def family(root: int) -> dict[int, str]:
    """Returns a process and its descendants, with their titles."""
    parents, titles = {}, {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
            title = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ")
            titles[int(entry)] = title.decode(errors="replace")
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: titles.get(pid, "") for pid in found}


def named(root: int, word: str) -> list[int]:
    """Returns the descendants of a process whose titles contain a word."""
    return [pid for pid, title in family(root).items() if pid != root and word in title]


def unique_bytes(pid: int) -> int:
    """Returns the bytes that would be free if the process ended; 0 if there is no such process."""
    try:
        lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
