"""The model card of a tokenizer: README.md, a function of the JSON files that lie beside the weights.

`model_card_template.md` is the card; here are the facts that it tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..configuration_dualcodebook import DualCodebookConfig, DualCodebookFields
from ..evaluation.generator_evaluation import generator_cells
from ..evaluation.table import markdown_table, results_table
from ..loading import EMBEDDED_LABELS, FAITHFUL
from ..metrics import IMAGE_METRICS, NETWORK_METRICS
from .records import Records, complete_records

MARK = "<!-- Written by `dualcodebook card`; a new one replaces it. -->"
TEMPLATE = "model_card_template.md"
PIPELINE_TEMPLATE = "pipeline_card_template.md"
GENERATOR_TEMPLATE = "generator_card_template.md"
GENERATOR_TASK = "unconditional-image-generation"  # the Hub's nearest word; DiT's repositories have it too
GENERATOR_TAGS = ["class-conditional", "masked-generation", "dual-codebook", "arxiv:2503.10832", "arxiv:2202.04200"]
TASK = "image-feature-extraction"
# By task and library the Hub's "Use this model" shows the task's pipeline and AutoModel, with `trust_remote_code=True`;
# both load what is published. A tag `diffusers` would add DiffusionPipeline, which does not.
LIBRARY = "transformers"
TAGS = ["image-tokenizer", "vector-quantization", "dual-codebook", "vq-vae", "arxiv:2503.10832"]
DEFINITIONS = ("crop", "values", "mean", *IMAGE_METRICS, "quantization_error")  # those that the card repeats
# The settings of train_config.json that the card tells.
SETTINGS = {
    "data": ("dataset", "train_split", "resize", "resize_mode", "crop", "resolution", "horizontal_flip"),
    "training": (
        "init_from",
        "data_initialization",
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_schedule",
        "ema_decay",
    ),
}
PERCEPTUALS = {
    "lpips": "LPIPS",
    "ms-ssim": "MS-SSIM",
    "efficientnet": "distance in the features of EfficientNet-Lite0",
}
DISCRIMINATORS = {"patch": "PatchGAN", "projected": "projected discriminator on EfficientNet-Lite0"}
DATA_SOURCES = {
    "clothing-256": '3,068 photographs, a subset of A. Grigorev\'s "Clothing dataset", free for any purpose',
    "flowers": "1,625 photographs of TensorFlow's flower_photos, CC BY 2.0, by photographers on Flickr whom its column "
    "`source` names",
    "grocery": "1,546 photographs of M. Klasson's Grocery Store Dataset, MIT",
}
DERIVED = ("latent_channels", "vq_embed_dim")  # fields that follow from others


def model_card(
    records: Records,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    figures: Mapping[str, str] | None = None,
    onnx: bool = False,
) -> str:
    """The text of README.md: YAML front matter with `model-index`, and how to use the model, what it is, its numbers.

    Args:
        records: what lies beside the weights.
        repo_id: where the model is published; None: the checkpoint inside the package.
        license: identifier of the Hub for the weights' licence; None: apache-2.0; of weights that started from others,
            theirs, as far as it is known; otherwise, and for converted ones, "other".
        figures: {file name of an image beside the card: what it shows}.
        onnx: graphs for onnxruntime lie beside the card.

    Raises ValueError when one of the records lacks something.
    """
    with complete_records():
        facts = card_facts(records, repo_id)
        known = None if facts["conversion"] else records.origin_license
        license = license or ((known or "other") if facts["origin"] else "apache-2.0")
        data = ModelCardData(
            license=license, library_name=LIBRARY, pipeline_tag=TASK, tags=[*TAGS, *(["onnx"] if onnx else [])]
        )
        data.datasets = _hub_ids(records, "data", "dataset") or None
        base = _hub_ids(records, "training", "init_from")
        if base:
            data.base_model, data["base_model_relation"] = base[0], "finetune"
        if records.results:
            data.model_name, data.eval_results = facts["name"], _eval_results(records)
            data.metrics = list(dict.fromkeys(result.metric_type for result in data.eval_results))
    return _render(TEMPLATE, data, **facts, figures=figures or {}, onnx=onnx)


def pipeline_card(pipeline: str, repo_id: str, components: list[str]) -> str:
    """README.md of a diffusers pipeline that holds tokenizers of this package.

    Args:
        pipeline: name of its class.
        repo_id: where it is published.
        components: names of the components that are tokenizers.
    """
    data = ModelCardData(library_name="diffusers", tags=[pipeline, *TAGS])
    title = repo_id.split("/")[-1]
    return _render(PIPELINE_TEMPLATE, data, title=title, pipeline=pipeline, repo_id=repo_id, components=components)


def generator_card(
    pipeline: Any,
    repo_id: str | None = None,
    *,
    train: Mapping[str, dict] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a generator.

    Args:
        pipeline: a `DualCodebookMaskGenerationPipeline`.
        repo_id: where it is published; None: the generator inside the package.
        train: content of its train_config.json.
        measured: what `dualcodebook evaluate-generator --output` wrote.
    """
    data = ModelCardData(license="apache-2.0", library_name="diffusers", pipeline_tag=GENERATOR_TASK)
    data.tags = [type(pipeline).__name__, *GENERATOR_TAGS]
    rows, columns = pipeline.transformer.config.sample_size
    factor = pipeline.vqvae.downsample_factor
    facts: dict[str, Any] = {
        "title": repo_id.split("/")[-1] if repo_id else "dualcodebook_hf, embedded generator",
        "repo_id": repo_id,
        "rows": rows,
        "columns": columns,
        "height": rows * factor,
        "width": columns * factor,
        "classes": list(pipeline.labels),
        "codebook_sizes": list(pipeline.transformer.config.codebook_sizes),
        "parameters": pipeline.transformer.num_parameters(),
        "train": train,
        "data_source": _sources(train) if train else "",
    }
    if measured:
        test = measured["protocol"]["test"]
        settings = _sampling(measured["protocol"]["samples"])
        facts["table"] = markdown_table(*generator_cells(measured["results"]))
        facts["protocol"] = (
            f"{measured['results'][0]['pictures']} samples{settings}, of the classes of the {test['split']} images of "
            f"{test['dataset']}, {test['size']} x {test['size']} pixels."
        )
    return _render(GENERATOR_TEMPLATE, data, **facts)


