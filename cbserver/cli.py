"""The command line: `python -m cbserver`. It says what is wrong before anything heavy is loaded."""
import argparse
import errno
import logging
import math
import os
import re
import secrets
import socket
import sys

from .http.keys import usable_key

ENGINES = ("continuous", "static", "sequential")
DTYPES = ("float32", "float16", "bfloat16")
BACKLOG = 2048  # connections that may wait to be accepted


def parse(argv=None):
    """The arguments as a namespace; what makes no sense ends the program with one sentence."""
    parser = argparse.ArgumentParser(
        "cbserver", description="Serve a language model to many people at once.")
    add = parser.add_argument
    add("--engine", choices=ENGINES, default="continuous",
        help="how requests are scheduled (continuous)")
    add("--model", help="a Hub id, a folder, smollm2, random:tiny or random:llama-3.2-1b")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="port to listen on (8000)")
    add("--max-batch", type=int, help="sequences served at once (16, or as many as fit)")
    add("--max-len", type=int, help="tokens of prompt and answer together (2048, or what model and memory allow)")
    add("--max-waiting", type=int, default=256, help="requests that may wait before 429 (256)")
    add("--prefill-budget", type=int, help="prompt tokens read in a step while others stream (measured at the start)")
    add("--dtype", choices=DTYPES,
        help="number format of the weights (float32 on a CPU, else half precision)")
    add("--fast", action=argparse.BooleanOptionalAction,
        help="the fast step of the appendix (default: on a GPU)")
    add("--prefix-reuse", action=argparse.BooleanOptionalAction,
        help="do not read again what a slot holds of a prompt (default: in float32)")
    add("--invariant", action=argparse.BooleanOptionalAction,
        help="with --fast: the same answer at any load (default: for up to 64 at once)")
    add("--request-timeout", type=float, default=600,
        help="seconds until a request is given up (600)")
    add("--drain-timeout", type=float, default=30,
        help="seconds that answers have to finish after SIGTERM (30)")
    add("--receive-timeout", type=float, default=30,
        help="seconds that a request's head, and then its body, may take to arrive (30)")
    add("--max-connections", type=int, default=4096,
        help="connections open at once; one more gets 503 (4096)")
    add("--silence", type=float, default=15,
        help="seconds without a token until a stream sends a comment, for proxies; 0: never (15)")
    add("--max-body", type=int, default=2**20, help="largest body of a request, in bytes (1048576)")
    add("--cors", action="append",
        help="a website whose scripts may call this server (default: none)")
    add("--http-processes", type=int, default=0,
        help="processes for HTTP, for tens of thousands of tokens/s (default: none of its own)")
    add("--stall-timeout", type=float, default=20,
        help="seconds that one of these processes may stand still (20)")
    add("--api-key", default=os.environ.get("CBSERVER_API_KEY"),
        help="the key that clients must send (CBSERVER_API_KEY)")
    add("--tunnel", action="store_true", help="open an ngrok tunnel; a key is then always required")
    args = parser.parse_args(argv)
    for name in ("max_batch", "max_len", "max_waiting", "prefill_budget", "request_timeout",
                 "drain_timeout", "stall_timeout", "receive_timeout", "max_connections",
                 "max_body"):
        value = getattr(args, name)
        if value is not None and not 1 <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    try:
        args.api_key = usable_key(args.api_key)
    except ValueError as error:
        parser.error(str(error))
    if not 0 <= args.silence < math.inf:
        parser.error("--silence must be 0 or more")
    if args.max_len == 1:
        parser.error("--max-len must be 2 or more: a token of the prompt and one of the answer")
    if args.engine == "sequential" and (args.max_batch or 1) > 1:
        parser.error("--engine sequential serves one at a time: --max-batch needs another engine")
    if not 0 < args.port < 65536:
        parser.error("--port must be 1 to 65535")
    for origin in args.cors or ():
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            parser.error("--cors takes an origin, such as https://example.org, or * for all")
    if args.prefix_reuse and args.engine != "continuous":
        parser.error("--prefix-reuse needs --engine continuous")
    if args.prefill_budget and args.engine != "continuous":
        parser.error("--prefill-budget needs --engine continuous")
    if args.http_processes < 0:
        parser.error("--http-processes must be 0 or more")
    if args.http_processes and not hasattr(socket, "SO_REUSEPORT"):
        parser.error("--http-processes needs Linux or macOS")
    return args


