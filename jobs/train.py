"""`alit train`: reads and checks everything once, says what it will do, and starts the workers."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from alit.config import PRESETS, Halting
from alit.cost import Cost, cost
from alit.errors import ConfigError
from alit.initialization import initialize_locally
from alit.perceptual import Perceptual
from alit.recipe import AdversarialRecipe, DistillRecipe, Recipe, Stage, recipe_from
from alit.selection import parse
from alit.tokenizer import Alit
from alit.weights import Weights
from jobs.feed import held_out, make_feed
from jobs.options import labels
from jobs.progress import TrainingProgress
from jobs.run import Settings
from jobs.runner import local_cpus
from jobs.storage import place
from jobs.weights import load
from jobs.workers import Placement, Start, train_here, train_on_ray


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
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


def defaults(stage: Stage, preset: str | None, config: Path | None) -> tuple[Options, Recipe]:
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
    known = {field.name: field for field in dataclasses.fields(Options)}
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
    options = dataclasses.replace(Options(config=config), **given)
    return options, recipe_from(stage, options.preset, changes)


_COUNTS = ("validation_images", "threads")
_KINDS = dict.fromkeys(_COUNTS, int) | {"labels": list, "patience": float}


def train_stage(
    stage: Stage, data: str, run: str, recipe: Recipe, options: Options, console: Console | None = None
) -> None:
    """Trains one stage on the images of `data`, in the folder `run`.

    Raises:
        AlitError: whatever a person can put right.
    """
    console = console or Console(stderr=True)
    with console.status("reading the input, and working out what the run will cost"):
        start, lines = prepare(stage, data, run, recipe, options, console)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if options.dry_run:
        return
    with TrainingProgress(console) as progress:
        if options.ray:
            where = Placement(
                workers=parse_workers(options.workers),
                gpus=None if options.gpus == "auto" else options.gpus == "on",
                labels=labels("--labels", options.labels),
                patience=options.patience,
            )
            train_on_ray(start, where, tell=progress.tell)
        else:
            train_here(start, tell=progress.tell)


def prepare(
    stage: Stage, data: str, run: str, recipe: Recipe, options: Options, console: Console
) -> tuple[Start, list[str]]:
    """Reads and checks everything, and writes nothing: what workers need, and the plan in words."""
    low, high = parse_workers(options.workers)
    _require_shares(recipe.batch_size, low, high)
    if options.criterion is not None:
        parse(options.criterion)  # before hours of training, not after
    if not options.ray and (low, high) != (1, 1):
        raise ConfigError(f"--no-ray trains with one worker, got --workers {options.workers}")
    for name in _COUNTS:
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    folder = place(run)
    folder.names()  # a place without permission is told of now, not by a worker
    model, source = _model(stage, recipe, options)
    size, column = model.config.image_size, options.image_column
    feed = make_feed(data, size=size, batch_size=recipe.batch_size, seed=recipe.seed, image_column=column)
    shown = None
    if options.validation and not options.dry_run:
        shown = held_out(options.validation, size=size, most=options.validation_images, image_column=column)
    expected = cost(model.config, recipe)
    alone = torch.cuda.is_available() and options.ray  # one process per GPU, and others that decode
    settings = Settings(
        stage=stage,
        recipe=recipe,
        preset=options.preset,
        data=data,
        validation=options.validation,
        init=options.init,
        init_fingerprint=source.fingerprint if source else None,
        criterion=options.criterion,
        half=options.half,
        photographs=feed.plan.images,
    )
    start = Start(
        settings=settings,
        folder=folder,
        model=model,
        perceptual=_perceptual(recipe, options, console),
        feed=feed,
        held_out=shown,
        flops=expected.flops,
        threads=options.threads or (1 if alone else max(1, local_cpus() // high)),
    )
    return start, plan_lines(start, expected, options.workers)


def parse_workers(text: str) -> tuple[int, int]:
    """`4` as (4, 4), `1:4` as (1, 4).

    Raises:
        ConfigError: neither of them, or fewer than one.
    """
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise ConfigError(f"--workers must be a number from 1, or a range such as 1:4, got {text!r}")
    return found


def _require_shares(batch_size: int, low: int, high: int) -> None:
    for count in range(low, high + 1):
        if batch_size % count:
            raise ConfigError(
                f"--batch-size {batch_size} cannot be shared equally by {count} workers; choose a multiple of every "
                f"number of workers from {low} to {high}"
            )


def _model(stage: Stage, recipe: Recipe, options: Options) -> tuple[Alit, Weights | None]:
    """The model with its initial values, and the weights they came from."""
    preset, init = options.preset, options.init
    if preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if stage != "base" and init is None:
        before = "a trained base" if stage == "distill" else "distilled weights"
        raise ConfigError(f"{stage} stands on {before}: name the weights folder with --init")
    source = load(init) if init is not None else None
    given = source.provenance.get("stage") if source else None
    if stage == "finetune" and given == "base":
        raise ConfigError(f"finetune stands on distilled weights, and {init!r} holds a base: distill it first")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        config = source.model.config if source else PRESETS[preset]()
        changed = dataclasses.replace(config, halting=options.halting or config.halting)
        model = Alit(changed)
    if source is not None:
        model.load_state_dict(source.model.state_dict())
    if isinstance(recipe, DistillRecipe) and recipe.local_start and given == "base":
        initialize_locally(model, torch.Generator().manual_seed(recipe.seed))
    return model, source


def _perceptual(recipe: Recipe, options: Options, console: Console) -> Perceptual | None:
    vgg, lpips = options.vgg, options.lpips
    if not isinstance(recipe, AdversarialRecipe):
        return None
    if vgg is None and lpips is None:
        if recipe.perceptual_weight:
            console.print("no --vgg and --lpips files: training goes on without the perceptual loss")
        return None
    if vgg is None or lpips is None:
        raise ConfigError(f"the perceptual loss needs both files, --vgg and --lpips; got {vgg or lpips} alone")
    return Perceptual.from_files(vgg, lpips)


def plan_lines(start: Start, expected: Cost, workers: str) -> list[str]:
    """What is about to be done, for a person."""
    settings, recipe, feed = start.settings, start.settings.recipe, start.feed
    share = recipe.batch_size // parse_workers(workers)[0] // recipe.accumulate or 1
    state = expected.state_bytes / (parse_workers(workers)[0] if recipe.sharding == "fsdp" else 1)
    memory = state + share * expected.activation_bytes
    config = start.model.config
    return [
        f"{settings.stage}: {config.image_size} px, {config.lengths[0]} to {config.lengths[-1]} tokens, "
        f"{expected.trained / 1e6:.2f} M parameters trained, {expected.frozen / 1e6:.2f} M frozen"
        + (f", discriminator {expected.discriminator / 1e6:.2f} M" if expected.discriminator else ""),
        f"{feed.plan.images} photographs; {recipe.steps} steps of {recipe.batch_size} are "
        f"{recipe.steps / feed.steps_per_epoch:.1f} epochs; {workers} worker(s), {recipe.sharding}, "
        f"{start.threads} CPU thread(s) each",
        f"memory per worker: {state / 2**30:.2f} GiB of state, at most {memory / 2**30:.2f} GiB with the activations "
        f"of {share} images in fp32; {expected.flops / 1e9:.1f} GFLOP per image",
        f"run: {start.folder.path}",
    ]