def _sampling(drawn: Mapping[str, Any]) -> str:
    """How samples were drawn, in words; nothing for a folder of images and older records, which do not tell."""
    values = [drawn.get(name) for name in ("num_inference_steps", "guidance_scale", "sampling_temperature")]
    if not all(isinstance(value, (int, float)) for value in values):
        return ""
    steps, guidance, temperature = values
    return f" ({steps} steps, guidance {guidance:g}, temperature {temperature:g})"


def _sources(train: Mapping[str, dict]) -> str:
    """Whose images a generator was trained on, where it is known."""
    text = str(train["data"].get("tokens") or train["data"].get("dataset"))
    return "; ".join(source for name, source in DATA_SOURCES.items() if name in text)


def card_facts(records: Records, repo_id: str | None = None) -> dict[str, Any]:
    """What the template tells of a model; see `model_card` for the arguments."""
    fields, model = records.fields, records.model()
    name = repo_id.split("/")[-1] if repo_id else records.name
    decoder = f'"{FAITHFUL}"' if records.name == EMBEDDED_LABELS[FAITHFUL] else ""
    training = _training(records.train) if records.train else None
    conversion = {key: records.conversion[key] for key in ("source", "kind")} if records.conversion else None
    return {
        "name": name,
        "title": name if repo_id else f"dualcodebook_hf, {name}",
        "repo_id": repo_id,
        "source": f'"{repo_id}"' if repo_id else f"default_checkpoint({decoder})",
        "factor": model.downsample_factor,
        "codebooks": _codebooks(fields, model),
        "bits_per_position": model.bits_per_position,
        "parameters": model.num_parameters(),
        "backbone": fields.backbone,
        "quantizer": fields.quantizer,
        "weights_dtype": records.train["training"].get("weights_dtype") if records.train else None,
        "training": training,
        "conversion": conversion,
        "origin": (conversion or {}).get("source") or (training or {}).get("init_from"),
        "measured": _measured(records, name) if records.results else None,
        "differing": _differing(fields),
    }


def _render(template: str, data: ModelCardData, **facts: Any) -> str:
    path = Path(__file__).with_name(template)
    return f"{ModelCard.from_template(data, template_path=str(path), mark=MARK, **facts)}\n"


def _eval_results(records: Records) -> list[EvalResult]:
    results = []
    for result in records.own():
        protocol, metrics = result["protocol"], result["metrics"]
        size, called = protocol["size"], " ".join(filter(None, ["dualcodebook_hf evaluate", protocol.get("name")]))
        called += f": {size} x {size} centre crop, {protocol['resample']}"
        args = {"protocol": called, "pictures": protocol["pictures"], "bits_per_pixel": metrics["bits_per_pixel"]}
        for key, metric in IMAGE_METRICS.items():
            if key not in metrics:
                continue
            results.append(
                EvalResult(
                    task_type=TASK,
                    dataset_type=protocol["dataset"],
                    dataset_name=protocol["dataset"],
                    dataset_config=protocol["config"],
                    dataset_split=protocol["split"],
                    metric_type=key,
                    metric_name=f"{metric.title} ({metric.unit})" if metric.unit else metric.title,
                    metric_value=round(metrics[key], metric.digits),
                    metric_args={**args, "definition": protocol["definitions"][key]},
                )
            )
    return results


