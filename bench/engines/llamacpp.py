"""llama.cpp: its server, asked on this host for `batch` completions at once, with drafts from n-grams if asked."""

from __future__ import annotations

import atexit
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.engines.driver import Generate, Job, run

SERVER = Path(sys.prefix) / "build/bin/llama-server"
CONTEXT = 1024  # tokens of a sequence
# Of the n-gram a draft is looked up by. The server's default, 12, finds next to nothing in texts of this length.
MATCH = 3


def load(job: Job) -> Generate:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(SERVER), "-m", job.model, "--port", str(port), "-t", str(job.threads), "-np", str(job.batch)]
    command += ["-c", str(CONTEXT * job.batch), "--no-webui", "--cache-ram", "0"]
    if job.speculation == "ngram":
        command += ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", str(MATCH)]
        command += ["--spec-ngram-simple-size-m", str(job.drafts)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).read()
            break
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None:
                raise SystemExit(f"{SERVER} ended with {server.returncode}") from None
            time.sleep(0.1)

    def complete(prompt: list[int], tokens: int) -> list[int]:
        body = {
            "prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
            "return_tokens": True, "samplers": ["temperature"],
        }  # fmt: skip
        request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
        answer: list[int] = json.load(urllib.request.urlopen(request, timeout=600))["tokens"]
        return answer

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(complete, prompts, [tokens] * len(prompts)))

    return generate


if __name__ == "__main__":
    run(load)
