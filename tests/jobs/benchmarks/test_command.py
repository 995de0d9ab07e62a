"""The command `alit benchmark` and its sub-commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import cli
from jobs.benchmarks.options import EncodeBenchmarkOptions, TokenizeBenchmarkOptions, TrainBenchmarkOptions

INVOCATIONS = (
    ("encode", "encoding", ["--batch-size", "8"], EncodeBenchmarkOptions(batch_size=8)),
    (
        "tokenize",
        "tokenization",
        ["--rounds", "2", "--rates", "rates.json"],
        TokenizeBenchmarkOptions(rounds=2, rates=Path("rates.json")),
    ),
    (
        "train",
        "training",
        ["--stage", "base", "--steps", "90", "--threads", "1"],
        TrainBenchmarkOptions(stage="base", steps=90, threads=1),
    ),
)


@pytest.mark.parametrize(("name", "module", "arguments", "options"), INVOCATIONS)
def test_benchmark_passes_options_to_the_job(name, module, arguments, options, monkeypatch):
    """Each sub-command parses its options into its dataclass and hands them over with the input."""
    calls = []
    monkeypatch.setattr(f"jobs.benchmarks.{module}.benchmark_{name}", lambda *given: calls.append(given[:2]))
    cli.main(["benchmark", name, "photos", *arguments])
    assert calls == [("photos", options)]


def test_benchmark_help_has_only_own_options(capsys):
    """The help of a sub-command lists its own options and none of the others'."""
    own = {"encode": "--batch-size", "tokenize": "--rows-per-file", "train": "--preset"}
    for name in own:
        with pytest.raises(SystemExit) as stop:
            cli.main(["benchmark", name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert f"usage: alit benchmark {name}" in text
        assert own[name] in text
        assert "--rows-per-file" not in text or name == "tokenize"
        assert "--preset" not in text or name == "train"
        assert "--criterion" not in text or name != "train"


def test_benchmark_refuses_options_of_another_benchmark():
    """An option that has no effect on a benchmark is not accepted by it."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["benchmark", "encode", "photos", "--steps", "3"])
    assert stop.value.code == 2
