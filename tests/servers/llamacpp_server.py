"""Runs llama.cpp's own server from the wheel `xllamacpp`, until it is terminated.

python tests/servers/llamacpp_server.py --model FILE.gguf --alias smollm2 --port 8300
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    """Serve a GGUF file with the options of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, default=2048, help="tokens, of each slot")
    parser.add_argument("--slots", type=int, default=2, help="requests that are answered at once")
    parser.add_argument("--context-shift", action="store_true")
    options = parser.parse_args()
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.model_alias = options.model, {options.alias}
    parameters.hostnames, parameters.port = [options.host], options.port
    parameters.n_ctx, parameters.n_parallel = options.context * options.slots, options.slots
    parameters.ctx_shift = options.context_shift
    # On a busy machine, two threads that wait for each other take a hundred times as long as one.
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    print(f"listening at {server.listening_address}", flush=True)  # noqa: T201 - the log
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
