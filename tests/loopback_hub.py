"""A Hugging Face Hub on 127.0.0.1 for tests: repositories in memory, and switches that make it fail.

    with LoopbackHub() as hub:
        subprocess.run(..., env=hub.environment(cache_folder))     # or `hub.connect(monkeypatch)` in this process
        hub.files("me/tok")["config.json"]

`fail = {"create": 403}` answers an endpoint (whoami, info, create, validate, preupload, commit, resolve, lfs) with a
status; `cut = "commit"` (or "lfs") closes the connection in the middle of the upload, `cut = "reply"` after the commit
was made. `large` names endings that are uploaded by the LFS protocol.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_loopback"
USER = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}
ROUTES = [
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/(?P<kind>\w+)s/(?P<id>[^/]+/[^/]+)/preupload/main"),
    ("commit", "POST", r"/api/(?P<kind>\w+)s/(?P<id>[^/]+/[^/]+)/commit/main"),
    ("tree", "GET", r"/api/(?P<kind>\w+)s/(?P<id>[^/]+/[^/]+)/tree/[^/]+(/(?P<path>.+))?"),
    ("info", "GET", r"/api/(?P<kind>\w+)s/(?P<id>[^/]+/[^/]+)(/revision/[^/]+)?"),
    ("batch", "POST", r"/((?P<kind>\w+)s/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("lfs", "PUT", r"/lfs/(?P<oid>\w+)"),
    ("resolve", "GET", r"/((?P<kind>\w+)s/)?(?P<id>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)"),
]


class LoopbackHub:
    def __init__(self, large=()):
        self.repos = {}  # (kind, id) -> {"files", "private", "commits"}
        self.objects, self.requests, self.fail, self.cut, self.large = {}, [], {}, None, tuple(large)
        self.user = USER
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache, **more):
        """The environment of a process that takes this server for the Hub."""
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        inherited = {name: value for name, value in os.environ.items() if name not in offline}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        return {**inherited, **hub, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **more}

    def connect(self, monkeypatch):
        """Makes this server the Hub of uploads from this process, which has read its environment already."""
        from huggingface_hub import constants

        settings = {"ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def add(self, repo_id, files=(), kind="model", private=False):
        repo = {"files": {".gitattributes": b"", **dict(files)}, "private": private, "commits": []}
        return self.repos.setdefault((kind, repo_id), repo)

    def files(self, repo_id, kind="model"):
        return self.repos[kind, repo_id]["files"]

    def named(self, *endpoints):
        """How often endpoints were asked."""
        return sum(name in endpoints for name, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        method = {"HEAD": "GET"}.get(self.command, self.command)
        for name, wanted, pattern in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == wanted:
                return self.answer(name, {"kind": None, **match.groupdict()})
        self.body()
        self.reply(404, {"error": "no such endpoint"})

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, name, found):
        hub = self.hub
        hub.requests.append((name, self.path))
        if hub.cut == name:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self.hang_up()
        body, status = self.body(), hub.fail.get(name)
        if status:
            return self.reply(status, {"error": f"the switch says {status}"})
        if name not in ("lfs", "resolve") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."})
        repo = hub.repos.get((found["kind"] or "model", found["id"])) if "id" in found else None
        if "id" in found and repo is None:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        getattr(self, name)(body, repo, found)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def hang_up(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.rfile = self.wfile = open(os.devnull, "r+b")  # noqa: SIM115  (what the base class flushes afterwards)

    def reply(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def whoami(self, *_):
        self.reply(200, self.hub.user)

    def create(self, body, *_):
        wanted = json.loads(body)
        repo_id, kind = f"{wanted['organization']}/{wanted['name']}", wanted.get("type", "model")
        if wanted["organization"] not in ("me", "lab"):
            return self.reply(403, {"error": f"You don't have the rights to create a {kind} under this namespace"})
        if (kind, repo_id) in self.hub.repos:
            return self.reply(409, {"error": "You already created this repo"})
        self.hub.add(repo_id, kind=kind, private=wanted.get("visibility") == "private")
        self.reply(200, {"url": f"{self.hub.url}/{'spaces/' * (kind == 'space')}{repo_id}"})

    def validate(self, *_):
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, body, *_):
        modes = {True: "lfs", False: "regular"}
        paths = [file["path"] for file in json.loads(body)["files"]]
        files = [
            {"path": path, "uploadMode": modes[path.endswith(self.hub.large)], "shouldIgnore": False} for path in paths
        ]
        self.reply(200, {"files": files})

    def batch(self, body, *_):
        def action(item):
            return {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}

        self.reply(200, {"transfer": "basic", "objects": [action(item) for item in json.loads(body)["objects"]]})

    def lfs(self, body, _, found):
        self.hub.objects[found["oid"]] = body
        self.reply(200, {})

    def commit(self, body, repo, found):
        files, title = dict(repo["files"]), ""
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        repo["files"] = files
        repo["commits"].append(title)
        if self.hub.cut == "reply":
            return self.hang_up()
        self.reply(200, {"commitUrl": f"{self.hub.url}/{found['id']}/commit/{_sha(repo)}", "commitOid": _sha(repo)})

    def info(self, _, repo, found):
        siblings = [{"rfilename": path} for path in sorted(repo["files"])]
        self.reply(200, {"id": found["id"], "sha": _sha(repo), "private": repo["private"], "siblings": siblings})

    def tree(self, _, repo, found):
        files = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in sorted(repo["files"].items())
            if path.startswith(f"{found['path']}/" if found["path"] else "")
        ]
        self.reply(200, files)

    def resolve(self, _, repo, found):
        data = repo["files"].get(found["path"])
        if data is None:
            return self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        self.reply(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": _sha(repo)})


def _sha(repo):
    return hashlib.sha1(repr([sorted(repo["files"].items()), repo["commits"]]).encode()).hexdigest()
