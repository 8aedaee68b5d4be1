"""What a stranger can ask of the Space: every event refuses every file but uploads, and no request takes too much."""

from __future__ import annotations

import io
import json
import os
import random
import socket
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from demo_models import make_model
from PIL import Image

from dualcodebook_hf.tokens.file import TokenFile, TokenizedImage, load_tokens, save_tokens
from dualcodebook_hf.weights import encoder_hash

pytest.importorskip("gradio")
from gradio.utils import get_upload_folder

from dualcodebook_hf.demo import build_demo, launch_options, limits, reading
from dualcodebook_hf.demo.gate import FAILURE, REFUSAL
from dualcodebook_hf.demo.inspection import MOST_IMAGES, read_image_tokens, save_image_tokens

TIMEOUT = 60  # seconds: an answer that does not come is a failure
FILE = {"_type": "gradio.FileData"}


class App:
    """The running app as a stranger sees it, and its list of events."""

    def __init__(self, demo, url: str) -> None:
        self.demo, self.url, self.folder = demo, url, Path(get_upload_folder())
        # After an error in its code a server answers 500 and closes: a connection of its own for each request.
        self.http = httpx.Client(base_url=url, timeout=TIMEOUT, limits=httpx.Limits(max_keepalive_connections=0))

    def upload(self, name: str, content: bytes) -> str:
        answer = self.http.post("gradio_api/upload", files={"files": (name, content)})
        assert answer.status_code == 200, answer.text
        return answer.json()[0]

    def join(self, fn_index: int, data: list, session: str, **more) -> httpx.Response:
        """Puts an event into the queue."""
        body = {"data": data, "fn_index": fn_index, "session_hash": session, **more}
        return self.http.post("gradio_api/queue/join", json=body)

    def run(self, fn_index: int, data: list, session: str | None = None, **more) -> dict:
        """An event's answer, by the way that the page takes."""
        session = session or uuid.uuid4().hex
        event_id = self.join(fn_index, data, session, **more).json()["event_id"]
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed" and message["event_id"] == event_id:
                    return message["output"]
        raise AssertionError("the stream ended without an answer")

    def call(self, name: str, data: list) -> str:
        """A public event's answer, by the way of plain HTTP: lines of text."""
        event = self.http.post(f"gradio_api/call/{name}", json={"data": data}).json()["event_id"]
        return self.http.get(f"gradio_api/call/{name}/{event}").text

    def function(self, name: str) -> int:
        return next(index for index, fn in self.demo.fns.items() if fn.api_name == name)

    def defaults(self, fn_index: int) -> list:
        """Harmless values of an event's inputs."""
        return [0 if block.get_block_name() == "dataset" else getattr(block, "value", None)
                if getattr(block, "data_model", None) is None and not block.stateful else None
                for block in self.demo.fns[fn_index].inputs]  # fmt: skip


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret") / "tiny-model"
    make_model(0).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        demo = build_demo([str(folder)])
        _, url, _ = demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
        yield App(demo, url)
        demo.close(verbose=False)


def png(size: tuple[int, int] = (24, 16), color: tuple[int, int, int] = (9, 99, 199)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def endless_jpeg() -> bytes:
    """Two megabytes whose 60,000 scans each go over 16 megapixels: ten minutes for libjpeg."""
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 4000), (10, 200, 30)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * 60_000 + content[-2:]


