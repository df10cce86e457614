"""What scripts/image-test does with an image that is built: runs it by runc, and says what it found.

It is run as a file, by whatever python3 there is, so it has the standard library only:
python3 tests/image.py ROOT IMAGE.json BUNDLE
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

NAME = f"image-test-{os.getpid()}"
LABELS = ("title", "description", "licenses", "version", "revision", "created", "base.name")
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"word "}}]}\n\n'


class Engine(BaseHTTPRequestHandler):
    """Streams an event, and the rest when it is let go."""

    protocol_version = "HTTP/1.1"
    let_go = threading.Event()

    def do_GET(self) -> None:
        self._head("application/json", "content-length", "2")
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._head("text/event-stream", "transfer-encoding", "chunked")
        self._chunk(EVENT)
        self.let_go.wait(30)
        self._chunk(EVENT + b"data: [DONE]\n\n")
        self._chunk(b"")

    def _head(self, kind: str, *framing: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header(*framing)
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, *args: object) -> None:
        """Not here."""


def check(what: str, holds: object, found: object = "") -> None:
    """One line for each thing that is asked of the image; the first that does not hold is the last."""
    print(f"  {'ok  ' if holds else 'FAIL'} {what}{f': {found}' if found != '' else ''}", flush=True)
    if not holds:
        sys.exit(1)


def until(condition: Callable[[], Any], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get(port: int, path: str) -> int:
    """The status of a GET, 0 if nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def bundle_of(root: str, image: dict[str, Any], folder: Path, environ: dict[str, str], catalogue: Path) -> None:
    """An OCI bundle with what a careful cluster allows: nothing may be written, nobody is root, no capability."""
    folder.mkdir()
    subprocess.run(["runc", "spec"], cwd=folder, check=True)
    config = json.loads((folder / "config.json").read_text())
    uid, _, gid = image["User"].partition(":")
    config["process"] |= {
        "terminal": False,
        "user": {"uid": int(uid), "gid": int(gid)},
        "args": [*image["Entrypoint"], *image["Cmd"]],
        "env": [*image["Env"], *(f"{name}={value}" for name, value in environ.items())],
        "cwd": image.get("WorkingDir") or "/",
        "capabilities": {},
        "noNewPrivileges": True,
    }
    config["root"] = {"path": root, "readonly": True}
    # The host's network, so that what is asked reaches it; /sys cannot be mounted then.
    config["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    mounts = [mount for mount in config["mounts"] if mount["destination"] in ("/proc", "/dev")]
    bind = {"destination": "/mnt", "source": str(catalogue.parent), "type": "bind", "options": ["rbind", "ro"]}
    config["mounts"] = [*mounts, bind]
    (folder / "config.json").write_text(json.dumps(config))


@contextmanager
def running(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["runc", "run", NAME], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield process
        except BaseException:
            print((folder / "log").read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            subprocess.run(["runc", "delete", "--force", NAME], capture_output=True, check=False)
            process.wait(10)


def inside(*command: str) -> str:
    """What a command in the container writes."""
    done = subprocess.run(["runc", "exec", NAME, *command], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def check_image(image: dict[str, Any], root: Path) -> None:
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in image["Labels"].items()}
    for label in LABELS:
        check(f"label {label}", labels.get(label), labels.get(label))
    check("user", image["User"] == "10001:10001", image["User"])
    check("stop signal", image["StopSignal"] == "SIGTERM", image["StopSignal"])
    packages = {path.name.partition("-")[0] for path in root.glob("opt/venv/lib/python3*/site-packages/*.dist-info")}
    check("no installer in it", not packages & {"pip", "setuptools", "wheel", "hatchling"}, f"{len(packages)} packages")
    # What the chart can turn on: traces, limits in Redis, and the control plane on either database.
    extras = {"opentelemetry_sdk", "redis", "hiredis", "asyncpg", "joserfc", "fastapi", "alembic", "argon2_cffi"}
    check("the extras", extras <= packages, sorted(extras - packages))
    site = "opt/venv/lib/python3*/site-packages"
    sources = [path for name in ("inference_api", "control_plane") for path in root.glob(f"{site}/{name}/**/*.py")]
    compiled = [path for path in sources if any((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"))]
    check("compiled", sources and len(compiled) == len(sources), f"{len(compiled)} modules")


def check_process(pid: int) -> None:
    """By what the kernel says of it."""
    lines = (line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    status = dict(lines)
    check("runs as", status["Uid"].split() == ["10001"] * 4, status["Uid"].replace("\t", " "))
    check("capabilities", all(int(status[name], 16) == 0 for name in ("CapEff", "CapPrm", "CapBnd")), status["CapBnd"])
    check("no new privileges", status["NoNewPrivs"] == "1", status["NoNewPrivs"])
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    options = next(fields[5] for fields in mounts if fields[4] == "/")
    check("root file system", "ro" in options.split(","), options)
    for folder in ("/", "/tmp", "/opt/venv"):
        told = inside("python", "-c", f"open('{folder}/x', 'w')").splitlines()[-1]
        check(f"{folder} cannot be written", "Read-only file system" in told, told)


def check_drain(process: "subprocess.Popen[bytes]", port: int, ops: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    first = answer.readline()
    check("a stream begins", first == EVENT[:-1], answer.status)
    subprocess.run(["runc", "kill", NAME, "TERM"], check=True)
    check("SIGTERM: not ready any more", until(lambda: get(ops, "/readyz") == 503), 503)
    check("SIGTERM: still alive", get(ops, "/healthz") == 200, 200)
    check("SIGTERM: takes no more", until(lambda: get(port, "/v1/models") == 0))
    check("SIGTERM: waits for the stream", process.poll() is None)
    Engine.let_go.set()
    rest = answer.read()
    check("SIGTERM: the stream is complete", rest.endswith(b"data: [DONE]\n\n"), f"{len(first + rest)} bytes")
    connection.close()
    check("SIGTERM: exit status", process.wait(20) == 0, process.returncode)


def main(root: str, config: str, bundle: str) -> None:
    image = json.loads(Path(config).read_text())["OCIv1"]["config"]
    print("image")
    check_image(image, Path(root))
    engine = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    engine.daemon_threads = True
    threading.Thread(target=engine.serve_forever, daemon=True).start()
    port, ops = free_port(), free_port()
    catalogue = Path(bundle).parent / "catalogue" / "catalogue.json"
    catalogue.parent.mkdir()
    backends = [{"url": f"http://127.0.0.1:{engine.server_port}"}]
    catalogue.write_text(json.dumps({"models": [{"name": "m", "backends": backends}]}))
    # mktemp's folders are for root alone.
    for folder in (catalogue.parent.parent, catalogue.parent):
        folder.chmod(0o755)
    environ = {"INFERENCE_API_PORT": str(port), "INFERENCE_API_OPS_PORT": str(ops)}
    environ |= {"INFERENCE_API_CATALOGUE": "/mnt/catalogue.json", "INFERENCE_API_DRAIN_TIMEOUT": "60"}
    bundle_of(root, image, Path(bundle), environ, catalogue)
    print("container")
    with running(Path(bundle)) as process:
        began = time.monotonic()
        check("answers /healthz", until(lambda: get(ops, "/healthz") == 200), f"{time.monotonic() - began:.1f} s")
        check("answers /readyz", until(lambda: get(ops, "/readyz") == 200))
        check("answers /metrics", get(ops, "/metrics") == 200)
        check("lists its models", get(port, "/v1/models") == 200)
        state = json.loads(subprocess.run(["runc", "state", NAME], capture_output=True, check=True).stdout)
        check_process(state["pid"])
        for command in ("registry-stub", "control-plane", "inference-control"):
            told = inside(command, "--help")
            check(f"has {command} too", told.startswith(f"usage: {command}"), told.partition("\n")[0])
        # Imports all of it, migrations and drivers included, and writes nothing.
        database = "CONTROL_PLANE_DATABASE_URL=postgresql://127.0.0.1:1/x"
        told = inside("env", database, "control-plane", "migrate", "--check")
        check("has a driver of PostgreSQL", "not installed" not in told and "Traceback" not in told, told[-100:])
        check_drain(process, port, ops)
    engine.shutdown()
    print("image-test: all of it holds")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main(*sys.argv[1:])
