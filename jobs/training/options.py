"""Options of `alit train` other than the recipe."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from alit.errors import ConfigError
from alit.model.config import Halting
from alit.training.recipes import Recipe, Stage, recipe_from


@dataclass(frozen=True, kw_only=True, slots=True)
class DefaultsOptions:
    """The options that determine the defaults of all others.

    Attributes:
        preset: The model's preset, which also determines the recipe's defaults.
        config: A TOML file of options and of fields of the recipe.
    """

    preset: str | None = None
    config: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Options of `alit train` that are not hyperparameters.

    Attributes:
        preset: The model's preset, unless --init is given, and the recipe's defaults.
        config: A TOML file with any of these options and of the recipe's fields; the command line takes precedence.
        init: A weights folder to start from; distill needs a trained base, finetune distilled weights.
        validation: Images to validate on; no validation when not given.
        validation_images: Maximum number of validation images.
        image_column: The Parquet column with the images' bytes.
        halting: Dynamic halting mask of the exported weights; unchanged when not given.
        criterion: Default criterion of the exported weights; unchanged when not given.
        half: Store the weights in float16.
        workers: Number of workers that train together, or a range such as 1:4 for as many as there is room for.
        threads: CPU threads, and logical CPUs, per worker; a machine's CPUs are divided equally when not given.
        gpus: Whether each worker takes a GPU; auto decides by whether the cluster has a GPU now, which a cluster that
            scales up may not have yet.
        labels: Labels of the nodes that workers run on, such as --labels tier=gpu.
        patience: Seconds to wait for a cluster to have room for the smallest number of workers.
        vgg: VGG16 in torchvision's layout, for the perceptual loss.
        lpips: The heads of LPIPS for VGG, for the perceptual loss.
        ray: Train on Ray; --no-ray trains in this process alone.
        dry_run: Print the plan, the number of parameters and the memory, and stop.
    """

    preset: str = "nano"
    config: Path | None = None
    init: str | None = None
    validation: str | None = None
    validation_images: int = 512
    image_column: str = "image"
    halting: Halting | None = None
    criterion: str | None = None
    half: bool = False
    workers: str = "1"
    threads: int | None = None
    gpus: Literal["auto", "on", "off"] = "auto"
    labels: tuple[str, ...] = ()
    patience: float = 600
    vgg: Path | None = None
    lpips: Path | None = None
    ray: bool = True
    dry_run: bool = False


COUNTS = ("validation_images", "threads")
"""Options that are numbers of something, from 1."""

_TOML_TYPES: dict[str, type] = dict.fromkeys(COUNTS, int) | {"labels": list, "patience": float}
"""Types of options in a TOML file that are neither booleans nor strings."""


class StageDefaults(NamedTuple):
    """The values of a stage's options where the command line has none."""

    options: TrainOptions
    recipe: Recipe


def stage_defaults(stage: Stage, source: DefaultsOptions) -> StageDefaults:
    """Returns the preset's defaults, changed by the TOML file.

    Args:
        stage: The training stage.
        source: The preset and the TOML file of the command line; the file may name the preset instead.

    Raises:
        ConfigError: The preset does not exist, or the file cannot be read or has an unknown field or an invalid value.
    """
    changes: dict[str, Any] = {}
    if source.config is not None:
        try:
            changes = tomllib.loads(source.config.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--config {str(source.config)!r} cannot be read as TOML: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(TrainOptions)}
    names = [name for name in changes if name in fields]
    values = {name: _option_from_toml(fields[name], changes.pop(name)) for name in names}
    if source.preset is not None:
        values["preset"] = source.preset
    options = dataclasses.replace(TrainOptions(config=source.config), **values)
    return StageDefaults(options, recipe_from(stage, options.preset, changes))


def _option_from_toml(field: dataclasses.Field[Any], value: Any) -> Any:
    """Checks the type of an option's value from a TOML file, and converts it to the option's own."""
    expected = _TOML_TYPES.get(field.name, bool if isinstance(field.default, bool) else str)
    if type(value) is not expected:
        raise ConfigError(f"--config: {field.name} must be {expected.__name__}, got {value!r}")
    if field.name == "gpus" and value not in ("auto", "on", "off"):
        raise ConfigError(f"--config: gpus must be auto, on or off, got {value!r}")
    if isinstance(value, list):
        return tuple(map(str, value))
    return Path(value) if field.name in ("vgg", "lpips") else value
