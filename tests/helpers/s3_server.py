"""A server that speaks S3's protocol on this machine: moto's, with one bucket."""

import contextlib
import importlib.util
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.helpers.processes import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "runs"


class S3Server:
    """`variables`: the environment in which s3:// leads there. May be stopped and started again, empty."""

    def __init__(self):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.variables = KEYS | {"AWS_ENDPOINT_URL": self.url}
        self.start()

    def start(self):
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                request = urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT")
                urllib.request.urlopen(request, timeout=5)
                return
            time.sleep(0.2)
        raise AssertionError("moto's server did not start")

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def s3():
    for package in ("moto", "flask", "s3fs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (requirements-dev.txt)")
    server = S3Server()
    yield server
    server.stop()
