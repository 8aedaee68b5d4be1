"""`dualcodebook card | push`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files import atomic_file
from ..flags import Parser, Switch
from ..run_folder import SavedModel
from .inputs import add_output, check_folder, set_command


def add_card(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _card, "[RUN]")
    _add_run(command)
    command.add_argument("--repo-id", metavar="OWNER/NAME", help="what the card's examples load (default: you/...)")
    add_output(command, "the card", metavar="FILE.md")


def add_push(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _push, "RUN --repo-id OWNER/NAME | --space OWNER/NAME")
    _add_run(command)
    command.add_argument("--repo-id", metavar="OWNER/NAME", help="repository of the model, created where there is none")
    command.add_argument(
        "--samples", action=Switch, nargs=0, default=True, help="publish the run's validation images (default: true)"
    )
    command.add_argument(
        "--onnx",
        action=Switch,
        nargs=0,
        default=False,
        help="publish graphs for onnxruntime beside the weights (default: false)",
    )
    command.add_argument(
        "--image",
        action="append",
        type=Path,
        metavar="FILE",
        help="image that the card shows beside its reconstruction, may be repeated (default: photographs of "
        "scikit-image, where it is installed)",
    )
    command.add_argument("--space", metavar="OWNER/NAME", help="publish the Space there, instead of a model")
    command.add_argument(
        "--model-id",
        action="append",
        metavar="OWNER/NAME",
        help="with --space: model that it shows, may be repeated (default: both inside the package)",
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
    command.add_argument(
        "--private", action=Switch, nargs=0, default=False, help="make a new repository private (default: false)"
    )
    command.add_argument(
        "--overwrite",
        action=Switch,
        nargs=0,
        default=False,
        help="publish into a repository that holds something else; its files stay (default: false)",
    )


def _add_run(command: Parser) -> None:
    text = "folder of a run, a checkpoint or a saved model"
    command.add_argument("folder", nargs="?", type=Path, metavar="RUN", help=text)
    command.add_argument(
        "--metrics", type=Path, metavar="FILE.json", help="of `evaluate` (default: RUN's metrics.json)"
    )
    command.add_argument(
        "--license", metavar="ID", help="of the weights (default: apache-2.0, or that of the weights they started from)"
    )


def _card(arguments: argparse.Namespace) -> int:
    if arguments.folder is not None:
        SavedModel.find(arguments.folder)
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
    options = {"private": arguments.private, "overwrite": arguments.overwrite}
    model = {"RUN": arguments.folder, "--repo-id": arguments.repo_id}
    details = {"--metrics": arguments.metrics, "--license": arguments.license, "--no-samples": not arguments.samples}
    details |= {"--onnx": arguments.onnx, "--image": arguments.image}
    if arguments.space:
        given = [flag for flag, value in {**model, **details}.items() if value]
        if given:
            raise ValueError(f"`--space` publishes the Space alone; it does not go with {', '.join(given)}")
        if arguments.static and arguments.model_id:
            raise ValueError("`--model-id` does not go with `--static`, whose page holds its model")
        from ..hub import push_space

        url = push_space(arguments.space, models=arguments.model_id or (), static=arguments.static, **options)
    else:
        if arguments.static:
            raise ValueError("`--static` goes with `--space`, the Space's repository")
        if arguments.model_id:
            raise ValueError("`--model-id` goes with `--space`; the repository of a model is `--repo-id`")
        missing = [flag for flag, value in model.items() if not value]
        if missing:
            raise ValueError(f"`push` needs RUN and --repo-id, or --space; {' and '.join(missing)} missing")
        SavedModel.find(arguments.folder)
        from ..hub import push_model

        options |= {"license": arguments.license, "metrics": arguments.metrics, "samples": arguments.samples}
        options |= {"onnx": arguments.onnx, "images": arguments.image}
        url = push_model(arguments.folder, arguments.repo_id, **options)
    print(f"published: {url}")
    return 0
