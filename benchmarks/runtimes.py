"""One tokenizer in every runtime, side by side: CPU time, memory, size on disk, equality. All rows in one run:

    python benchmarks/runtimes.py --exported DIR --static build/static-space --json docs/speed/runtimes.json

`DIR` is what `dualcodebook export faithful --int8` wrote, `build/static-space` what `static_space.py --model faithful`
did. Each runtime gets a process of its own with one thread and does the same pictures of scikit-image, centre crops of
256 pixels, one by one, `--rounds` times. Time is the median CPU time of the process over all rounds and pictures: of
the wall's time a busy machine would make nonsense. Memory is the process's peak resident size. `python
benchmarks/doc_tables.py` then writes the table of docs/runtimes.md.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

PICTURES = ("astronaut", "coffee", "chelsea", "rocket")
SIDE = 256
# name -> (what stands in the table, glob patterns of its files below the folder of the export or of the page)
RUNTIMES = {
    "torch": ("torch", ()),
    "program": ("`torch.export`", ("torch_export/*",)),
    "fp32": ("onnxruntime, float32", ("onnx/*_model.onnx",)),
    "fp16": ("onnxruntime, float16", ("onnx/*_fp16.onnx",)),
    "int8": ("onnxruntime, int8", ("onnx/*_int8.onnx",)),
    "browser": ("Chromium, onnxruntime-web (WASM), float16", ("onnx/*_fp16.onnx",)),
}


def main() -> int:
    """Prints the table and writes the record; or, as a process of its own, one runtime's numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exported", type=Path, required=True, help="of `dualcodebook export --int8`")
    parser.add_argument("--static", type=Path, help="of `make static-space`; without it there is no browser's row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--runtime", choices=RUNTIMES, help=argparse.SUPPRESS)  # what a process of its own does
    arguments = parser.parse_args()
    if arguments.runtime:
        measure = measure_browser if arguments.runtime == "browser" else measure_here
        print(json.dumps(measure(arguments)))  # read by `run`
        return 0
    from timing import report  # imports torch, which the processes of other runtimes are to be without

    return report(parser, lambda: measure_all(arguments), table, arguments.json)


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record that is printed and written."""
    from importlib import metadata

    from timing import machine

    rows = {name: run(name, arguments) for name in RUNTIMES if name != "browser" or arguments.static}
    protocol = {"pictures": list(PICTURES), "side": SIDE, "rounds": arguments.rounds, "threads": 1}
    protocol |= {"machine": machine("cpu"), "onnxruntime": metadata.version("onnxruntime")}
    protocol |= {"load_average": os.getloadavg()[0]}
    return {"protocol": protocol, "rows": compare(rows, arguments)}


def table(record: dict) -> str:
    """The rows, for docs/runtimes.md."""
    from dualcodebook_hf.evaluation.table import markdown_table

    header = ["runtime", "to tokens", "from tokens", "peak memory", "files", "tokens equal to torch's", "PSNR"]
    return markdown_table(
        header,
        [
            [
                RUNTIMES[row["runtime"]][0],
                *(f"{row[f'{kind}_seconds']:.2f} s" for kind in ("encode", "decode")),
                f"{row['memory_bytes'] / 2**20:,.0f} MB",
                f"{row['file_bytes'] / 1e6:.1f} MB",
                f"{row['tokens_equal']:.2%}",
                f"{row['psnr']:.2f} dB",
            ]
            for row in record["rows"]
        ],
    )


def run(name: str, arguments: argparse.Namespace) -> dict:
    """A row, measured in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--runtime", name]
    result = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def crops() -> list[Image.Image]:
    """The pictures: shorter side to `SIDE`, centre crop."""
    from PIL import ImageOps
    from skimage import data

    images = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PICTURES]
    return [ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS) for image in images]


def measure_here(arguments: argparse.Namespace) -> dict:
    """A runtime of Python: seconds, peak memory, tokens and pictures."""
    encode, decode = runtime(arguments.runtime, arguments.exported)
    pixels = [np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255 * 2 - 1 for image in crops()]
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(arguments.rounds + 1):
        tokens = [timed(seconds["encode"], encode, each) for each in pixels]
        decoded = [timed(seconds["decode"], decode, each) for each in tokens]
    return {
        # Without the first round, in which memory is taken and code is read.
        **{name: statistics.median(values[len(pixels) :]) for name, values in seconds.items()},
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens": [each[0].tolist() for each in tokens],
        "pictures": [to_bytes(each[0]).tolist() for each in decoded],
    }


