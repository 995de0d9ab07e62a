"""The command `alit train`, with a sub-command per stage."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg


def train(*arguments: str) -> None:
    """Train your own weights in three stages: `alit train base`, then `distill`, then `finetune`; see their --help."""
    raise AssertionError(f"main sends {arguments} to the stages")


def train_commands(arguments: list[str]) -> dict[str, Callable[..., Any]]:
    """The stages as commands, whose defaults are those of the --preset and --config among the arguments."""
    from alit.training.recipes import RECIPES
    from jobs.training.options import TrainOptions, defaults

    known = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--preset")
    known.add_argument("--config", type=Path)
    given, _ = known.parse_known_args(arguments)
    about = {
        "base": "Train the base tokenizer from pixels: L1, codes, and where asked LPIPS and a discriminator.",
        "distill": "Distil a frozen base's tokens into latent tokens, more with each iteration.",
        "finetune": "Train everything on the pixels, each length in turn.",
    }

    def command(stage: Any, kind: type) -> Callable[..., Any]:
        chosen = stage in arguments[:1]  # a file's fields are those of one stage
        options_default, recipe_default = defaults(stage, *((given.preset, given.config) if chosen else (None, None)))

        def run(data: str, run: str, /, *, recipe: Any = recipe_default, options: Any = options_default) -> None:
            from jobs.training.job import train_stage

            train_stage(stage, data, run, recipe, options)

        run.__annotations__ = {
            "data": Positional[Annotated[str, arg(metavar="INPUT", help="Images, as for tokenize.")]],
            "run": Positional[Annotated[str, arg(metavar="RUN", help="The run's folder, local or s3://.")]],
            "recipe": Annotated[kind, arg(name="")],
            "options": Annotated[TrainOptions, arg(name="")],
            "return": None,
        }
        run.__doc__ = (
            f"{about[stage]}\n\nThe same command again goes on from the run's newest checkpoint.\n\n"
            f"Example: alit train {stage} photos/ runs/{stage}"
            + ("" if stage == "base" else f" --init runs/{'base' if stage == 'distill' else 'distill'}/weights")
        )
        return run

    return {stage: command(stage, kind) for stage, kind in RECIPES.items()}
