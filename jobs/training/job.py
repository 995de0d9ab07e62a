"""The driver of `alit train`: checks everything once, prints the plan, and starts the workers."""

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
from alit.validation import option, require, require_range
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
    """Trains one stage, or with `dry_run` only prints the plan.

    Args:
        stage: The training stage.
        data: INPUT of `alit train`.
        run: RUN of `alit train`, the run folder.
        recipe: The hyperparameters.
        options: The other options of `alit train`.
        console: Receives the plan and the progress; stderr by default.

    Raises:
        AlitError: The input, the weights, the run folder or an option cannot be used, or training fails.
    """
    console = console or Console(stderr=True)
    with console.status("reading the input and computing the cost of the run"):
        spec, lines = prepare(stage, data, run, recipe, options, console)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if options.dry_run:
        return
    with TrainingProgress(console) as progress:
        if options.ray:
            placement = Placement(
                workers=parse_workers(options.workers),
                gpus=None if options.gpus == "auto" else options.gpus == "on",
                labels=parse_labels("--labels", options.labels),
                patience=options.patience,
            )
            train_on_ray(spec, placement, on_event=progress.on_event)
        else:
            train_locally(spec, on_event=progress.on_event)


def prepare(
    stage: Stage, data: str, run: str, recipe: Recipe, options: TrainOptions, console: Console
) -> tuple[TrainSpec, list[str]]:
    """Reads the inputs and checks everything, without writing anything.

    Args:
        stage: The training stage.
        data: INPUT of `alit train`.
        run: RUN of `alit train`, the run folder.
        recipe: The hyperparameters.
        options: The other options of `alit train`.
        console: Receives notices.

    Returns:
        What the workers need, and the plan as lines of text.

    Raises:
        AlitError: The input, the weights, the run folder or an option cannot be used.
    """
    max_workers = _check_options(recipe, options)
    folder = parse_uri(run)
    folder.names()  # missing permissions are reported now, not by a worker
    model, source = _model(stage, recipe, options)
    size, column = model.config.image_size, options.image_column
    feed = make_feed(data, size=size, batch_size=recipe.batch_size, seed=recipe.seed, image_column=column)
    validation_images = None
    if options.validation and not options.dry_run:
        limit = options.validation_images
        validation_images = read_validation_images(options.validation, size=size, limit=limit, image_column=column)
    expected = cost(model.config, recipe)
    gpu_worker = torch.cuda.is_available() and options.ray  # images are decoded by other processes
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
    spec = TrainSpec(
        settings=settings,
        folder=folder,
        model=model,
        perceptual=_perceptual(recipe, options, console),
        feed=feed,
        validation_images=validation_images,
        flops=expected.flops,
        threads=options.threads or (1 if gpu_worker else max(1, local_cpus() // max_workers)),
    )
    return spec, plan_lines(spec, expected, options.workers)


def parse_workers(text: str) -> tuple[int, int]:
    """Parses a number of workers: `4` is (4, 4), `1:4` is (1, 4).

    Raises:
        ConfigError: The text is neither a number nor a range, or names fewer than one worker.
    """
    low, _, high = text.partition(":")
    try:
        workers = int(low), int(high or low)
    except ValueError:
        workers = (0, 0)
    if not 1 <= workers[0] <= workers[1]:
        raise ConfigError(f"--workers must be a number from 1, or a range such as 1:4, got {text!r}")
    return workers


def _check_options(recipe: Recipe, options: TrainOptions) -> int:
    """Checks the options that need no input; returns the largest number of workers."""
    low, high = parse_workers(options.workers)
    for count in range(low, high + 1):
        require(
            recipe.batch_size % count == 0,
            f"--batch-size {recipe.batch_size} cannot be shared equally by {count} workers; choose a multiple of every "
            f"number of workers from {low} to {high}",
            ConfigError,
        )
    if options.criterion is not None:
        parse(options.criterion)  # an invalid one is reported before hours of training, not after
    if not options.ray and (low, high) != (1, 1):
        raise ConfigError(f"--no-ray trains with one worker, got --workers {options.workers}")
    for name in COUNTS:
        require_range(option(name), getattr(options, name), 1, error=ConfigError)
    return high


def _model(stage: Stage, recipe: Recipe, options: TrainOptions) -> tuple[Alit, Weights | None]:
    """Returns the model with its initial values, and the weights that they come from, if any."""
    preset, init = options.preset, options.init
    if preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if stage != "base" and init is None:
        required = "a trained base" if stage == "distill" else "distilled weights"
        raise ConfigError(f"{stage} starts from {required}: name the weights folder with --init")
    source = load(init) if init is not None else None
    source_stage = source.provenance.get("stage") if source else None
    if stage == "finetune" and source_stage == "base":
        raise ConfigError(f"finetune starts from distilled weights, and {init!r} holds a base: distill it first")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        config = source.model.config if source else PRESETS[preset]()
        model = Alit(dataclasses.replace(config, halting=options.halting or config.halting))
    if source is not None:
        model.load_state_dict(source.model.state_dict())
    if isinstance(recipe, DistillRecipe) and recipe.local_start and source_stage == "base":
        initialize_locally(model, torch.Generator().manual_seed(recipe.seed))
    return model, source


def _perceptual(recipe: Recipe, options: TrainOptions, console: Console) -> Perceptual | None:
    """Returns LPIPS, if the recipe uses it and its files are given."""
    vgg, lpips = options.vgg, options.lpips
    if not isinstance(recipe, AdversarialRecipe):
        return None
    if vgg is None and lpips is None:
        if recipe.perceptual_weight:
            console.print("no --vgg and --lpips files: training without the perceptual loss")
        return None
    if vgg is None or lpips is None:
        raise ConfigError(f"the perceptual loss needs both files, --vgg and --lpips; got {vgg or lpips} alone")
    return Perceptual.from_files(vgg, lpips)


def plan_lines(spec: TrainSpec, expected: Cost, workers: str) -> list[str]:
    """Returns the plan of a run as lines of text.

    Args:
        spec: The run.
        expected: Its cost.
        workers: The option `--workers`; the memory is that of the smallest number.
    """
    settings, recipe, feed = spec.settings, spec.settings.recipe, spec.feed
    low, _ = parse_workers(workers)
    share = recipe.batch_size // low // recipe.accumulate or 1
    state = expected.state_bytes / (low if recipe.sharding == "fsdp" else 1)
    memory = state + share * expected.activation_bytes
    config = spec.model.config
    return [
        f"{settings.stage}: {config.image_size} px, {config.lengths[0]} to {config.lengths[-1]} tokens, "
        f"{expected.trained / 1e6:.2f} M parameters trained, {expected.frozen / 1e6:.2f} M frozen"
        + (f", discriminator {expected.discriminator / 1e6:.2f} M" if expected.discriminator else ""),
        f"{feed.plan.images} images; {recipe.steps} steps of {recipe.batch_size} are "
        f"{recipe.steps / feed.steps_per_epoch:.1f} epochs; {workers} worker(s), {recipe.sharding}, "
        f"{spec.threads} CPU thread(s) each",
        f"memory per worker: {state / 2**30:.2f} GiB of state, at most {memory / 2**30:.2f} GiB with the activations "
        f"of {share} images in fp32; {expected.flops / 1e9:.1f} GFLOP per image",
        f"run: {spec.folder.path}",
    ]
