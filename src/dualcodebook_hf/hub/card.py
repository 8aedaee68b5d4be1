"""The model card of a tokenizer: README.md, a function of the JSON files that lie beside the weights."""

from __future__ import annotations

import textwrap
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..configuration_dualcodebook import DualCodebookConfig, DualCodebookFields
from ..evaluation.table import results_table
from .records import Records, complete_records

MARK = "<!-- Written by `dualcodebook card`; a new one replaces it. -->"
PAPER = "https://arxiv.org/abs/2503.10832"
TASK = "image-feature-extraction"
TAGS = ["image-tokenizer", "vector-quantization", "dual-codebook", "vq-vae", "arxiv:2503.10832"]
# Title and digits of what is published of each data set's measurements, where it was measured.
METRICS = {
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 4),
    "ms_ssim": ("MS-SSIM", 4),
    "swd": ("SWD", 1),
    "lpips": ("LPIPS", 4),
    "rfid": ("rFID", 2),
}
DEFINITIONS = ("crop", "values", "mean", *METRICS, "quantization_error")
SOURCES = {"clothing-256": '3,068 photographs, a subset of A. Grigorev\'s "Clothing dataset", free for any purpose'}
DERIVED = ("latent_channels", "vq_embed_dim")
BIBTEX = """@article{boodaghimalidarreh2025dualcodebook,
  title   = {Dual Codebook VQ: Enhanced Image Reconstruction with Reduced Codebook Size},
  author  = {Boodaghi Malidarreh, P. and others},
  journal = {arXiv preprint arXiv:2503.10832},
  year    = {2025},
  url     = {https://arxiv.org/abs/2503.10832}
}"""


def model_card(
    records: Records, repo_id: str | None = None, *, license: str | None = None, figure: str | None = None
) -> str:
    """The text of README.md: YAML front matter with `model-index`, and how to use the model, what it is, its numbers.

    Args:
        repo_id: where the model is published; None: the checkpoint inside the package.
        license: identifier of the Hub for the weights' licence; None: apache-2.0, or "other" where others' weights
            were converted or started from.
        figure: file name of a picture beside the card, originals above reconstructions.

    Raises ValueError when one of the records lacks something.
    """
    with complete_records():
        return _model_card(records, repo_id, license or ("other" if _origin(records) else "apache-2.0"), figure)


def _model_card(records: Records, repo_id: str | None, license: str, figure: str | None) -> str:
    name = repo_id.split("/")[-1] if repo_id else "embedded checkpoint"
    title = name if repo_id else f"dualcodebook_hf, {name}"
    data = ModelCardData(license=license, library_name="diffusers", pipeline_tag=TASK, tags=TAGS)
    if records.results:
        data.model_name, data.eval_results = name, _eval_results(records)
        data.metrics = list(dict.fromkeys(result.metric_type for result in data.eval_results))
    sections = [f"---\n{data.to_yaml()}\n---", f"# {title}", _introduction(records)]
    if figure:
        sections.append(f"![Validation pictures above their reconstructions]({figure})")
    sections += [_facts(records), _use(repo_id), _tokens(records), _training(records), _measurements(records, name)]
    sections += [_limits(records), _licence(records, license), MARK]
    return "\n\n".join(section for section in sections if section) + "\n"


def _eval_results(records: Records) -> list[EvalResult]:
    results = []
    for result in records.own():
        protocol, metrics = result["protocol"], result["metrics"]
        size, named = protocol["size"], " ".join(filter(None, ["dualcodebook_hf evaluate", protocol.get("name")]))
        named += f": {size} x {size} centre crop, {protocol['resample']}"
        args = {"protocol": named, "pictures": protocol["pictures"], "bits_per_pixel": metrics["bits_per_pixel"]}
        for key, (title, digits) in METRICS.items():
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
                    metric_name=title,
                    metric_value=round(metrics[key], digits),
                    metric_args={**args, "definition": protocol["definitions"][key]},
                )
            )
    return results


