"""The `alit` command: one sub-command per job. Heavy imports wait for the job, so that help answers at once."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

if __name__ == "__main__":  # run by path: Python has put jobs/ first on the path instead of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alit.errors import AlitError
from jobs.benchmarks.command import benchmark
from jobs.convert import convert
from jobs.dataset.command import verify
from jobs.evaluation.command import evaluate
from jobs.gallery.command import show
from jobs.submission.command import run_submit, submit
from jobs.tokenization.command import estimate, tokenize
from jobs.training.command import train_command


def serve(
    *,
    config: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    keys_file: str | None = None,
    weights: dict[str, str] | None = None,
) -> None:
    """Serve online encoding over HTTP, with a playground in the browser.

    Logs when ready; shuts down gracefully on Ctrl-C and SIGTERM; reloads its settings on SIGHUP. `/openapi.json`
    describes the API.

    Example: alit serve --port 8000, then open http://127.0.0.1:8000/

    Args:
        config: A YAML file of settings, see cluster/serve.yaml; options given here take precedence.
        host: Address to listen on; a public address requires keys.
        port: Port to listen on; 8000 by default.
        keys_file: API keys, one name:key per line.
        weights: Weights folders by name, such as --weights small runs/small/weights; the packaged weights by default.
    """
    from serve.local import run

    run(config, {"host": host, "port": port, "keys_file": keys_file, "models": weights})


def demo(folder: Positional[Annotated[str, arg(metavar="[FOLDER]")]] = "demo", /) -> None:
    """Tokenize the photographs in scikit-image's package and create an HTML page of the results.

    Args:
        folder: The folder for photographs, tokens and index.html.
    """
    from rich.console import Console

    from jobs.demo import demo as run

    run(Path(folder), Console(stderr=True))


def commands(arguments: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Returns the sub-commands by name.

    Args:
        arguments: The command line, which the defaults of `train` depend on.

    Raises:
        AlitError: The defaults cannot be determined.
    """
    return {
        "tokenize": tokenize,
        "verify": verify,
        "show": show,
        "convert": convert,
        "train": train_command(arguments),
        "evaluate": evaluate,
        "benchmark": benchmark,
        "estimate": estimate,
        "submit": submit,
        "serve": serve,
        "demo": demo,
    }


COMMANDS = tuple(commands([]))
"""The names of the sub-commands."""

NOT_SUBMITTED = ("submit", "serve", "demo")
"""Commands that run on this machine only."""

RENAMED = {"plan": "estimate"}
"""Former names of commands, which are still accepted."""


def _with_current_name(arguments: list[str]) -> list[str]:
    """Replaces the former name of a command, submitted or not, with a notice on stderr."""
    submitted = arguments[:1] == ["submit"]
    for index, word in enumerate(arguments):
        if word in RENAMED:
            print(f"alit: `alit {word}` is now called `alit {RENAMED[word]}`", file=sys.stderr)
            return [*arguments[:index], RENAMED[word], *arguments[index + 1 :]]
        if not submitted or (index and word in COMMANDS):
            break
    return arguments


def main(arguments: list[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: The command line without the program's name; that of this process by default.

    Raises:
        SystemExit: With code 2 and one sentence on stderr for a user error, 130 for Ctrl-C and 143 for SIGTERM.
    """
    importlib.import_module("serve")  # ours, before the working folder below could provide one of the same name
    sys.path.append(os.getcwd())  # for a criterion's package.module; last, so that it shadows nothing
    arguments = _with_current_name(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["submit"]:
            run_submit(arguments[1:], [name for name in COMMANDS if name not in NOT_SUBMITTED])
            return
        tyro.extras.subcommand_cli_from_dict(
            commands(arguments),
            args=arguments,
            prog="alit",
            description="Images into adaptive-length token datasets, and back.",
        )
    except AlitError as error:
        print(f"alit: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:
            print("alit: stopped; run the same command again to resume", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("alit: interrupted; run the same command again to resume tokenize or train", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
