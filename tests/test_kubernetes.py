"""What a batch asks of Kubernetes, by servers on the loopback that are only pretended."""

import json
import math
import os
import re
import shutil
import subprocess
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import LAUNCH
from mtprune_utils.files import PROJECT
from mtprune_utils.run import cluster
from mtprune_utils.run.cluster import Cluster

PACKAGES = PROJECT / ".venv" / "kubernetes"  # see KUBERNETES in Makefile
pytestmark = pytest.mark.skipif(
    not PACKAGES.is_dir() and "CI" not in os.environ, reason="make test installs what it needs"
)
OVERRIDES = {"seeds": 1, "controls.seeds": 0, "tuning.trials": 0}
KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: here
contexts: [{name: here, context: {cluster: here, user: me}}]
clusters: [{name: here, cluster: {server: "URL"}}]
users: [{name: me, user: {}}]
"""


class Server(ThreadingHTTPServer):
    """Kubernetes' API and an object storage in one.

    It takes secrets and jobs; every job has failed by the time it is asked for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []  # (method, path) of each request
        self.jobs: list[dict] = []
        self.objects: dict[str, bytes] = {}  # by "/<bucket>/<key>"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.content())
        if self.path.endswith("/jobs"):
            self.server.jobs.append(body)
        self.answer(body)

    def do_GET(self):
        if self.path.startswith("/api"):
            self.answer({"items": []} if "/pods" in self.path else {"status": {"failed": 1}})
        elif "?" in self.path:  # a list
            self.send(200, b"<ListBucketResult></ListBucketResult>")
        else:
            self.do_HEAD()

    def do_HEAD(self):
        is_bucket = self.path.strip("/").count("/") == 0
        found = b"" if is_bucket else self.server.objects.get(self.path)
        self.send(404 if found is None else 200, found or b"")

    def do_PUT(self):
        self.server.objects[self.path] = self.content()
        self.send(200, b"")

    def do_DELETE(self):
        self.content()
        if self.path.startswith("/api"):
            self.answer({})
        else:
            self.server.objects.pop(self.path, None)
            self.send(204, b"")

    def content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, body: dict) -> None:
        self.server.asked.append((self.command, self.path))
        self.send(200, json.dumps(body).encode(), "application/json")

    def send(self, status: int, content: bytes, kind: str = "application/xml") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", formatdate(usegmt=True))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The server, after a batch that was started as a user would and whose first job failed."""
    place = tmp_path_factory.mktemp("kubernetes")
    repository = place / "repository"
    for folder in ("mtprune_utils", "notebooks", "cluster"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(PROJECT / folder, repository / folder, ignore=ignored)
    shutil.copy(PROJECT / "Snakefile", repository)
    server = Server()
    here = f"http://127.0.0.1:{server.server_port}"
    path = repository / "cluster/kubernetes/config.yaml"  # as a user edits it
    text = path.read_text().replace("IMAGE", "example/mtprune:1").replace("BUCKET", "bucket")
    text = text.replace("# storage-s3-endpoint-url: URL", f"storage-s3-endpoint-url: {here}")
    text = text.replace("retries: 3", "retries: 0").replace("checks: 20", "checks: 1")
    path.write_text(text.replace("namespace: default", "namespace: pruning"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        (place / "kubeconfig").write_text(KUBECONFIG.replace("URL", here))
        command = [
            *LAUNCH,
            "figures",
            "--profile",
            "smoke",
            "--overrides",
            json.dumps(OVERRIDES),
            "--on",
            "kubernetes",
        ]
        paths = [str(repository), str(PACKAGES), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "KUBECONFIG": str(place / "kubeconfig"),
            "SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "key",
            "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "secret",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_REGION": "here",
        }
        result = subprocess.run(
            command, cwd=repository, env=environment, capture_output=True, text=True, timeout=240
        )
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 1, result.stdout + result.stderr
    log = (repository / "runs/smoke/snakemake.log").read_text()
    assert server.jobs, result.stdout + log
    return server


def test_a_job_asks_for_image_command_and_all_it_needs(asked):
    (job,) = asked.jobs  # nothing else can start before the dense network
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "example/mtprune:1"
    assert container["command"] == ["/bin/sh"] and container["args"][0] == "-c"
    command = container["args"][1]
    assert re.search(r"--target-jobs .?dense:name=seed0-multitask-\w+", command)
    for words in ("-m snakemake --deploy-sources", "--default-storage-prefix", "s3://bucket/"):
        assert words in command
    needed = {"memory": "4000M", "ephemeral-storage": "10000M", "nvidia.com/gpu": "1"}
    assert container["resources"]["requests"] == needed | {"cpu": "950m"}
    assert container["resources"]["limits"] == needed | {"cpu": "1000m"}
    assert {t["key"] for t in pod["tolerations"]} == {"nvidia.com/gpu"}
    assert pod["restartPolicy"] == "Never" and job["spec"]["backoffLimit"] == 0


def test_it_keeps_to_its_namespace_and_leaves_no_secret(asked):
    assert all("/namespaces/pruning/" in path for _, path in asked.asked)
    kinds = [(method, path.split("/pruning/")[1].split("/")[0]) for method, path in asked.asked]
    assert kinds.count(("POST", "secrets")) == kinds.count(("DELETE", "secrets")) == 1


def test_the_profile_names_what_there_is_and_shares_no_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="config.yaml: put your own in place of BUCKET, IMAGE"):
        Cluster("kubernetes", tmp_path)
    shutil.copytree(PROJECT / "cluster", tmp_path / "cluster")
    path = tmp_path / "cluster/kubernetes/config.yaml"
    path.write_text(path.read_text().replace("IMAGE", "mine").replace("BUCKET", "mine"))
    monkeypatch.setattr(cluster, "PROJECT", tmp_path)
    edited = Cluster("kubernetes", tmp_path)
    assert not edited.shares_files and edited.cancel() == 0
    path.write_text(path.read_text().replace("jobs: 100", "jobs: unlimited"))
    assert (edited.most, Cluster("kubernetes", tmp_path).most) == (100, math.inf)
    with pytest.raises(ValueError, match="unknown cluster 'kubernets': did you mean"):
        Cluster("kubernets", tmp_path)
