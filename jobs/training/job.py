"""`alit train`: reads and checks everything once, says what it will do, and starts the workers."""

from __future__ import annotations

import dataclasses

import torch
from rich.console import Console

from alit.encoding.criteria import parse
from alit.errors import ConfigError
from alit.metrics.lpips import Perceptual
from alit.model.presets import PRESETS
from alit.tokenizer import Alit
from alit.training.cost import Cost, cost
from alit.training.initialization import initialize_locally
from alit.training.recipes import AdversarialRecipe, DistillRecipe, Recipe, Stage
from alit.weights import Weights
from jobs.runtime.placement import parse_labels
from jobs.runtime.process import local_cpus
from jobs.runtime.weights import load
from jobs.storage.path import parse_uri
from jobs.training.feed import make_feed, read_validation_images
from jobs.training.options import COUNTS, TrainOptions
from jobs.training.progress import TrainingProgress
from jobs.training.ray_train import Placement, train_on_ray
from jobs.training.run_folder import RunSettings
from jobs.training.worker import TrainSpec, train_locally


def train_stage(
    stage: Stage, data: str, run: str, recipe: Recipe, options: TrainOptions, console: Console | None = None
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
                labels=parse_labels("--labels", options.labels),
                patience=options.patience,
            )
            train_on_ray(start, where, tell=progress.tell)
        else:
            train_locally(start, tell=progress.tell)


def prepare(
    stage: Stage, data: str, run: str, recipe: Recipe, options: TrainOptions, console: Console
) -> tuple[TrainSpec, list[str]]:
    """Reads and checks everything, and writes nothing: what workers need, and the plan in words."""
    low, high = parse_workers(options.workers)
    _require_shares(recipe.batch_size, low, high)
    if options.criterion is not None:
        parse(options.criterion)  # before hours of training, not after
    if not options.ray and (low, high) != (1, 1):
        raise ConfigError(f"--no-ray trains with one worker, got --workers {options.workers}")
    for name in COUNTS:
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    folder = parse_uri(run)
    folder.names()  # a place without permission is told of now, not by a worker
    model, source = _model(stage, recipe, options)
    size, column = model.config.image_size, options.image_column
    feed = make_feed(data, size=size, batch_size=recipe.batch_size, seed=recipe.seed, image_column=column)
    shown = None
    if options.validation and not options.dry_run:
        shown = read_validation_images(
            options.validation, size=size, limit=options.validation_images, image_column=column
        )
    expected = cost(model.config, recipe)
    alone = torch.cuda.is_available() and options.ray  # one process per GPU, and others that decode
    settings = RunSettings(
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
    start = TrainSpec(
        settings=settings,
        folder=folder,
        model=model,
        perceptual=_perceptual(recipe, options, console),
        feed=feed,
        validation_images=shown,
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


def _model(stage: Stage, recipe: Recipe, options: TrainOptions) -> tuple[Alit, Weights | None]:
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


def _perceptual(recipe: Recipe, options: TrainOptions, console: Console) -> Perceptual | None:
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


def plan_lines(start: TrainSpec, expected: Cost, workers: str) -> list[str]:
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