def timed(seconds: list[float], function: Callable, value: np.ndarray) -> np.ndarray:
    """The function's value; its CPU time is noted."""
    began = time.process_time()
    result = function(value)
    seconds.append(time.process_time() - began)
    return result


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8."""
    return np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)


def runtime(name: str, exported: Path) -> tuple[Callable, Callable]:
    """The two functions of a runtime, of numpy arrays."""
    if name in ("torch", "program"):
        import torch

        torch.set_grad_enabled(False)
        if name == "torch":
            from dualcodebook_hf.loading import load_tokenizer

            model = load_tokenizer("faithful", device="cpu")
            functions = model.tokenize, model.detokenize
        else:
            functions = (
                torch.export.load(exported / "torch_export" / f"{part}.pt2").module() for part in ("encoder", "decoder")
            )
        return tuple(lambda value, f=function: f(torch.from_numpy(value)).numpy() for function in functions)
    import onnxruntime

    from dualcodebook_hf.onnx_runtime import OnnxTokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    variant = None if name == "fp32" else name
    tokenizer = OnnxTokenizer.from_pretrained(exported, variant=variant, session_options=options)
    return tokenizer.tokenize, tokenizer.detokenize


def measure_browser(arguments: argparse.Namespace) -> dict:
    """The page in Chromium, without shared memory and so with one thread; its seconds are of the wall."""
    import io

    from playwright.sync_api import sync_playwright

    handler = functools.partial(Quiet, directory=str(arguments.static))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found: dict = {"encode": [], "decode": [], "tokens": [], "pictures": []}
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        context = browser.new_context(bypass_csp=True)
        context.set_default_timeout(300_000)
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("#status:has-text('Showing')")
        for _ in range(arguments.rounds + 1):
            for name, image in zip(PICTURES, crops(), strict=True):
                content = io.BytesIO()
                image.save(content, "PNG")
                file = {"name": f"{name}.png", "mimeType": "image/png", "buffer": content.getvalue()}
                page.locator("#picture-file").set_input_files(file)
                page.wait_for_selector(f"#status:has-text('Showing “{name}.png”')")
                numbers = dict(
                    zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True)
                )
                found["encode"].append(float(numbers["To tokens"].split()[0]))
                found["decode"].append(float(numbers["From tokens"].split()[0]))
                for button, kind in (("#save-tokens", "tokens"), ("#save-picture", "pictures")):
                    with page.expect_download() as download:
                        page.locator(button).click()
                    found[kind].append(Path(download.value.path()).read_bytes())
        found["memory"] = memory_of_children()
        browser.close()
    return read_downloads(found)


def read_downloads(found: dict) -> dict:
    """What `measure_here` gives, of what the page let us save."""
    import io

    from safetensors.numpy import load

    count = len(PICTURES)
    return {
        "encode": statistics.median(found["encode"][count:]),
        "decode": statistics.median(found["decode"][count:]),
        "memory": found["memory"],
        "tokens": [load(each)["0000.tokens"].tolist() for each in found["tokens"][-count:]],
        "pictures": [
            np.array(Image.open(io.BytesIO(each)).convert("RGB")).tolist() for each in found["pictures"][-count:]
        ],
    }


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that says nothing."""

    def log_message(self, *_: object) -> None:
        pass


def memory_of_children() -> int:
    """Peak resident bytes of the largest process of the browser: that of the page."""
    peaks = [0]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
            command = (status.parent / "cmdline").read_text()
        except OSError:
            continue
        if "--type=renderer" in command and "VmHWM:" in text:
            peaks.append(int(text.split("VmHWM:")[1].split()[0]) * 1024)
    return max(peaks)


def compare(rows: dict[str, dict], arguments: argparse.Namespace) -> list[dict]:
    """The table's rows: the tokens and pictures of each beside torch's."""
    from dualcodebook_hf.image_processing_dualcodebook import to_pixels
    from dualcodebook_hf.metrics.images import psnr

    def in_0_1(image: Image.Image) -> torch.Tensor:
        return (to_pixels(image)[None] + 1) / 2

    reference, compared = rows["torch"], []
    for name, row in rows.items():
        equal = np.mean([np.mean(np.equal(*pair)) for pair in zip(row["tokens"], reference["tokens"], strict=True)])
        pictures = [Image.fromarray(np.array(picture, np.uint8)) for picture in row["pictures"]]
        values = [psnr(in_0_1(one), in_0_1(other)).item() for one, other in zip(pictures, crops(), strict=True)]
        compared.append(
            {
                "runtime": name,
                "encode_seconds": row["encode"],
                "decode_seconds": row["decode"],
                "memory_bytes": row["memory"],
                "file_bytes": size_of(name, arguments),
                "tokens_equal": float(equal),
                "psnr": float(np.mean(values)),
            }
        )
    return compared


def size_of(name: str, arguments: argparse.Namespace) -> int:
    """Bytes of a runtime's own files."""
    from dualcodebook_hf.loading import default_checkpoint

    if name == "torch":
        paths = list(Path(default_checkpoint("faithful")).glob("*.safetensors"))
    else:
        folder = arguments.static if name == "browser" else arguments.exported
        paths = [path for pattern in RUNTIMES[name][1] for path in folder.glob(pattern)]
    return sum(path.stat().st_size for path in paths)


if __name__ == "__main__":
    sys.exit(main())
