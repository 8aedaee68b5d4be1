"""`make static-space`: the page that tokenizes in the browser, with its model and its runtime, into build/static-space.

Needs npm. Everything that the page loads lies there: `dualcodebook push --space you/name --static` publishes it, any
server of files shows it (python -m http.server --directory build/static-space).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from dualcodebook_hf.figures import code_colours
from dualcodebook_hf.files import atomic_folder
from dualcodebook_hf.hub.space import STATIC_BUILD, static_readme
from dualcodebook_hf.loading import load_tokenizer
from dualcodebook_hf.onnx_export import export_onnx
from dualcodebook_hf.version import __version__

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "spaces" / "static"
PAGE = ("index.html", "style.css", "icon.svg", "app.js", "pictures.js", "tokens.js", "worker.js")
# WebGPU's runtime and the CPU's; each is a module that loads another one and a binary.
BINARIES = ("ort-wasm-simd-threaded.asyncify", "ort-wasm-simd-threaded")
RUNTIME = ["ort.webgpu.min.mjs", "ort.wasm.min.mjs", *(f"{name}.{end}" for name in BINARIES for end in ("mjs", "wasm"))]
EXAMPLES = ("astronaut", "coffee", "chelsea", "rocket")  # of scikit-image's wheel, all of them free to use


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or Hub id (default: the checkpoint inside the package)")
    parser.add_argument("--output", type=Path, default=ROOT / STATIC_BUILD)
    parser.add_argument(
        "--npm", type=Path, help="a node_modules that holds onnxruntime-web (default: npm installs one)"
    )
    arguments = parser.parse_args()
    model = load_tokenizer(arguments.model, device="cpu")
    with atomic_folder(arguments.output, replace=True) as folder, tempfile.TemporaryDirectory() as place:
        folder.mkdir()
        for name in PAGE:
            shutil.copyfile(SOURCE / name, folder / name)
        copy_runtime(arguments.npm or install(Path(place)), folder / "ort")
        print(*export_onnx(model, folder, ["_fp16"]), sep="\n")
        write_examples(folder / "examples")
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".onnx", ".wasm")
        }
        codebooks = model.quantize.codebooks.items()
        content = {
            "dualcodebook_hf": __version__,
            "sizes": sizes,
            "examples": [f"{name}.jpg" for name in EXAMPLES],
            "colours": {name: code_colours(codebook.codes()).tolist() for name, codebook in codebooks},
        }
        (folder / "build.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(static_readme(), encoding="utf-8")
    print(f"written to {arguments.output}")


def install(place: Path) -> Path:
    """npm's node_modules, with the version that package.json pins; none of its install scripts is run."""
    shutil.copyfile(SOURCE / "package.json", place / "package.json")
    subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund"], cwd=place, check=True
    )
    return place / "node_modules"


def copy_runtime(modules: Path, folder: Path) -> None:
    """onnxruntime-web's files. Raises ValueError for another version than package.json names."""
    package = modules / "onnxruntime-web"
    version = json.loads((package / "package.json").read_text())["version"]
    wanted = json.loads((SOURCE / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    if version != wanted:
        raise ValueError(f"`npm` must hold onnxruntime-web {wanted}, got {version}")
    folder.mkdir()
    for name in RUNTIME:
        shutil.copyfile(package / "dist" / name, folder / name)


def write_examples(folder: Path) -> None:
    """JPEGs of at most 512 pixels a side."""
    from PIL import Image
    from skimage import data

    folder.mkdir()
    for name in EXAMPLES:
        image = Image.fromarray(getattr(data, name)())
        image.thumbnail((512, 512), Image.Resampling.LANCZOS)
        image.save(folder / f"{name}.jpg", quality=92)


if __name__ == "__main__":
    main()
