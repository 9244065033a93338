"""Loading from the hub, through the real client and a stand-in for the hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

NAME, COMMIT = "owner/points", "a" * 40


@pytest.fixture
def files(tmp_path):
    """A repository's files: path to bytes."""
    features = datasets.Features(
        {"a": datasets.Value("float32"), "label": datasets.ClassLabel(names=["n", "p"])}
    )
    found = {"README.md": b"points"}
    for split, values in (("train", [0.0, 1.0, 2.0]), ("test", [5.0])):
        file = tmp_path / f"{split}.parquet"
        table = {"a": values, "label": [int(v) % 2 for v in values]}
        datasets.Dataset.from_dict(table, features).to_parquet(file)
        found[f"data/{split}-00000-of-00001.parquet"] = file.read_bytes()
    return found


@pytest.fixture
def hub(files):
    """The address of a server that answers what the client asks of a data set's repository."""
    api, content = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/"

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            name = path.removeprefix(content).partition("/")[2]
            if path.startswith(content) and name in files:
                etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                self.answer(files[name], {"X-Repo-Commit": COMMIT, "ETag": etag})
            elif path.startswith(f"{api}/tree/{COMMIT}"):
                folder = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
                self.answer(json.dumps([*self.listing(folder)]).encode())
            elif path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode())
            else:
                self.answer(b"{}", {"X-Error-Code": "EntryNotFound"}, status=404)

        do_HEAD = do_GET

        def listing(self, folder):
            for name, data in files.items():
                if name.startswith(folder):
                    oid = hashlib.sha1(data).hexdigest()
                    yield {"type": "file", "path": name, "size": len(data), "oid": oid}
            if not folder:
                yield {"type": "directory", "path": "data", "size": 0, "oid": "b" * 40}

        def answer(self, body, headers=None, status=200):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load_in_new_process(tmp_path, endpoint, name):
    """The client reads its address when it is imported, hence another process."""
    code = f"""
from fl_common.data.sources import load
data = load("huggingface", {name!r}, cache_dir={str(tmp_path / "cache")!r})
print(data.train.x.tolist(), data.train.y.tolist(), data.test.x.tolist(), data.classes)
"""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("revision", ["", "@" + COMMIT])
def test_a_data_set_of_the_hub_is_downloaded_once(tmp_path, hub, revision):
    expected = "[[0.0], [1.0], [2.0]] [0, 1, 0] [[5.0]] ('n', 'p')"
    cold = load_in_new_process(tmp_path, hub, NAME + revision)
    assert cold.stdout.strip() == expected, cold.stderr
    nobody = "http://127.0.0.1:9"
    warm = load_in_new_process(tmp_path, nobody, NAME + revision)
    assert warm.stdout.strip() == expected, warm.stderr


def test_a_data_set_that_the_hub_does_not_have(tmp_path, hub):
    failed = load_in_new_process(tmp_path, hub, "owner/nothing")
    assert (
        failed.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "fl_common.data.errors.DataError: cannot load owner/nothing from the Hugging Face hub"
        )
    )
