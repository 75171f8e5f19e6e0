"""A small Hub on 127.0.0.1 for the real client: it makes repositories and keeps what is uploaded.

Large files go through Git LFS, as the Hub asks for weights, all others stand in the commit. It
checks the YAML of a card for nothing but its being there.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What was made and uploaded, by repository and path."""

    def __init__(self, *, refuse=0):
        self.refuse = refuse  # the status of every answer; 0 for a Hub that takes all
        self.repositories, self.files, self.blobs, self.tokens = {}, {}, {}, set()
        self.commits = []


def upload_mode(path):
    return "lfs" if path.endswith(".safetensors") else "regular"


def handler_of(hub):
    """Return the class that answers requests for a Hub."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self):
            repository = self.path.removeprefix("/api/models/")
            if hub.refuse:
                self.answer({"error": "no such repository"}, 404)
            else:
                self.answer({"id": repository, "sha": "0" * 40, "siblings": []})

        def do_PUT(self):
            data = self.body()
            hub.blobs[hashlib.sha256(data).hexdigest()] = data
            self.answer({})

        def do_POST(self):
            data = self.body()
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuse:
                self.answer({"error": "no such organisation"}, hub.refuse)
            elif self.path == "/api/repos/create":
                asked = json.loads(data)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.repositories[name] = asked
                self.answer({"url": f"{hub.url}/{name}", "name": name, "id": name})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": upload_mode(file["path"]),
                        "shouldIgnore": False,
                    }
                    for file in json.loads(data)["files"]
                ]  # fmt: skip
                self.answer({"files": files})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**one, "actions": {"upload": {"href": f"{hub.url}/blobs/{one['oid']}"}}}
                    for one in json.loads(data)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                self.commit(data)
            else:
                self.answer({"error": self.path}, 404)

        def commit(self, data):
            name = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    hub.files[name, value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[name, value["path"]] = hub.blobs[value["oid"]]
            self.answer(
                {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}",
                    "hookOutput": "",
                }
            )

    return Handler


@contextmanager
def running(**settings):
    """Run a Hub; `hub.url` is its address."""
    hub = Hub(**settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