def _hub_ids(records: Records, section: str, name: str) -> list[str]:
    """The Hub ids (owner/name) that a setting of the training names; records keep of a path its last part only."""
    value = records.train[section][name] if records.train else None
    return [item for item in (value if isinstance(value, list) else [value]) if item and "/" in item]


def _codebooks(fields: DualCodebookFields, model: DualCodebookVQModel) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "title": name if name == "codebook" else f"{name} codebook",
            "size": codebook.size,
            "dim": codebook.dim,
            "kind": getattr(codebook, "description", f"quantizer `{fields.quantizer}`"),
        }
        for name, codebook in model.quantize.codebooks.items()
    ]


def _training(train: dict[str, dict]) -> dict[str, Any]:
    settings = {name: train[section][name] for section, names in SETTINGS.items() for name in names}
    several = {name: settings[name] for name in ("dataset", "train_split") if isinstance(settings[name], list)}
    names = several.get("dataset", [settings["dataset"]])
    settings |= {name: "`, `".join(values) for name, values in several.items()}  # each in Markdown's backticks
    return settings | {
        "resize": _resize(settings["resize"], settings["resize_mode"]),
        "data_source": "; ".join(DATA_SOURCES[name] for name in names if name in DATA_SOURCES),
        "decoder_only": train["training"].get("train") == "decoder",  # older records have no such setting
        "loss": _loss_terms(train["training"]),
        "pixels_alone": _for_pixels_alone(train["training"]),
    }


def _resize(sizes: int | list[int], mode: str) -> str:
    """What was done to an image before the crop, with what divides it from the rest; empty: nothing."""
    several = dict.fromkeys(sizes if isinstance(sizes, list) else [sizes])
    texts = [f"resized to {size} ({mode})" if size else "as it is" for size in several]
    if len(texts) > 1:
        return f"each at random {' or '.join(texts)}; "
    return f"{texts[0]}, " if any(several) else ""


def _for_pixels_alone(training: dict[str, Any]) -> bool:
    perceptual = training["perceptual"] != "none" and training["perceptual_weight"]
    return not (perceptual or training["adversarial_weight"] or training.get("feature_matching_weight"))


def _loss_terms(training: dict[str, Any]) -> list[str]:
    names = {"l1_weight": "L1", "l2_weight": "L2", "log_l2_weight": "log L2", "grid_weight": "grid"}
    names["seam_weight"] = "seams"
    terms = [f"{training[key]:g} {title}" for key, title in names.items() if training.get(key)]
    if training["perceptual"] != "none" and training["perceptual_weight"]:
        terms.append(f"{training['perceptual_weight']:g} {PERCEPTUALS[training['perceptual']]}")
    if training.get("feature_matching_weight"):
        terms.append(f"{training['feature_matching_weight']:g} feature matching")
    terms.append(f"{training['codebook_weight']:g} codebooks")
    if training["adversarial_weight"]:
        adversary = DISCRIMINATORS[training.get("discriminator", "patch")]  # older records know one only
        terms.append(f"{training['adversarial_weight']:g} {adversary} from update {training['adversarial_start']:,} on")
    return terms


def _measured(records: Records, name: str) -> dict[str, Any]:
    own = records.own()
    protocols = [result["protocol"] for result in own]
    fitted = [result["model"]["fitted_to"] for result in records.results if result not in own]
    definitions = {key: text for protocol in protocols for key, text in protocol["definitions"].items()}
    return {
        "table": results_table(
            (name if result in own else result["model"]["name"], result) for result in records.results
        ),
        "fitted_to": _distinct(fitted, "pictures", "dataset", "split"),
        "crops": _distinct(protocols, "size", "resample"),
        "definitions": {key: definitions[key] for key in DEFINITIONS if key in definitions},
        "versions": {package: protocols[0]["versions"][package] for package in ("dualcodebook_hf", "torch")},
        "device": protocols[0]["hardware"]["device"],
        "absent": [IMAGE_METRICS[key].title for key in NETWORK_METRICS if key not in own[0]["metrics"]],
    }


def _distinct(entries: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Of each entry the named values, in order and each combination once."""
    combinations = dict.fromkeys(tuple(entry[name] for name in names) for entry in entries)
    return [dict(zip(names, values, strict=True)) for values in combinations]


def _differing(fields: DualCodebookFields) -> list[str]:
    """The settings of the model that are not the paper's."""
    paper = DualCodebookConfig().fields_dict()
    return [name for name, value in fields.fields_dict().items() if value != paper[name] and name not in DERIVED]