def _text(*sentences: str, start: str = "") -> str:
    """Sentences as a paragraph of lines; as an item of a list with `start` "- "."""
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * len(start)}
    return textwrap.fill(" ".join(filter(None, sentences)), 116, initial_indent=start, **options)


def _list(*items: str) -> str:
    return "\n".join(_text(item, start="- ") for item in items if item)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _introduction(records: Records) -> str:
    dual = len(records.model().quantize.codebooks) == 2
    grids = "two grids of tokens, and the tokens" if dual else "a grid of tokens, and the tokens"
    return _text(
        f"An image tokenizer with {'two codebooks' if dual else 'one codebook'}: a picture becomes {grids} become the "
        "picture again.",
        "Made with `dualcodebook_hf`, an independent implementation of Dual Codebook VQ",
        f"([arXiv:2503.10832]({PAPER})), not by the paper's authors.",
    )


def _facts(records: Records) -> str:
    fields, model = records.fields, records.model()
    factor, bits = fields.downsample_factor, model.quantize.bits_per_position
    rows = [("downsampling", f"{factor} x {factor} pixels a position")]
    for name, codebook in model.quantize.codebooks.items():
        title = name if name == "codebook" else f"{name} codebook"
        rows.append((title, f"{codebook.size} codes of {codebook.dim}, {_codebook_kind(fields, name)}"))
    rows.append(("rate", f"{bits:g} bits a position, {bits / factor**2:.4f} bits per pixel"))
    parameters = sum(weight.numel() for weight in model.parameters()) / 1e6
    rows.append(("parameters", f"{parameters:.1f} M ({fields.backbone} backbone)"))
    dtype = (records.train or {}).get("training", {}).get("weights_dtype")
    if dtype:
        rows.append(("weights", f"backbone {dtype}, codebooks float32"))
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _codebook_kind(fields: DualCodebookFields, name: str) -> str:
    if fields.quantizer not in ("dual", "single"):
        return f"quantizer `{fields.quantizer}`"
    prefix = name if name in ("global", "local") else "local"
    layers = getattr(fields, f"{prefix}_transformer_layers")
    kind = f"the outputs of a transformer of depth {layers}" if layers else "a plain table"
    how = {"ema": " kept by EMA", "linear": " times a learned matrix"}
    return kind + how.get(getattr(fields, f"{prefix}_update"), "")


def _use(repo_id: str | None) -> str:
    source = f'"{repo_id}"' if repo_id else "default_checkpoint()"
    diffusers = f"""from PIL import Image

from dualcodebook_hf import DualCodebookImageProcessor, DualCodebookVQModel{"" if repo_id else ", default_checkpoint"}

model = DualCodebookVQModel.from_pretrained({source})
processor = DualCodebookImageProcessor{f".from_pretrained({source})" if repo_id else "()"}

pixels = processor(Image.open("photo.jpg"), return_tensors="pt")["pixel_values"]  # (1, 3, H, W) in [-1, 1]
tokens = model.tokenize(pixels)  # (1, books, h, w)
restored = model.detokenize(tokens, size=pixels.shape[-2:])
processor.postprocess(restored)[0].save("restored.png")"""
    transformers = f"""import dualcodebook_hf  # registers the model
from transformers import AutoModel

model = AutoModel.from_pretrained({source if repo_id else f"dualcodebook_hf.{source}"})
out = model(pixels.to(model.dtype))  # out.image_tokens, out.decoded_pixel_values"""
    folder = f'"{repo_id or "tokenizer"}"'
    remote = f"""from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained({folder}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({folder}, trust_remote_code=True)"""
    where = "; the code files lie beside the weights:"
    if not repo_id:
        where = (
            ': `dualcodebook_hf.hub.prepare_folder(default_checkpoint(), "tokenizer")` writes a folder that holds the '
            "code, as `dualcodebook push` publishes it. Then"
        )
    parts = ["## Use", "In diffusers' manner, also as the `vqvae` of its pipelines:", _code("python", diffusers)]
    parts += ["In transformers' manner:", _code("python", transformers)]
    parts += [_text("Without the package, through diffusers and transformers 5" + where), _code("python", remote)]
    return "\n\n".join(parts)


