"""The `alit` command: one subcommand per job. Heavy imports wait for the job, so that help answers at once."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from alit.errors import AlitError
from jobs.options import CRITERION_HELP, INPUT_HELP, SubmitOptions, TokenizeOptions
from jobs.sizing import PlanOptions

TOKENIZE_DEFAULTS = TokenizeOptions()
SUBMIT_DEFAULTS = SubmitOptions()


def tokenize(
    source: Positional[Annotated[str, arg(metavar="INPUT", help=INPUT_HELP)]],
    output: Positional[Annotated[str, arg(metavar="OUTPUT")]],
    /,
    *,
    options: Annotated[TokenizeOptions, arg(name="")] = TOKENIZE_DEFAULTS,
) -> None:
    """Turn images into a Parquet dataset of adaptive-length tokens.

    Every image ends up in OUTPUT/data or, with the reason, in OUTPUT/_rejects. Run the same command again after an
    interruption: finished files are kept, the rest is done.

    Example: alit tokenize photos/ tokens/ --criterion l1:0.1

    Args:
        output: The dataset's folder, local or s3://.
    """
    from rich.console import Console

    from jobs import tokenize as job

    console = Console(stderr=True)
    if options.dry_run:
        job.preview(source, output, options, console)
    else:
        job.describe(job.tokenize(source, output, options, console), console)


def verify(
    dataset: Positional[Annotated[str, arg(metavar="DATASET")]],
    /,
) -> None:
    """Check a token dataset: every planned image exactly once, whole files, checksums, lengths, ids, metadata.

    Prints what is wrong, file by file, and ends with exit code 1 where anything is.

    Example: alit verify tokens/

    Args:
        dataset: The dataset's folder, local or s3://.
    """
    from rich.console import Console

    from jobs import verify as job

    sys.exit(0 if job.verify(dataset, Console(stderr=True)) else 1)


def show(
    dataset: Positional[Annotated[str, arg(metavar="DATASET")]],
    source: Positional[Annotated[str, arg(metavar="INPUT")]],
    page: Positional[Annotated[Path, arg(metavar="PAGE")]],
    /,
    *,
    weights: str | None = None,
    pictures: int = 48,
    image_column: str = "image",
    id_column: str | None = None,
) -> None:
    """Draw a web page of a token dataset: photographs beside what every length makes of them.

    Example: alit show tokens/ photos/ page.html

    Args:
        dataset: A finished token dataset.
        source: The input that it was made from.
        page: The HTML file to write; it holds everything and needs no network.
        weights: The weights folder that made the dataset; the packaged one when not given.
        pictures: Photographs to show at most.
        image_column: As for tokenize.
        id_column: As for tokenize.
    """
    from jobs import show as job

    shown = job.show(
        dataset,
        source,
        page,
        weights=weights,
        pictures=pictures,
        image_column=image_column,
        id_column=id_column,
    )
    print(f"{page}: {shown} photographs")


def convert(
    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]],
    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]],
    /,
    *,
    heads: int | None = None,
    stage: Literal[1, 2] | None = None,
    halting: Literal["off", "deterministic", "sampled"] = "off",
    halting_threshold: float = 0.55,
) -> None:
    """Turn a published ALIT checkpoint (.pth) into a weights folder. Nothing in it but tensors is unpickled.

    Example: alit convert alit_vqgan_small_quantized_latent.pth weights/small

    Args:
        checkpoint: One of the released files.
        folder: The weights folder to write.
        heads: Attention heads, where the widths are none of the published ones.
        stage: 1 for latent distillation, 2 for full finetuning; told from the file when not given.
        halting: The dynamic halting mask at inference.
        halting_threshold: The probability from which a base token is halted.
    """
    from alit.official import convert as run

    mark = run(checkpoint, folder, heads=heads, stage=stage, halting=halting, halting_threshold=halting_threshold)
    print(f"{folder}: fingerprint {mark}")


def train(*arguments: str) -> None:
    """Train your own weights in three stages: `alit train base`, then `distill`, then `finetune`; see their --help."""
    raise AssertionError(f"main sends {arguments} to the stages")


def _train_commands(arguments: list[str]) -> dict[str, Callable[..., Any]]:
    """The stages as commands, whose defaults are those of the --preset and --config among the arguments."""
    from alit.recipe import RECIPES
    from jobs.train import Options, defaults

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
            from jobs.train import train_stage

            train_stage(stage, data, run, recipe, options)

        run.__annotations__ = {
            "data": Positional[Annotated[str, arg(metavar="INPUT", help="Images, as for tokenize.")]],
            "run": Positional[Annotated[str, arg(metavar="RUN", help="The run's folder, local or s3://.")]],
            "recipe": Annotated[kind, arg(name="")],
            "options": Annotated[Options, arg(name="")],
            "return": None,
        }
        run.__doc__ = (
            f"{about[stage]}\n\nThe same command again goes on from the run's newest checkpoint.\n\n"
            f"Example: alit train {stage} photos/ runs/{stage}"
            + ("" if stage == "base" else f" --init runs/{'base' if stage == 'distill' else 'distill'}/weights")
        )
        return run

    return {stage: command(stage, kind) for stage, kind in RECIPES.items()}


def evaluate(
    source: Positional[Annotated[str, arg(metavar="INPUT")]],
    output: Positional[Annotated[str | None, arg(metavar="[OUTPUT]")]] = None,
    /,
    *,
    weights: str | None = None,
    against: str | None = None,
    thresholds: tuple[float, ...] = (),
    vgg: str | None = None,
    lpips: str | None = None,
    inception: str | None = None,
    workers: int | None = None,
    most: int | None = None,
    image_column: str = "image",
    ray: bool = True,
) -> None:
    """Measure what weights are worth: every length, adaptive lengths, the base tokenizer, JPEG and WebP beside them.

    Every image is measured at every length. The tables are printed, together with how sure they are.

    Example: alit evaluate held-out/ report --thresholds 0.08 0.1 0.12

    Args:
        source: Images, as for tokenize.
        output: Also write OUTPUT.json, OUTPUT.md, and plots of rate and distortion, OUTPUT.png and OUTPUT.svg.
        weights: A weights folder; the packaged one when not given.
        against: Another weights folder, for a paired comparison on the same images.
        thresholds: Of the criterion l1; some that spread the lengths when not given.
        vgg: torchvision's VGG16 file (vgg16-397923af.pth); with --lpips, LPIPS is measured.
        lpips: The VGG heads of LPIPS v0.1 (lpips/weights/v0.1/vgg.pth).
        inception: pytorch-fid's Inception file (pt_inception-2015-12-05-6726825d.pth); with it, rFID is measured.
        workers: Processes that hold the models; one per CPU, or per GPU where there is one.
        most: Images at most, spread evenly over the input.
        image_column: As for tokenize.
        ray: Measure in worker processes; --no-ray does it in this one, to find mistakes.
    """
    from jobs import evaluate as job

    job.run(
        source,
        output,
        weights=weights,
        against=against,
        thresholds=thresholds,
        vgg=vgg,
        lpips=lpips,
        inception=inception,
        workers=workers,
        most=most,
        image_column=image_column,
        ray=ray,
    )


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
    from serve.run import run

    run(config, {"host": host, "port": port, "keys_file": keys_file, "models": weights})


def demo(folder: Positional[Annotated[str, arg(metavar="[FOLDER]")]] = "demo", /) -> None:
    """Tokenize the photographs of scikit-image's package and draw a page of them.

    Args:
        folder: Receives photographs, tokens and index.html.
    """
    from rich.console import Console

    from jobs.demo import demo as run

    run(Path(folder), Console(stderr=True))


def benchmark(
    what: Positional[Literal["encode", "tokenize", "train"]],
    source: Positional[Annotated[str, arg(metavar="INPUT")]],
    /,
    *,
    criterion: Annotated[str | None, arg(help=CRITERION_HELP)] = None,
    weights: str | None = None,
    batch_size: int | None = None,
    rounds: int = 3,
    image_column: str = "image",
    rows_per_file: int = 512,
    workers: int | None = None,
    rates: Path | None = None,
    stage: Literal["base", "distill", "finetune"] = "base",
    preset: str = "nano",
    steps: int = 120,
    threads: int | None = None,
    compile: bool = False,
) -> None:
    """Measure ratios within one run: adaptive against fixed encoding, or a Ray job against a bare loop.

    Args:
        what: encode: one batch, every way of encoding it. tokenize: the whole input, with and without Ray. train: some
            steps, with and without Ray Train.
        source: Images, as for tokenize.
        weights: A weights folder; the packaged one when not given. For train, where distill and finetune start.
        batch_size: Images of the one batch that encode measures, 64 when not given; of train's steps.
        rounds: Repetitions, in alternation.
        image_column: As for tokenize.
        rows_per_file: As for tokenize.
        workers: As for tokenize.
        rates: Where tokenize's rates are written, for alit plan.
        stage: What train trains.
        preset: Its model, where there are no weights to start from, and its recipe.
        steps: Its steps per round.
        threads: Its CPU threads, all of the machine's when not given: then Ray's own processes take theirs from them.
        compile: Whether it compiles the network's blocks.
    """
    from rich.console import Console

    from alit.weights import default_weights
    from jobs import benchmark as job

    console = Console()
    if what == "encode":
        job.benchmark_encode(
            source,
            criterion=criterion,
            weights=weights,
            batch_size=64 if batch_size is None else batch_size,
            rounds=rounds,
            image_column=image_column,
            console=console,
        )
    elif what == "train":
        job.benchmark_train(
            source,
            stage,
            preset=preset,
            init=weights or (None if stage == "base" else str(default_weights())),
            batch_size=batch_size,
            steps=steps,
            threads=threads,
            rounds=rounds,
            compile=compile,
            image_column=image_column,
            console=console,
        )
    else:
        job.benchmark_tokenize(
            source,
            criterion=criterion,
            weights=weights,
            rounds=rounds,
            image_column=image_column,
            rows_per_file=rows_per_file,
            workers=workers,
            rates_file=rates,
            console=console,
        )


def plan(
    what: Positional[Literal["tokenize"]],
    /,
    *,
    rates: Path,
    options: Annotated[PlanOptions, arg(name="")],
) -> None:
    """Say what tokenizing a corpus would take: hours, storage, requests and money, with all that is assumed.

    Example: alit benchmark tokenize photos/ --rates rates.json, then alit plan tokenize --rates rates.json --images 1e9
    --gpus 64 --worker-hour 2.5

    Args:
        what: The job.
        rates: What alit benchmark tokenize --rates measured, on a machine like those that will do the work.
    """
    from rich.console import Console

    from jobs import sizing

    sizing.plan(sizing.Rates.read(rates), options, Console())


def submit(
    *,
    options: Annotated[SubmitOptions, arg(name="")] = SUBMIT_DEFAULTS,
    follow_job: str | None = None,
    stop_job: str | None = None,
) -> None:
    """Run a command on a Ray cluster: put `submit`, and options of its own if any, before it.

    INPUT, OUTPUT, weights and run folders must lie where the cluster's nodes see them: s3://, or a shared disk.

    Example: alit submit --address http://head:8265 tokenize s3://bucket/photos s3://bucket/tokens --workers 8

    Args:
        follow_job: Show the log of this job, submitted before.
        stop_job: Stop this job, submitted before.
    """
    from jobs import submit as job

    if stop_job is not None:
        job.stop(stop_job, options.address)
    elif follow_job is not None:
        sys.exit(job.resume(follow_job, options.address))
    else:
        raise AlitError(
            "name the command to submit, such as: alit submit tokenize s3://bucket/photos s3://bucket/tokens"
        )


def _submit(arguments: list[str]) -> None:
    """`alit submit [OPTIONS] COMMAND …`: the command's own options are the job's."""
    names = [name for name in COMMANDS if name not in ("submit", "serve", "demo")]
    at = next((i for i, word in enumerate(arguments) if word in names or word == "--"), len(arguments))
    own, command = arguments[:at], [word for word in arguments[at : at + 1] if word != "--"] + arguments[at + 1 :]
    if not command:
        tyro.cli(submit, args=own, prog="alit submit")
        return
    if command[0] not in names:
        raise AlitError(f"submit takes one of {', '.join(names)}, got {command[0]!r}")
    from jobs import submit as job

    sys.exit(job.submit(command, tyro.cli(SubmitOptions, args=own, prog="alit submit")))


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


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; what a person can put right is one sentence on stderr and exit code 2."""
    importlib.import_module("serve")  # ours, before a folder of this name in the working folder could be taken for it
    sys.path.append(os.getcwd())  # where a criterion's package.module may lie; last, so that it hides nothing
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["submit"]:
            _submit(arguments[1:])
            return
        if arguments[:1] == ["train"]:
            tyro.extras.subcommand_cli_from_dict(
                _train_commands(arguments[1:]), args=arguments[1:], prog="alit train", description=train.__doc__
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
