#!/usr/bin/env python3
"""64 clients of mixed lengths for minutes, under a KV budget a tenth of what they ask for: every answer must be the one that a request gets alone.

    python3 engine/tests/python/soak.py target/release/spinkv models/needle-tiny --seconds 300

Starts a server of the cpu backend, asks every prompt once by itself, then has --clients threads ask random ones until the time is over. Needles must have
their digits, all texts must be those of the single requests, and afterwards nothing may be held but the pages of prompts that are kept for others. By hand: it takes minutes.
"""

import argparse
import http.client
import json
import random
import re
import subprocess
import threading
import time

MAX_TOKENS = 12


def ask(port, prompt, max_tokens, timeout=280):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    body = {"model": "soak", "prompt": prompt["text"], "max_tokens": max_tokens, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"{response.status} {text}")
    return json.loads(text)["choices"][0]["text"]


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def resident_mib(pid):
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1)) // 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--host-mib", type=int, default=120)
    parser.add_argument("--gpu-mib", type=int, default=90)
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    with open(f"{args.model}/prompts.json") as file:
        prompts = [prompt for prompt in json.load(file)["prompts"] if prompt["n_tokens"] < 17000]
    # The long ones are rare, or nothing else would be seen.
    weights = [1 if prompt["n_tokens"] > 10000 else 8 for prompt in prompts]
    mean = sum(w * p["n_tokens"] for w, p in zip(weights, prompts)) / sum(weights)
    server = subprocess.Popen(
        [args.binary, "serve", "--model", args.model, "--served-model-name", "soak", "--port", str(args.port), "--max-batch",
         "64", "--host-mib", str(args.host_mib), "--gpu-mib", str(args.gpu_mib), "--log", "warn"])
    try:
        for _ in range(100):
            try:
                if json.loads(get(args.port, "/health")).get("status") in ("ok", "ready"):
                    break
            except (OSError, ValueError):
                pass
            time.sleep(0.2)
        alone = {}
        for prompt in prompts:
            alone[prompt["name"]] = ask(args.port, prompt, MAX_TOKENS)
        needles = sum(p["greedy_text"].strip()[:7] in alone[p["name"]] for p in prompts if "needle" in p["name"])
        print(f"alone: {needles} of {sum('needle' in p['name'] for p in prompts)} needles; "
              f"{args.clients} x {mean:.0f} tokens of 4 KiB ask for {args.clients * mean / 256:.0f} MiB of host pages, {args.host_mib} are there", flush=True)
        end, lock, asked, tokens, wrong, errors = time.time() + args.seconds, threading.Lock(), [0], [0], [], []

        def client(number):
            rng = random.Random(number)
            while time.time() < end:
                prompt = rng.choices(prompts, weights)[0]
                try:
                    text = ask(args.port, prompt, MAX_TOKENS)
                except Exception as error:
                    with lock:
                        errors.append(f"{prompt['name']}: {error}")
                    continue
                with lock:
                    asked[0] += 1
                    tokens[0] += prompt["n_tokens"]
                    if text != alone[prompt["name"]]:
                        wrong.append((prompt["name"], text))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(args.clients)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, resident_mib(server.pid))
            time.sleep(1)
        time.sleep(1)
        metrics = get(args.port, "/metrics")
        held = [line for line in metrics.splitlines() if line.startswith(("spinkv_kv_bytes", "spinkv_prefix", "spinkv_requests", "spinkv_preempt"))]
        print(f"{asked[0]} answers, {tokens[0]} prompt tokens, {len(wrong)} other than alone, {len(errors)} errors, most memory {most} MiB")
        print("\n".join(held))
        for line in wrong[:5] + errors[:5]:
            print(line)
        return 1 if wrong or errors or not asked[0] else 0
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


if __name__ == "__main__":
    raise SystemExit(main())