def take_port(host, port, processes=1):
    """Sockets that listen at this address, one for each process, which nobody else can listen at.

    Who connects from now on waits for the model. Ends the program if the address is not to be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][-1]
        first = socket.create_server(address, family=family, backlog=BACKLOG)
        if sys.platform != "linux":
            return [first] * processes  # whichever process is free accepts
        # Linux shares connections out evenly among sockets with this option. The first one takes
        # it when it has the address already, so it never shares that with another program.
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        more = [socket.create_server(first.getsockname(), family=family, backlog=BACKLOG,
                                     reuse_port=True) for _ in range(processes - 1)]
        return [first, *more]
    except (socket.gaierror, UnicodeError):
        sys.exit(f"Cannot listen on {host}: this name is not known here; --host takes an address "
                 "of this machine.")
    except OSError as error:
        reason = error.strerror.partition(" (")[0]
        advice = "choose another port with --port"
        if error.errno == errno.EADDRNOTAVAIL:
            advice = "--host takes an address of this machine"
        sys.exit(f"Cannot listen on {host}:{port} ({reason}); {advice}.")


def main(argv=None, engine_class=None):
    """Load, say where it serves, serve. engine_class: in place of the one that --engine names."""
    args = parse(argv)
    listeners = take_port(args.host, args.port, max(1, args.http_processes))
    chosen = args.model or os.environ.get("CBSERVER_MODEL") or "the default model"
    print(f"Loading {chosen}", flush=True)

    import torch  # it takes seconds, as do transformers and uvicorn

    if not torch.cuda.is_available():  # torch would load triton all the same, which is of no use
        sys.modules.setdefault("triton", None)  # here, and complains of itself at a clean end
    from . import process
    from .model.load import ModelUnavailable
    from .server import create_app

    if args.http_processes:
        from .processes import HttpProcesses, preload

        preload()
        cores = os.cpu_count()
        if args.http_processes > cores:
            print(f"{args.http_processes} processes for HTTP share {cores} CPU cores with the engine: "
                  "fewer serve as well.", flush=True)
    failures = process.prepare()
    try:
        engine = process.load_engine(args, engine_class)
    except ModelUnavailable as error:
        sys.exit(str(error))
    made_key, url = reach(args)
    name = process.served_name(args, engine)
    print(f"Serving {name} with the {args.engine} engine ({engine.slots} at once) on {url}; "
          "the API is documented at /docs", flush=True)
    shown = f"#key={made_key}" if made_key else ""  # a key of yours is not printed
    print(f"Watch the batch: {url}/{shown}", flush=True)
    options = {"model_name": name, "api_key": args.api_key or made_key, "cors": args.cors,
               "timeout": args.request_timeout, "max_body": args.max_body,
               "receive_timeout": args.receive_timeout, "silence": args.silence}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.http_processes:
        server = HttpProcesses(engine, listeners, args.drain_timeout, args.stall_timeout,
                               args.max_connections, **options)
        server.run()
    else:
        app = create_app(engine, **options)
        server = process.DrainingServer(app, args.host, args.port, args.drain_timeout,
                                        args.max_connections, args.receive_timeout)
        server.run(listeners)
    if failures:
        sys.exit("The engine failed; see above. The server has ended.")
    if server.problem:
        sys.exit(server.problem)


def reach(args):
    """(a new API key or None, the URL). With a tunnel and no key of yours, one is made."""
    host = f"[{args.host}]" if ":" in args.host else args.host
    local = f"http://{host}:{args.port}"
    if not args.tunnel:
        return None, local

    from .http.tunnel import ngrok_token, open_tunnel

    token = ngrok_token()
    made_key = secrets.token_urlsafe(24) if token and not args.api_key else None
    if made_key:
        print(f"API key for this run: {made_key}")
    return made_key, open_tunnel(args.port, token) or local
