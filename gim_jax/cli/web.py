"""`gim-jax web`: a page on this machine to match two images and to browse label sets."""

from __future__ import annotations

import argparse
import contextlib
import socket

from gim_jax import api


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="MODEL=FILE",
        help="offer a model of `gim-jax models` with its .safetensors file; may be repeated",
    )
    parser.add_argument("--labels", metavar="DIR", help="browse this output of `gim-jax label` or `gim-jax quickstart`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from gim_jax.tasks import load_extra
    from gim_jax.web import page
    from gim_jax.web.labels import LabelSet

    if not 0 < args.port < 65536:
        raise ValueError(f"--port: found {args.port}, expected 1 to 65535")
    with contextlib.closing(socket.socket()) as place:
        try:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind((args.host, args.port))
        except OSError as error:
            raise ValueError(f"--host, --port: cannot listen at {args.host}:{args.port}: {error.strerror}") from error
    matchers = {"rootsift": api.load_matcher("rootsift")}
    for text in args.weights:
        name, _, path = text.partition("=")
        if not path:
            raise ValueError(f"--weights: found {text!r}, expected MODEL=FILE")
        matchers[name] = api.load_matcher(name, path)
    labels = LabelSet(args.labels) if args.labels else None
    load_extra("gradio", "web")
    api.enable_compilation_cache()
    served = page.serve(page.build(matchers, labels), args.host, args.port)
    print(f"open http://{args.host}:{args.port} ({', '.join(matchers)}); Ctrl-C ends", flush=True)
    try:
        served.block_thread()
    finally:
        served.close()
    return 0
