"""The checkpoints of a training run, in a folder on any storage.

A checkpoint is `step-00001000.pt` and, written after it, `step-00001000.json` with its size, hash and score; without
the JSON file it does not exist. The folder has one writer at a time. A step that is saved again is written to
`step-00001000.again.pt` beside the earlier file, which stays intact until the JSON file names the new one.
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
from alit.validation import require_range
from jobs.storage.path import StoragePath, Writable
from jobs.storage.retry import StorageError

_FILE_NAME = re.compile(r"step-(\d{8,})(?:(\.json)|\.pt|\.again\.pt)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A checkpoint.

    Attributes:
        step: Number of steps trained.
        score: Lower is better; None if the checkpoint has none.
    """

    step: int
    score: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """The JSON file of a checkpoint."""

    step: int
    bytes: int
    sha256: str
    score: float | None
    file: str


class _DamagedError(Exception):
    """A checkpoint cannot be loaded; the message names the file and the damage."""


class Checkpoints:
    """Saves and loads the state of a run.

    Args:
        folder: A folder for checkpoints only; the first `save` creates it.
        keep: Number of latest checkpoints to keep, in addition to the one with the best score.
        report: Receives a sentence about each problem that does not stop the run.

    Raises:
        ConfigError: `keep` is less than 1.
    """

    def __init__(self, folder: StoragePath, *, keep: int = 2, report: Callable[[str], None] = print) -> None:
        require_range("keep", keep, 1, error=ConfigError)
        self.folder, self.keep, self.report = folder, keep, report
        self._damaged: set[int] = set()  # steps of damaged checkpoints that `load_latest` skipped

    def list(self) -> list[Saved]:
        """Returns the checkpoints in the folder, oldest first, according to their JSON files."""
        return [Saved(step=record.step, score=record.score) for record in _records(self.folder)]

    def save(self, state: dict[str, Any], step: int, score: float | None = None) -> None:
        """Saves the checkpoint of a step, replacing one of the same step, and removes those that are no longer kept.

        Args:
            state: Tensors and plain Python values, in dicts, lists and tuples.
            step: Number of steps trained.
            score: Lower is better; a score that is not finite counts as none.

        Raises:
            StorageError: The folder cannot be written; its checkpoints are unchanged.
            TrainingError: The state holds an object that could not be loaded again; the checkpoints are unchanged.
        """
        assert step >= 0
        _check_loadable(state, step)
        self._remove_leftovers()  # first, as there may be no room for them and another checkpoint
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
        """Returns the state of the newest intact checkpoint, on the CPU; None if there are no checkpoints.

        Raises:
            StorageError: The folder or a file cannot be read, so that its checkpoints may still be intact.
            TrainingError: There are checkpoints, but none is intact.
        """
        steps, problems = _steps(self.folder), []
        while steps:
            step = steps.pop()
            try:
                return _load(self.folder, _record(self.folder, step))
            except _DamagedError as damage:
                self._damaged.add(step)
                problems.append(str(damage))
                if steps:
                    self.report(f"{damage}; falling back to step {steps[-1]}")
        if problems:
            raise TrainingError(
                f"no checkpoint in {self.folder.path!r} is intact: {'; '.join(problems)}; "
                "put a good copy in place, or delete the folder to start anew"
            )
        return None

    def _prune(self, saved_step: int) -> None:
        """Removes all but the latest checkpoints, the best and the one just saved, which may be older than others."""
        try:
            records = [record for record in _records(self.folder) if record.step not in self._damaged]
            kept = [record for record in records if record.step == saved_step] + records[-self.keep :]
            scored = [record for record in records if record.score is not None]
            kept += sorted(scored, key=lambda record: (record.score, -record.step))[:1]
            self._remove_all_but({name for record in kept for name in (_json(record.step), record.file)})
        except StorageError as error:
            self.report(f"{error}; nothing was removed there")

    def _remove_leftovers(self) -> None:
        """Removes files that a killed process has left unfinished."""
        try:
            self.folder.remove_unfinished()
        except OSError as error:
            self.report(f"unfinished files in {self.folder.path!r} stay: {error}")
        steps = _steps(self.folder)
        self._remove_all_but({name for step in steps for name in (_json(step), *_files(step))})

    def _remove_all_but(self, kept: Collection[str]) -> None:
        matches = [_FILE_NAME.fullmatch(name) for name in self.folder.names() if name not in kept]
        retained = set()  # steps whose JSON file could not be removed, and still needs the file that it names
        for match in sorted(filter(None, matches), key=lambda match: not match[2]):
            if match[1] in retained:
                continue
            try:
                (self.folder / match[0]).remove_file()
            except StorageError as error:
                self.report(str(error))
                retained.add(match[1])