@pytest.fixture(scope="module")
def forbidden(app, tmp_path_factory):
    """(what no event may read, by a word for it; a socket that nobody may call)."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "x.png").write_bytes(png())
    os.mkfifo(outside / "fifo")
    os.mkfifo(app.folder / "fifo.png")
    (app.folder / "link.png").symlink_to(outside / "x.png")
    (app.folder / "folder").symlink_to(outside)
    mine = app.upload("mine.png", png())
    gone = app.upload("gone.png", png(color=(1, 2, 3)))
    Path(gone).unlink()
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
    paths = {
        "a file outside": str(outside / "x.png"),
        "a file of the package": reading.__file__,
        "a device": "/dev/zero",
        "a FIFO": str(outside / "fifo"),
        "a FIFO among the uploads": str(app.folder / "fifo.png"),
        "dots": os.path.join(app.folder, os.path.relpath(outside / "x.png", app.folder)),
        "a link": str(app.folder / "link.png"),
        "a folder that is a link": str(app.folder / "folder" / "x.png"),
        "a relative path": os.path.relpath(outside / "x.png"),
        "an address": address,
        "a file URL": f"file://{mine}",
        "a folder": str(app.folder),
        "a deleted upload": gone,
        "nothing there": str(outside / "nowhere.png"),
        "a null character": f"{mine}\0",
        "a long name": f"{app.folder}/{'a' * 300}.png",
        "a long path": "/a" * 10_000,
        "no text": 7,
    }
    files = {word: {"path": path} for word, path in paths.items()}
    files["marked as a file"] = {"path": paths["a file outside"], "meta": FILE}
    files["marked as a stream"] = {"path": paths["a file outside"], "meta": FILE, "is_stream": True}
    files["an address, marked"] = {"path": address, "url": address, "meta": FILE}
    files["an address alone"] = {"url": address, "meta": FILE}
    files["with another's url"] = {"path": paths["a device"], "url": mine, "orig_name": mine, "meta": FILE}
    yield files, listener
    listener.close()


@pytest.mark.parametrize("share", [0.25, pytest.param(1, marks=pytest.mark.slow)])
def test_every_event_reads_uploads_and_nothing_else(app, forbidden, share):
    """Every event by some of the inputs and files, drawn once; `make test-all`: by all of them."""
    files, listener = forbidden
    requests = []
    for index, fn in app.demo.fns.items():
        defaults = app.defaults(index)
        places = [place for place, block in enumerate(fn.inputs) if not block.stateful]
        for word, file in files.items():
            for place in places:
                requests.append((f"{fn.api_name}, input {place}: {word}", index, defaults, place, file))
            requests.append(
                (f"{fn.api_name}, a click: {word}", index, defaults, None, {"index": [0, 0], "value": file})
            )

    requests = random.Random(0).sample(requests, round(share * len(requests)))

    def ask(request: tuple) -> str | None:
        _, index, defaults, place, value = request
        if place is None:
            return app.run(index, defaults, event_data=value).get("error")
        return app.run(index, [*defaults[:place], value, *defaults[place + 1 :]]).get("error")

    with ThreadPoolExecutor(16) as pool:
        answers = dict(zip([request[0] for request in requests], pool.map(ask, requests), strict=True))
    assert {word: answer for word, answer in answers.items() if answer != REFUSAL} == {}
    assert len({request[1] for request in requests}) == len(app.demo.fns)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    index = app.function("show_image")
    assert app.run(index, [{"path": app.upload("b.png", png())}, *app.defaults(index)[1:]])["data"]


def test_other_shapes_of_an_input_are_refused_too(app, forbidden):
    path = forbidden[0]["a file outside"]["path"]
    for index, fn in app.demo.fns.items():
        defaults = app.defaults(index)
        for place, block in enumerate(fn.inputs):
            if getattr(block, "data_model", None) is not None:
                for value in (path, [path], [{"path": path}], {"image": {"path": path}}, {}, 7, "a" * 20_000):
                    data = [*defaults[:place], value, *defaults[place + 1 :]]
                    assert app.run(index, data).get("error") == REFUSAL, (fn.api_name, value)


def test_plain_http_passes_the_same_gate(app, forbidden):
    label = next(iter(app.defaults(app.function("tokenize"))[1:]))
    for name, rest in (("reconstruct", [label]), ("tokenize", [label]), ("detokenize", [label, 1])):
        for word, file in forbidden[0].items():
            answer = app.call(name, [file, *rest])
            assert "event: error" in answer and json.dumps(REFUSAL) in answer, (name, word)
    assert "event: complete" in app.call("tokenize", [{"path": app.upload("c.png", png())}, label])
    body = {"image": forbidden[0]["a file outside"], "model": label}
    event = app.http.post("gradio_api/call/v2/tokenize", json=body).json()["event_id"]
    assert json.dumps(REFUSAL) in app.http.get(f"gradio_api/call/v2/tokenize/{event}").text
    for index in [index for index, fn in app.demo.fns.items() if not fn.queue]:
        for word, file in forbidden[0].items():
            answer = app.http.post("gradio_api/run/predict", json={"data": [file], "fn_index": index})
            assert answer.json()["error"] == REFUSAL, word


def test_examples_are_uploads_of_the_app(app):
    index = app.function("take_example")
    picture = app.run(index, [], event_data={"index": 1})["data"][0]
    assert picture["path"].startswith(str(app.folder))
    for place in (99, -99, "a", None):
        assert app.run(index, [], event_data={"index": place})["error"] == FAILURE
    index = app.function("show_image")
    assert app.run(index, [picture, *app.defaults(index)[1:]])["data"]


def test_routes_serve_uploads_and_nothing_else(app, forbidden):
    files, listener = forbidden
    for word, file in files.items():
        path = file.get("path") or file["url"]
        if word not in ("a null character", "no text", "a FIFO among the uploads"):
            for route in (f"file={path}", f"file/{path}", f"proxy={path}"):
                answer = app.http.get(f"gradio_api/{route}")
                assert answer.status_code in (400, 403, 404), (word, route)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    mine = app.upload("d.png", png())
    assert app.http.get(f"gradio_api/file={mine}").content == png()
    session = uuid.uuid4().hex
    app.run(app.function("take_example"), [], session, event_data={"index": 0})
    for method, route in [
        ("GET", f"gradio_api/deep_link?session_hash={session}"),
        ("POST", "gradio_api/component_server"),
        ("POST", "gradio_api/process_recording"),
        ("POST", "gradio_api/run/tokenize"),
        ("POST", "gradio_api/api/tokenize"),
        ("POST", "gradio_api/stream/x"),
        ("POST", "gradio_api/vibe-edit"),
        ("GET", "gradio_api/dev/reload"),
        ("GET", "gradio_api/token"),
        ("GET", "monitoring"),
        ("GET", "monitoring/summary"),
        ("GET", "openapi.json"),
        ("POST", "login"),
    ]:
        assert app.http.request(method, route, json={"data": []}).status_code == 404, route


def test_no_answer_tells_where_the_server_keeps_things(app, forbidden, tmp_path):
    index, session = app.function("show_image"), uuid.uuid4().hex
    defaults = app.defaults(index)
    answers = [app.http.get(route).text for route in ("", "config", "gradio_api/info", "gradio_api/openapi.json")]
    shown = app.run(index, [{"path": app.upload("e.png", png())}, *defaults[1:]], session)
    broken = app.run(index, [{"path": app.upload("broken.png", png()[:40])}, *defaults[1:]])
    failed = app.run(app.function("look_up"), [None, "a b"], session)
    short = app.run(index, [])
    unknown = app.run(index, [{"path": app.upload("e.png", png())}, "<b>/etc</b>", *defaults[2:]])
    tokens = app.run(app.function("open_tokens"), [{"path": app.upload("f.safetensors", b"nothing")}, defaults[1]])
    assert "cannot read image &#x27;broken.png&#x27;: " in broken["data"][1]
    assert "cannot read token file &#x27;f.safetensors&#x27;: " in tokens["data"][1]
    assert failed["error"] == short["error"] == FAILURE
    assert "`model` must be one of tiny-model, got &#x27;&lt;b&gt;/etc&lt;/b&gt;&#x27;" in unknown["data"][1]
    answers += [json.dumps(answer) for answer in (shown, broken, failed, short, unknown, tokens)]
    answers += [app.http.get(f"gradio_api/{route}").text for route in ("file=x", "nothing")]
    answers += [app.http.post("gradio_api/call/nothing", json={"data": []}).text]
    for answer in answers:
        for secret in (Path(reading.__file__).parents[2], Path(np.__file__).parents[1], Path.cwd(), tmp_path.parent):
            # Its own folder of uploads is part of the address of each picture on the page.
            assert str(secret) not in answer.replace(str(app.folder), "").replace(str(forbidden), "")
        assert "Traceback" not in answer and "secret" not in answer and '.py"' not in answer


def test_a_file_that_never_ends_stops_neither_the_app_nor_the_queue(app, monkeypatch):
    label = app.defaults(app.function("tokenize"))[1]
    assert "event: complete" in app.call("tokenize", [{"path": app.upload("g.png", png())}, label])
    monkeypatch.setattr(reading, "READING_SECONDS", 2)
    monkeypatch.setattr(limits, "WAITING_PER_VISITOR", 3)
    endless = {"path": app.upload("endless.jpg", endless_jpeg())}
    index, sessions = app.function("tokenize"), [uuid.uuid4().hex for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda session: app.run(index, [endless, label], session), sessions)
        while sum(queue.current_concurrency for queue in app.demo._queue.event_queue_per_concurrency_id.values()) < 2:
            time.sleep(0.05)
        status = [app.join(index, [None, label], "waiting").status_code for _ in range(4)]
        assert status == [200, 200, 200, 503]
        text = "'endless.jpg' cannot be read within the 2 seconds that this app takes for it"
        assert [answer["error"] for answer in answers] == [text, text]
    assert "event: complete" in app.call("tokenize", [{"path": app.upload("g.png", png())}, label])


def test_only_formats_that_pil_itself_decodes_are_read(app):
    label = app.defaults(app.function("tokenize"))[1]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")  # PIL would start Ghostscript
    answer = app.call("tokenize", [{"path": app.upload("a.png", buffer.getvalue())}, label])
    assert "cannot read image 'a.png': not in an image format that is known here" in answer


def test_a_name_as_long_as_names_can_be(app):
    label = app.defaults(app.function("tokenize"))[1]
    path = app.upload("ü" * 100 + ".png", png())
    assert "event: complete" in app.call("tokenize", [{"path": path}, label])


def test_requests_have_a_size(app):
    large = {"data": ["a" * limits.LARGEST_CALL]}
    assert app.http.post("gradio_api/call/tokenize", json=large).status_code == 413
    unsaid = (part for part in [b'{"data": []}'])  # no Content-Length
    assert app.http.post("gradio_api/call/tokenize", content=unsaid).status_code == 413


def test_uploads_have_a_quota_and_the_oldest_go_first(app, monkeypatch):
    monkeypatch.setattr(limits, "DISK", 8 * 2**20)
    examples = {path for block in app.demo.blocks.values() for path in getattr(block, "keep_in_cache", ())}
    limits.make_room(app.folder, 0, examples)
    paths = []
    for index in range(12):
        paths.append(app.upload(f"{index}.bin", bytes([index]) * 2**20))
        os.utime(paths[-1], (time.time() - 100 + index,) * 2)
    there = [Path(path).exists() for path in paths]
    assert there == sorted(there) and not there[0] and 6 <= sum(there) <= 8
    assert examples and all(Path(path).exists() for path in examples)
    answer = app.http.post("gradio_api/upload", files={"files": ("a.bin", bytes(3 * 2**20))})
    assert (answer.status_code, answer.text) == (503, "Too many uploads at once. Please try again later.")


def test_an_upload_that_does_not_end_is_ended(app, monkeypatch):
    monkeypatch.setattr(limits, "UPLOAD_SECONDS", 0.5)
    host, port = httpx.URL(app.url).host, httpx.URL(app.url).port
    with socket.create_connection((host, port), timeout=TIMEOUT) as slow:
        slow.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    assert app.upload("h.png", png())


def test_make_room_leaves_what_is_new_or_kept(tmp_path):
    for index, name in enumerate(["kept", "old", "older", "new"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(bytes(1000))
        os.utime(tmp_path / name / "a", (time.time() - 100 + index,) * 2)
    left = lambda: sorted(path.parent.name for path in tmp_path.glob("*/a"))  # noqa: E731
    kept = {str(tmp_path / "kept" / "a")}
    limits.make_room(tmp_path, 3 * limits.SMALLEST_SHARE, kept)
    assert left() == ["kept", "new", "old", "older"]
    limits.make_room(tmp_path, 2 * limits.SMALLEST_SHARE, kept)
    assert left() == ["kept", "new", "older"]
    os.utime(tmp_path / "new" / "a", (time.time() - limits.RETENTION - 1,) * 2)
    limits.make_room(tmp_path, 2 * limits.SMALLEST_SHARE, kept)
    assert left() == ["kept", "older"]


def test_a_token_file_of_very_many_pictures_is_refused(tmp_path):
    model = make_model(0)
    tokens = torch.zeros(2, 1, 1, dtype=torch.long)
    images = [TokenizedImage(f"{index}.png", (4, 4), tokens) for index in range(MOST_IMAGES + 1)]
    save_tokens(tmp_path / "many.safetensors", TokenFile.of_model(model, images))
    with pytest.raises(reading.Rejected, match=r"'many.safetensors' holds 65 pictures; this app decodes at most 64"):
        read_image_tokens(model, encoder_hash(model), tmp_path / "many.safetensors")
    save_tokens(tmp_path / "few.safetensors", TokenFile.of_model(model, images[1:]))
    assert len(read_image_tokens(model, encoder_hash(model), tmp_path / "few.safetensors")) == MOST_IMAGES


def test_tokens_of_a_long_name_are_stored(tmp_path):
    model = make_model(0)
    upload = reading.Upload("😀" * 62 + ".png", Image.new("RGB", (4, 4)), (4, 4), 1, [])
    path = save_image_tokens(model, encoder_hash(model), upload, torch.zeros(2, 1, 1, dtype=torch.long), tmp_path)
    assert load_tokens(path).images[0].name == upload.name
