"""The checkpoints of a training run, in a folder on any storage.

A checkpoint is `step-00001000.pt` and, written after it, `step-00001000.json` with its size, hash and score: without
the latter there is none. The folder has one writer at a time. A step that is saved again gets `step-00001000.again.pt`
beside the old file, which is whole until the JSON file names the new one.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from alit.errors import ConfigError, TrainingError
from jobs.storage.path import StoragePath, Writable
from jobs.storage.retry import StorageError

_OURS = re.compile(r"step-(\d{8,})(?:(\.json)|\.pt|\.again\.pt)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A checkpoint: the steps trained, and its score, if it has one (lower is better)."""

    step: int
    score: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """What the JSON file of a checkpoint says."""

    step: int
    bytes: int
    sha256: str
    score: float | None
    file: str


class _Damaged(Exception):
    """A checkpoint that cannot be loaded: its file, and what is wrong with it."""


class Checkpoints:
    """Saves and loads the state of a run.

    Args:
        folder: for checkpoints alone; the first `save` creates it.
        keep: how many of the latest stay, beside the one with the best score.
        report: takes a sentence about what went wrong and does not stop the run.

    Raises:
        ConfigError: `keep` is less than 1.
    """

    def __init__(self, folder: StoragePath, *, keep: int = 2, report: Callable[[str], None] = print) -> None:
        if keep < 1:
            raise ConfigError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep, self.report = folder, keep, report
        self._damaged: set[int] = set()  # steps that `load_latest` met

    def list(self) -> list[Saved]:
        """The checkpoints in the folder, oldest first, as their JSON files have it."""
        return [Saved(step=record.step, score=record.score) for record in _records(self.folder)]

    def save(self, state: dict[str, Any], step: int, score: float | None = None) -> None:
        """Adds the checkpoint of a step, replacing one of the same step; then removes what is no longer kept.

        Args:
            state: tensors and plain Python values, in dicts, lists and tuples.
            step: how many steps were trained.
            score: lower is better; one that is not finite counts as none.

        Raises:
            StorageError: no room, no permission, or no such place; the checkpoints in the folder are as they were.
            TrainingError: the state holds an object that could not be loaded again; likewise.
        """
        assert step >= 0
        _check_loadable(state, step)
        self._remove_leftovers()  # now, as there may be no room for one checkpoint more beside them
        files = _files(step)
        name = files[1] if any(record.file == files[0] for record in _records(self.folder)) else files[0]
        with (self.folder / name).open_write() as file:
            writer = _HashingWriter(file)
            writer.save(state)
        score = float(score) if score is not None and math.isfinite(score) else None
        record = _Record(step=step, bytes=writer.bytes, sha256=writer.sha256.hexdigest(), score=score, file=name)
        (self.folder / _json(step)).write(json.dumps(dataclasses.asdict(record)).encode())
        self._damaged.discard(step)
        self._prune(step)

    def load_latest(self) -> dict[str, Any] | None:
        """The state of the newest intact checkpoint, on the CPU; None where there are no checkpoints.

        Raises:
            StorageError: the folder or a file cannot be read, which says nothing about what it holds.
            TrainingError: there are checkpoints, but none is intact.
        """
        left, problems = _steps(self.folder), []
        while left:
            step = left.pop()
            try:
                return _load(self.folder, _record(self.folder, step))
            except _Damaged as damage:
                self._damaged.add(step)
                problems.append(str(damage))
                if left:
                    self.report(f"{damage}; falling back to step {left[-1]}")
        if problems:
            raise TrainingError(
                f"no checkpoint in {self.folder.path!r} is intact: {'; '.join(problems)}; "
                "put a good copy in place, or delete the folder to start anew"
            )
        return None

    def _prune(self, saved: int) -> None:
        """Removes all but the latest, the best and the one just saved, which may be older than others."""
        try:
            records = [record for record in _records(self.folder) if record.step not in self._damaged]
            kept = [record for record in records if record.step == saved] + records[-self.keep :]
            scored = [record for record in records if record.score is not None]
            kept += sorted(scored, key=lambda record: (record.score, -record.step))[:1]
            self._remove_all_but({name for record in kept for name in (_json(record.step), record.file)})
        except StorageError as error:
            self.report(f"{error}; nothing was removed there")

    def _remove_leftovers(self) -> None:
        """Removes what a killed process did not finish."""
        try:
            self.folder.remove_unfinished()
        except OSError as error:
            self.report(f"unfinished files in {self.folder.path!r} stay: {error}")
        steps = _steps(self.folder)
        self._remove_all_but({name for step in steps for name in (_json(step), *_files(step))})

    def _remove_all_but(self, kept: Collection[str]) -> None:
        found = [_OURS.fullmatch(name) for name in self.folder.names() if name not in kept]
        stuck = set()  # steps whose JSON file stays, and needs the file that it names
        for match in sorted(filter(None, found), key=lambda match: not match[2]):
            if match[1] in stuck:
                continue
            try:
                (self.folder / match[0]).remove_file()
            except StorageError as error:
                self.report(str(error))
                stuck.add(match[1])


