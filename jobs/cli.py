"""The `alit` command: one subcommand per job. Heavy imports wait for the job, so that help answers at once."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from alit.errors import AlitError
from jobs.benchmarks.command import benchmark
from jobs.convert import convert
from jobs.dataset.command import verify
from jobs.evaluation.command import evaluate
from jobs.gallery.command import show
from jobs.submission.command import run_submit, submit
from jobs.tokenization.command import plan, tokenize
from jobs.training.command import train, train_commands


def serve(
    *,
    config: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    keys_file: str | None = None,
    weights: dict[str, str] | None = None,
) -> None:
    """Serve online encoding over HTTP, with a playground to look at.

    Ready when it says so; ends, finishing what is under way, on Ctrl-C or SIGTERM; reads its settings again on SIGHUP.
    `/openapi.json` describes the API.

    Example: alit serve --port 8000, then open http://127.0.0.1:8000/

    Args:
        config: A YAML file of settings, see cluster/serve.yaml; the options here win.
        host: Where to listen; anywhere but on this machine only with keys.
        port: 8000 when not given.
        keys_file: API keys, one name:key per line.
        weights: Weights folders by name, such as --weights small runs/small/weights; the packaged one when not given.
    """
    from serve.local import run

    run(config, {"host": host, "port": port, "keys_file": keys_file, "models": weights})


def demo(folder: Positional[Annotated[str, arg(metavar="[FOLDER]")]] = "demo", /) -> None:
    """Tokenize the photographs of scikit-image's package and draw a page of them.

    Args:
        folder: Receives photographs, tokens and index.html.
    """
    from rich.console import Console

    from jobs.demo import demo as run

    run(Path(folder), Console(stderr=True))


COMMANDS: dict[str, Callable[..., Any]] = {
    "tokenize": tokenize,
    "verify": verify,
    "show": show,
    "convert": convert,
    "train": train,
    "evaluate": evaluate,
    "benchmark": benchmark,
    "plan": plan,
    "submit": submit,
    "serve": serve,
    "demo": demo,
}


NOT_SUBMITTED = ("submit", "serve", "demo")
"""Commands that run on this machine only."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; what a person can put right is one sentence on stderr and exit code 2."""
    importlib.import_module("serve")  # ours, before a folder of this name in the working folder could be taken for it
    sys.path.append(os.getcwd())  # where a criterion's package.module may lie; last, so that it hides nothing
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["submit"]:
            run_submit(arguments[1:], [name for name in COMMANDS if name not in NOT_SUBMITTED])
            return
        if arguments[:1] == ["train"]:
            tyro.extras.subcommand_cli_from_dict(
                train_commands(arguments[1:]), args=arguments[1:], prog="alit train", description=train.__doc__
            )
            return
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=arguments, prog="alit", description="Images into adaptive-length token datasets, and back."
        )
    except AlitError as error:
        print(f"alit: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:
            print("alit: stopped; the same command goes on", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("alit: interrupted; tokenize and train go on when the same command is given again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