class _HashingWriter:
    """Writes a state to a stream, and counts and hashes its bytes."""

    def __init__(self, file: Writable) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()
        self._failure: BaseException | None = None

    def save(self, state: dict[str, Any]) -> None:
        try:
            torch.save(state, cast(BinaryIO, self))
        except BaseException as error:  # torch replaces the stream's own error by another one
            raise self._failure or error from None

    def write(self, data: bytes | memoryview) -> int:
        if self._failure is not None:  # torch continues to write after a failure
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
    """Returns the possible names of the file with the state of a step."""
    return f"step-{step:08d}.pt", f"step-{step:08d}.again.pt"


def _steps(folder: StoragePath) -> list[int]:
    matches = [_FILE_NAME.fullmatch(name) for name in folder.names()]
    return sorted(int(match[1]) for match in matches if match and match[2])


def _records(folder: StoragePath) -> list[_Record]:
    """Returns the records of the readable JSON files, oldest first."""
    records = []
    for step in _steps(folder):
        try:
            records.append(_record(folder, step))
        except _DamagedError:
            continue
    return records


def _record(folder: StoragePath, step: int) -> _Record:
    with _opened(folder / _json(step)) as file:
        text = file.read()
    try:
        values = {"file": _files(step)[0]} | json.loads(text)
        record = _Record(**{field.name: values[field.name] for field in dataclasses.fields(_Record)})
        consistent = record.step == step and record.file in _files(step)
        if consistent and (record.score is None or math.isfinite(record.score)):
            return record
    except (ValueError, TypeError, KeyError):
        pass
    raise _DamagedError(f"{(folder / _json(step)).path!r} is damaged (it describes no checkpoint)")


def _load(folder: StoragePath, record: _Record) -> dict[str, Any]:
    path = folder / record.file
    with _opened(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if file.tell() != record.bytes:
            raise _DamagedError(f"{path.path!r} is damaged ({file.tell()} bytes in place of {record.bytes})")
        if sha256 != record.sha256:
            raise _DamagedError(f"{path.path!r} is damaged (its SHA-256 is not the one that was written)")
        file.seek(0)
        try:
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # torch and pickle raise errors of many types
            if isinstance(error, OSError | MemoryError) or "DefaultCPUAllocator" in str(error):
                raise  # the file is not at fault
            raise _DamagedError(f"{path.path!r} is damaged ({_refusal(error)})") from error


@contextmanager
def _opened(path: StoragePath) -> Iterator[io.BufferedReader]:
    """Opens a file of a checkpoint; a missing file or a failing disk is damage, a failing network is not."""
    try:
        with path.open_seekable() as file:
            yield file
    except FileNotFoundError as error:
        raise _DamagedError(f"{path.path!r} is damaged (it is missing)") from error
    except OSError as error:
        if path.local and error.errno == errno.EIO:
            raise _DamagedError(f"{path.path!r} is damaged (the disk cannot read it)") from error
        raise StorageError(f"{path.path!r} cannot be read: {error}") from error


def _check_loadable(state: dict[str, Any], step: int) -> None:
    """Raises an error for a state that `torch.load` would refuse later; tensors are not examined."""
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
    """Returns the reason why `torch.load` failed, from its message of eleven lines."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds an object, {match[1]}, that is no plain value" if match else f"no state: {type(error).__name__}"