class _HashingWriter:
    """Writes a state to a stream, counting and hashing its bytes on the way."""

    def __init__(self, file: Writable) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()
        self._failure: BaseException | None = None

    def save(self, state: dict[str, Any]) -> None:
        try:
            torch.save(state, cast(BinaryIO, self))
        except BaseException as error:  # torch has another one in place of the stream's own
            raise self._failure or error from None

    def write(self, data: bytes | memoryview) -> int:
        if self._failure is not None:  # torch writes on after a failure
            raise self._failure
        try:
            self.file.write(data)
        except BaseException as error:
            self._failure = error
            raise
        self.sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None: ...


def _json(step: int) -> str:
    return f"step-{step:08d}.json"


def _files(step: int) -> tuple[str, str]:
    """The names that the state of a step can have."""
    return f"step-{step:08d}.pt", f"step-{step:08d}.again.pt"


def _steps(folder: StoragePath) -> list[int]:
    found = [_OURS.fullmatch(name) for name in folder.names()]
    return sorted(int(match[1]) for match in found if match and match[2])


def _records(folder: StoragePath) -> list[_Record]:
    """What can be read of the JSON files, oldest first."""
    records = []
    for step in _steps(folder):
        try:
            records.append(_record(folder, step))
        except _Damaged:
            continue
    return records


def _record(folder: StoragePath, step: int) -> _Record:
    with _opened(folder / _json(step)) as file:
        text = file.read()
    try:
        found = {"file": _files(step)[0]} | json.loads(text)
        record = _Record(**{field.name: found[field.name] for field in dataclasses.fields(_Record)})
        sound = record.step == step and record.file in _files(step)
        if sound and (record.score is None or math.isfinite(record.score)):
            return record
    except (ValueError, TypeError, KeyError):
        pass
    raise _Damaged(f"{(folder / _json(step)).path!r} is damaged (it describes no checkpoint)")


def _load(folder: StoragePath, record: _Record) -> dict[str, Any]:
    where = folder / record.file
    with _opened(where) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if file.tell() != record.bytes:
            raise _Damaged(f"{where.path!r} is damaged ({file.tell()} bytes in place of {record.bytes})")
        if sha256 != record.sha256:
            raise _Damaged(f"{where.path!r} is damaged (its SHA-256 is not the one that was written)")
        file.seek(0)
        try:
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # torch's and pickle's, of many types
            if isinstance(error, OSError | MemoryError) or "DefaultCPUAllocator" in str(error):
                raise  # no fault of the file
            raise _Damaged(f"{where.path!r} is damaged ({_refusal(error)})") from error


@contextmanager
def _opened(where: StoragePath) -> Iterator[io.BufferedReader]:
    """A file of a checkpoint; that it is absent or that the disk fails is damage, that the network fails is not."""
    try:
        with where.open_seekable() as file:
            yield file
    except FileNotFoundError as error:
        raise _Damaged(f"{where.path!r} is damaged (it is missing)") from error
    except OSError as error:
        if where.local and error.errno == errno.EIO:
            raise _Damaged(f"{where.path!r} is damaged (the disk cannot read it)") from error
        raise StorageError(f"{where.path!r} cannot be read: {error}") from error


def _check_loadable(state: dict[str, Any], step: int) -> None:
    """Refuses now what `torch.load` would refuse when the checkpoint is needed; looks at no tensor."""
    skeleton = io.BytesIO()
    torch.save(_without_tensors(state), skeleton)
    skeleton.seek(0)
    try:
        torch.load(skeleton, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainingError(f"the state at step {step} could not be loaded again: {_refusal(error)}") from error


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None
    if type(value) in (dict, OrderedDict):
        return {key: _without_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [_without_tensors(item) for item in value]
    return value


def _refusal(error: Exception) -> str:
    """What `torch.load` refused, of its eleven lines."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds an object, {found[1]}, that is no plain value" if found else f"no state: {type(error).__name__}"