def _tokens(records: Records) -> str:
    fields, codebooks = records.fields, records.model().quantize.codebooks
    factor, sizes = fields.downsample_factor, [codebook.size for codebook in codebooks.values()]
    shape = f"`tokenize` gives int64 (B, {len(codebooks)}, ceil(H / {factor}), ceil(W / {factor})) for any H and W;"
    if len(codebooks) == 1:
        ids = [f"Ids lie in [0, {sizes[0]})."]
    else:
        global_name, local_name = codebooks
        ids = [
            f"`[:, 0]` are ids of the {global_name} codebook in [0, {sizes[0]}), `[:, 1]` of the {local_name} one in",
            f'[0, {sizes[1]}). `detokenize(tokens, only="{global_name}")` shows what one book holds.',
            f"Generators that want one id a position take `{global_name} * {sizes[1]} + {local_name}`.",
        ]
    if fields.quantizer == "dual":
        ids.append(
            f"The global book quantizes the latents' first {fields.global_dim} channels, the local one the rest."
        )
    return "## The tokens\n\n" + _text(shape, "`detokenize` takes them back.", *ids)


def _training(records: Records) -> str:
    parts = ["## Training"]
    if records.conversion:
        source, kind = records.conversion["source"], records.conversion["kind"]
        converted = f"The weights were converted from `{source}` ({kind}) by `dualcodebook convert`;"
        parts.append(_text(converted, "`conversion.json` names the source files by their SHA-256."))
    if records.train:
        data, training = records.train["data"], records.train["training"]
        known = f" ({SOURCES[data['dataset']]})" if data["dataset"] in SOURCES else ""
        resized = f"resized to {data['resize']} ({data['resize_mode']}), " if data["resize"] else ""
        crops = f"{data['crop']} crops of {data['resolution']} pixels" + ", mirrored" * data["horizontal_flip"]
        accumulated = training["train_batch_size"] * training["gradient_accumulation_steps"]
        averaged = f", weights averaged (EMA {training['ema_decay']:g})" if training["ema_decay"] else ""
        rate = f"learning rate {training['learning_rate']:g} ({training['lr_schedule']})"
        items = [
            f"**Data:** split `{data['train_split']}` of `{data['dataset']}`{known}; {resized}{crops}.",
            f"**Start:** {_start(training)}.",
            f"**Updates:** up to {training['max_train_steps']:,}, of {accumulated} crops a process; {rate}{averaged}.",
            f"**Loss:** {_loss(training)}.",
        ]
        parts += [_list(*items), "`train_config.json` holds every setting."]
    if len(parts) == 1:
        parts.append("No record of it lies beside the weights.")
    return "\n\n".join(parts)


def _start(training: dict[str, Any]) -> str:
    if training["init_from"]:
        return f"the weights of `{training['init_from']}`, of another kind of quantizer encoder and decoder alone"
    if training["data_initialization"]:
        count = training["data_initialization"]
        return f"PCA (linear shortcut) and k-means (codebooks) of {count} training pictures; the rest random"
    return "random weights"


def _loss(training: dict[str, Any]) -> str:
    names = {"l1_weight": "L1", "l2_weight": "L2", "log_l2_weight": "log L2"}
    terms = [f"{training[key]:g} {title}" for key, title in names.items() if training[key]]
    if training["perceptual"] != "none" and training["perceptual_weight"]:
        terms.append(f"{training['perceptual_weight']:g} {training['perceptual'].upper()}")
    terms.append(f"{training['codebook_weight']:g} codebooks")
    if training["adversarial_weight"]:
        weight, start = training["adversarial_weight"], training["adversarial_start"]
        terms.append(f"{weight:g} PatchGAN from update {start:,} on")
    return " + ".join(terms)


