"""
A Hugging Face hub on loopback: as much of its protocol as huggingface_hub and datasets speak when
they look a repository up and download it.

    with Hub() as hub:
        hub.add("models", "org/model", folder)  # or "datasets"; the files of the folder and a card
        subprocess.run(..., env=os.environ | hub.env(home))
        hub.requests  # ["GET /api/models/org/model/revision/main", ...]

What the real one does and this one does too: a name and a branch become a commit; trees; etags (the
git hash of a small file, the sha256 of a large one, which it redirects to another address); ranges;
401 with a reason for gated and unknown repositories.
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 100_000  # bytes from which a file is in large-file storage


class Repository:
    def __init__(self, folder):
        self.folder = folder
        self.gated = False  # True: content is for the token hf_letMeIn alone
        # for each of the next downloads of a large file, the byte at which it breaks off
        self.breaks_at = []
        self.commits = {}  # {hash: {file: content}}
        self.revisions = {"main": self.commit()}

    def commit(self):
        """Freeze the folder as it is now; the hash of its commit."""
        files = {"README.md": b"# A card\n", ".gitattributes": b"*.safetensors filter=lfs\n"}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                files[str(path.relative_to(self.folder))] = path.read_bytes()
        digest = hashlib.sha1()
        for name, content in files.items():
            digest.update(name.encode() + content)
        self.commits[digest.hexdigest()] = files
        return digest.hexdigest()

    def tag(self, name):
        self.revisions[name] = self.commit()

    def find(self, revision):
        """(commit hash, {file: content}) of a branch, a tag or a commit; KeyError."""
        commit = self.revisions.get(revision, revision)
        return commit, self.commits[commit]


def oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def entry(name, content):
    """A file as a tree lists it."""
    found = dict(type="file", path=name, size=len(content), oid=oid(content))
    if len(content) >= LARGE:
        found["lfs"] = dict(oid=sha256(content), size=len(content), pointerSize=134)
    return found


def tree(files, inside, recursive):
    """What lies in a folder ("" or "name/"): its files and folders, with `recursive` theirs too."""
    found = {}
    for path, content in files.items():
        if path.startswith(inside):
            first, deeper, _ = path[len(inside) :].partition("/")
            if deeper:
                found[first] = dict(
                    type="directory", path=inside + first, size=0, oid=oid(first.encode())
                )
            if recursive or not deeper:
                found[path] = entry(path, content)
    return list(found.values())


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, dict(error=message), X_Error_Code=code, X_Error_Message=message)

    def has_token(self):
        return self.headers.get("Authorization") == "Bearer hf_letMeIn"

    def do_GET(self):
        # What is asked for: a file in large-file storage, a file, or something of the API
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append(f"{self.command} {path}")
        storage = re.fullmatch(r"/storage/(\w+)", path)
        file = re.fullmatch(r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        api = re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)"
            r"(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?",
            path,
        )
        if storage:
            return self.send_large(storage[1])
        if file:
            kind, name, revision, inside = file.groups()
            kind = kind or "models"
            what = "file"
        elif api:
            kind, name, what, revision, inside = api.groups()
        else:
            return self.refuse(404, "EntryNotFound", "no such page")

        # Of which repository, at which commit
        repository = self.server.hub.repositories.get((kind, name))
        if repository is None:
            # to whoever has no token, the hub does not tell what is private from what is not there
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if what == "file" and repository.gated and not self.has_token():
            message = (
                f"Access to model {name} is restricted. You must have access to it and be "
                "authenticated to access it."
            )
            return self.refuse(401, "GatedRepo", message)
        revision = revision or "main"
        try:
            commit, files = repository.find(revision)
        except KeyError:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")

        if what == "file":
            return self.send_file(repository, commit, files, inside)
        if what == "tree":
            folder = f"{inside}/" if inside else ""
            return self.answer(200, tree(files, folder, "recursive=true" in self.path.lower()))
        if what == "paths-info":
            asked = re.findall(r"paths=([^&]*)", unquote(posted.decode()))
            if not asked:
                asked = json.loads(posted)["paths"]
            return self.answer(200, [entry(name, files[name]) for name in asked if name in files])
        about = dict(id=name, modelId=name, sha=commit, private=False, gated=repository.gated)
        about.update(tags=[], downloads=0, likes=0)
        about["siblings"] = [dict(rfilename=name) for name in files]
        return self.answer(200, about)

    do_HEAD = do_POST = do_GET

    def send_file(self, repository, commit, files, name):
        if name not in files:
            return self.refuse(404, "EntryNotFound", f"{name} is not in the repository")
        content = files[name]
        if len(content) < LARGE:
            headers = dict(ETag=f'"{oid(content)}"', X_Repo_Commit=commit, Accept_Ranges="bytes")
            return self.answer(200, content, **headers)
        key = sha256(content)
        self.server.hub.large[key] = (repository, content)
        headers = dict(X_Repo_Commit=commit, X_Linked_ETag=f'"{key}"', X_Linked_Size=len(content))
        return self.answer(302, Location=f"{self.server.hub.storage}/storage/{key}", **headers)

    def send_large(self, key):
        repository, content = self.server.hub.large[key]
        first = int(re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")[1])
        self.server.hub.requests[-1] += f" from {first}"
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{key}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if repository.breaks_at:  # the connection closes before all that was promised is sent
            content = content[: repository.breaks_at.pop(0)]
            self.close_connection = True
        self.wfile.write(content[first:])
        self.wfile.flush()


class Hub(contextlib.AbstractContextManager):
    def __init__(self):
        self.repositories = {}
        self.requests = []
        self.large = {}  # {sha256: (repository, content)} of what is in large-file storage
        self.servers = []
        self.address = self.start()
        self.storage = self.start()

    def start(self):
        """The address of one more server on a free port."""
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.hub = self
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    def __exit__(self, *error):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def forget(self):
        """Empty the list of requests."""
        self.requests.clear()

    def downloads(self):
        """Names of the files whose content was asked for, ranges included."""
        found = []
        for request in self.requests:
            if request.startswith("GET") and ("/resolve/" in request or "/storage/" in request):
                found.append(request)
        return found

    def add(self, kind, name, folder):
        """Publish the files of a folder as "models" or "datasets" org/name."""
        repository = self.repositories[kind, name] = Repository(Path(folder))
        return repository

    def env(self, home, **more):
        """What a process needs so that it knows no other hub than this one, with its cache in
        `home`."""
        return dict(
            HF_ENDPOINT=self.address,
            HF_HOME=str(home),
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_XET="1",
            **more,
        )
