"""Options of `alit train` beside the recipe."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alit.errors import ConfigError
from alit.model.config import Halting
from alit.training.recipes import Recipe, Stage, recipe_from


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """What `alit train` takes beside the recipe.

    Attributes:
        preset: the model where there is no --init, and the recipe's defaults.
        config: a TOML file with any of these options and of the recipe's fields; the command line wins.
        init: a weights folder to start from; distill needs a trained base, finetune distilled weights.
        validation: images to validate on; none when not given.
        validation_images: how many of them at most.
        image_column: the Parquet column with the images' bytes.
        halting: the dynamic halting mask of the weights to be; as it is when not given.
        criterion: the default criterion of the weights to be.
        half: store the weights in float16.
        workers: how many train together: a number, or a range such as 1:4 to take as many as there is room for.
        threads: CPU threads, and logical CPUs, per worker; all of a machine's CPUs shared out when not given.
        gpus: whether each takes a GPU; auto goes by whether the cluster has any now, which one that scales up may not.
        labels: where workers run, by the nodes' labels, such as --labels tier=gpu.
        patience: seconds to wait for a cluster to have room for the fewest workers.
        vgg: VGG16 in torchvision's layout, for the perceptual loss.
        lpips: the heads of LPIPS for VGG, for the same.
        ray: train on Ray; with --no-ray in this process alone.
        dry_run: print the plan, the parameters and the memory, and stop.
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


def defaults(stage: Stage, preset: str | None, config: Path | None) -> tuple[TrainOptions, Recipe]:
    """Options and recipe before the command line's own: the preset's, changed by the TOML file's.

    Raises:
        ConfigError: the file cannot be read, or has an unknown field or an impossible value.
    """
    changes: dict[str, Any] = {}
    if config is not None:
        try:
            changes = tomllib.loads(config.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--config {str(config)!r} cannot be read as TOML: {error}") from error
    known = {field.name: field for field in dataclasses.fields(TrainOptions)}
    given: dict[str, Any] = {name: changes.pop(name) for name in list(changes) if name in known}
    for name, value in given.items():
        wanted = _KINDS.get(name, bool if isinstance(known[name].default, bool) else str)
        if type(value) is not wanted:
            raise ConfigError(f"--config: {name} must be {wanted.__name__}, got {value!r}")
        if name == "gpus" and value not in ("auto", "on", "off"):
            raise ConfigError(f"--config: gpus must be auto, on or off, got {value!r}")
        if wanted is list:
            given[name] = tuple(map(str, value))
        if name in ("vgg", "lpips"):
            given[name] = Path(str(value))
    if preset is not None:
        given["preset"] = preset
    options = dataclasses.replace(TrainOptions(config=config), **given)
    return options, recipe_from(stage, options.preset, changes)


COUNTS = ("validation_images", "threads")


_KINDS = dict.fromkeys(COUNTS, int) | {"labels": list, "patience": float}
