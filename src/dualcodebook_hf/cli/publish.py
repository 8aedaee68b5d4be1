"""`dualcodebook card | push`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files import atomic_file
from .inputs import check_folder


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the two commands to the parser."""
    command = commands.add_parser("card", help="write the model card of a trained model")
    _add_run(command)
    command.add_argument("--repo-id", metavar="OWNER/NAME", help="what the card's examples load (default: you/...)")
    command.add_argument("--output", type=Path, metavar="FILE.md", help="write it there (default: print it)")
    command.set_defaults(run=_card)

    command = commands.add_parser("push", help="publish a trained model, or the Space, on the Hugging Face Hub")
    _add_run(command)
    command.add_argument("--repo-id", metavar="OWNER/NAME", help="repository of the model, created where there is none")
    command.add_argument("--no-samples", action="store_true", help="leave the run's validation images out")
    command.add_argument("--onnx", action="store_true", help="publish graphs for onnxruntime beside the weights")
    command.add_argument("--space", metavar="OWNER/NAME", help="publish the Space there, instead of a model")
    command.add_argument(
        "--model-id",
        action="append",
        metavar="OWNER/NAME",
        help="with --space: model that it shows, may be repeated (default: the checkpoint inside the package)",
    )
    command.add_argument(
        "--static",
        nargs="?",
        const=Path("build", "static-space"),
        type=Path,
        metavar="DIR",
        help="with --space: publish the page that runs in the browser, written by `make static-space` into DIR "
        "(default: build/static-space)",
    )
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument(
        "--overwrite", action="store_true", help="publish into a repository that holds something else; its files stay"
    )
    command.set_defaults(run=_push)


def _add_run(command: argparse.ArgumentParser) -> None:
    text = "folder of a run, a checkpoint or a saved model"
    command.add_argument("folder", nargs="?", type=Path, metavar="RUN", help=text)
    command.add_argument(
        "--metrics", type=Path, metavar="FILE.json", help="of `evaluate` (default: RUN's metrics.json)"
    )
    command.add_argument(
        "--license", metavar="ID", help="of the weights (default: apache-2.0; `other` for converted weights)"
    )


def _card(arguments: argparse.Namespace) -> int:
    from ..hub import check_repo_id
    from ..hub.card import MARK, model_card
    from ..hub.export import TrainedModel
    from ..hub.records import Records
    from ..loading import default_checkpoint

    output, repo_id = arguments.output, arguments.repo_id
    if repo_id:
        check_repo_id(repo_id, "--repo-id")
    if output:
        check_folder(output.parent, "--output")
        if output.is_dir() or (output.exists() and MARK not in output.read_text(encoding="utf-8", errors="replace")):
            raise ValueError(f"`--output`: '{output}' exists and is not a card of this program; choose another name")
    if arguments.folder is None and not (repo_id or arguments.metrics):
        text = model_card(Records.read(default_checkpoint()), license=arguments.license)
    else:
        run = arguments.folder or default_checkpoint()
        text = TrainedModel.find(run, arguments.metrics).card(repo_id, arguments.license)
    if output is None:
        print(text, end="")
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"card written to {output}")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from ..hub import push_model, push_space

    options = {"private": arguments.private, "overwrite": arguments.overwrite}
    model = {"RUN": arguments.folder, "--repo-id": arguments.repo_id}
    details = {"--metrics": arguments.metrics, "--license": arguments.license, "--no-samples": arguments.no_samples}
    details["--onnx"] = arguments.onnx
    if arguments.space:
        given = [flag for flag, value in {**model, **details}.items() if value]
        if given:
            raise ValueError(f"`--space` publishes the Space alone; it does not go with {', '.join(given)}")
        if arguments.static and arguments.model_id:
            raise ValueError("`--model-id` does not go with `--static`, whose page holds its model")
        url = push_space(arguments.space, models=arguments.model_id or (), static=arguments.static, **options)
    else:
        if arguments.static:
            raise ValueError("`--static` goes with `--space`, the Space's repository")
        if arguments.model_id:
            raise ValueError("`--model-id` goes with `--space`; the repository of a model is `--repo-id`")
        missing = [flag for flag, value in model.items() if not value]
        if missing:
            raise ValueError(f"`push` needs RUN and --repo-id, or --space; {' and '.join(missing)} missing")
        options |= {"license": arguments.license, "metrics": arguments.metrics, "samples": not arguments.no_samples}
        options["onnx"] = arguments.onnx
        url = push_model(arguments.folder, arguments.repo_id, **options)
    print(f"published: {url}")
    return 0