def _measurements(records: Records, name: str) -> str:
    if not records.results:
        return "## Measurements\n\nNone lie beside the weights; `dualcodebook evaluate` makes them."
    own = records.own()
    rows = [(name if result in own else result["model"]["name"], result) for result in records.results]
    parts = ["## Measurements", results_table(rows)]
    fitted = [result["model"]["fitted_to"] for result in records.results if result not in own]
    sources = dict.fromkeys(f"{item['pictures']} pictures of `{item['dataset']}` {item['split']}" for item in fitted)
    if sources:
        baseline = (
            "The patch-linear codec is the rival without a network, at the same bits: PCA of patches and two-stage"
        )
        parts.append(_text(baseline, f"k-means, fitted to {' and '.join(sources)}."))
    protocols = [result["protocol"] for result in own]
    sizes = dict.fromkeys(f"`size` {item['size']}, `resample` {item['resample']}" for item in protocols)
    parts.append(f"Protocol: `dualcodebook evaluate`, {'; '.join(sizes)}:")
    definitions = {key: text for item in protocols for key, text in item["definitions"].items()}
    parts.append(_list(*(f"{key}: {definitions[key]}" for key in DEFINITIONS if key in definitions)))
    versions = protocols[0]["versions"]
    made = f"Measured with dualcodebook_hf {versions['dualcodebook_hf']} and torch {versions['torch']} on "
    made += f"{protocols[0]['hardware']['device']}; `metrics.json` holds every number."
    absent = [title for title, key in {"FID": "rfid", "LPIPS": "lpips"}.items() if key not in own[0]["metrics"]]
    parts.append(_text(made, f"There is no {' and no '.join(absent)} among them." if absent else ""))
    return "\n\n".join(parts)


def _limits(records: Records) -> str:
    paper, fields = DualCodebookConfig().fields_dict(), records.fields.fields_dict()
    other = [f"`{name}`" for name, value in fields.items() if value != paper[name] and name not in DERIVED]
    items = [
        f"Not the paper's model, whose {', '.join(other)} differ." if other else "The paper's shape, not its weights."
    ]
    training = (records.train or {}).get("training", {})
    if training and training["perceptual"] == "none" and not training["adversarial_weight"]:
        items.append(
            "Trained for pixels alone, without a perceptual or an adversarial loss: soft textures, visible blocks in "
            "busy areas, unreadable small text."
        )
    if records.train:
        items.append(f"Pictures unlike those of `{records.train['data']['dataset']}` come back less well.")
    if records.results:
        items.append("The numbers hold for the crops that were measured; other sizes were not.")
    return "## Limits\n\n" + _list(*items)


def _origin(records: Records) -> str | None:
    """What was converted, or what training started from."""
    return (records.conversion or {}).get("source") or (records.train or {}).get("training", {}).get("init_from")


def _licence(records: Records, license: str) -> str:
    source = ""
    if license == "other" and _origin(records):
        source = f"The weights come from `{_origin(records)}`: its licence holds."
    text = _text(f"Weights: `{license}`.", source, "Code: Apache-2.0. Please cite the paper:")
    return f"## Licence and citation\n\n{text}\n\n" + _code("bibtex", BIBTEX)


def pipeline_card(pipeline: str, repo_id: str, components: list[str]) -> str:
    """README.md of a diffusers pipeline of class `pipeline` whose `components` are tokenizers of this package."""
    data = ModelCardData(library_name="diffusers", tags=[pipeline, *TAGS])
    code = f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)"""
    listed = " and ".join(f"`{name}`" for name in components)
    text = _text(
        f"A `{pipeline}` of diffusers; its {listed} is a Dual Codebook VQ tokenizer ([arXiv:2503.10832]({PAPER})) of",
        "the package `dualcodebook_hf`, which must be installed: the remote code is one line that imports it.",
    )
    return "\n\n".join(
        [f"---\n{data.to_yaml()}\n---", f"# {repo_id.split('/')[-1]}", text, _code("python", code), MARK, ""]
    )
