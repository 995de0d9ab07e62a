"""The command `alit train`, with a sub-command per stage."""

# Annotations are evaluated at once, not postponed: those of `train` refer to local variables.

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg, subcommand

from alit.training.recipes import BaseRecipe, DistillRecipe, FinetuneRecipe, Recipe, Stage
from jobs.training.options import DefaultsOptions, TrainOptions, stage_defaults

Source = Positional[Annotated[str, arg(metavar="INPUT", help="Images, as for tokenize.")]]
RunPath = Positional[Annotated[str, arg(metavar="RUN", help="The run's folder, local or s3://.")]]
Options = Annotated[TrainOptions, arg(name="")]


def base(data: Source, run: RunPath, /, *, recipe: Annotated[BaseRecipe, arg(name="")], options: Options) -> None:
    """Train the base tokenizer from pixels: L1, codes, and optionally LPIPS and a discriminator.

    The same command again resumes from the run's newest checkpoint.

    Example: alit train base photos/ runs/base
    """
    _train("base", data, run, recipe, options)


def distill(data: Source, run: RunPath, /, *, recipe: Annotated[DistillRecipe, arg(name="")], options: Options) -> None:
    """Distill a frozen base's tokens into latent tokens, whose number grows with each iteration.

    The same command again resumes from the run's newest checkpoint.

    Example: alit train distill photos/ runs/distill --init runs/base/weights
    """
    _train("distill", data, run, recipe, options)


def finetune(
    data: Source, run: RunPath, /, *, recipe: Annotated[FinetuneRecipe, arg(name="")], options: Options
) -> None:
    """Finetune all parameters on pixels, one length per step.

    The same command again resumes from the run's newest checkpoint.

    Example: alit train finetune photos/ runs/finetune --init runs/distill/weights
    """
    _train("finetune", data, run, recipe, options)


def _train(stage: Stage, data: str, run: str, recipe: Recipe, options: TrainOptions) -> None:
    from jobs.training.job import train_stage

    train_stage(stage, data, run, recipe, options)


def train_command(arguments: Sequence[str]) -> Callable[..., None]:
    """Returns the command `alit train`; the defaults of its options depend on --preset and --config.

    Args:
        arguments: The command line, starting with the name of the command.

    Raises:
        ConfigError: The preset is unknown, or the file cannot be read or has an invalid field.
    """

    def stage(name: Stage, command: Callable[..., None]) -> Callable[..., None]:
        chosen = list(arguments[:2]) == ["train", name]  # the fields of a file are those of one stage
        defaults = stage_defaults(name, _defaults_options(arguments[2:]) if chosen else DefaultsOptions())
        return partial(command, recipe=defaults.recipe, options=defaults.options)

    def train(
        *,
        command: Annotated[
            Annotated[None, subcommand("base", constructor=stage("base", base), prefix_name=False)]
            | Annotated[None, subcommand("distill", constructor=stage("distill", distill), prefix_name=False)]
            | Annotated[None, subcommand("finetune", constructor=stage("finetune", finetune), prefix_name=False)],
            arg(name=""),
        ],
    ) -> None:
        """Train your own weights in three stages: `alit train base`, then `distill`, then `finetune`.

        Each stage has its own --help.

        Example: alit train base photos/ runs/base
        """

    return train


def _defaults_options(arguments: Sequence[str]) -> DefaultsOptions:
    """Returns --preset and --config, which determine the defaults, before the command line is parsed as a whole.

    Every other word, and an option without its value, is left to the parser of the whole command line.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--config", nargs="?", type=Path)
    known, _ = parser.parse_known_args(list(arguments))
    return DefaultsOptions(preset=known.preset, config=known.config)
