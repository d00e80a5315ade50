"""An aiohttp application that owns the event loop, hosts a node, and answers requests through an expert.

    python examples/embed_in_web_app.py --port 8080
    curl -d '{"rows": [[1, 2, 3, 4]]}' http://127.0.0.1:8080/apply

With ``--initial-peers HOST:PORT --uid ffn.0.0`` the expert is one that others host; without, the application hosts one
itself. Nothing special is needed for either: the node lives in the loop that aiohttp runs.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator

import torch
from aiohttp import web

import tesseract_async as ta

EXPERT = web.AppKey("expert", ta.RemoteExpert)
NODE = web.AppKey("node", ta.TesseractNode)


async def apply(request: web.Request) -> web.Response:
    """Apply the expert to ``{"rows": [[...], ...]}``. Simultaneous requests share its batches."""
    try:
        rows = torch.tensor((await request.json())["rows"], dtype=torch.float32)
        with torch.no_grad():
            answer = await request.app[EXPERT](rows)
    except (KeyError, TypeError, ValueError, ta.errors.SchemaMismatch) as error:
        raise web.HTTPBadRequest(text=f"{error}\n") from None
    except (ta.errors.TesseractError, TimeoutError) as error:
        raise web.HTTPBadGateway(text=f"{type(error).__name__}: {error}\n") from None
    return web.json_response({"rows": answer.tolist()})


async def health(request: web.Request) -> web.Response:
    node = request.app[NODE]
    return web.json_response(
        {"peer_id": str(node.peer_id), "address": node.address, "contacts": node.network.num_contacts}
    )


def make_app(args: argparse.Namespace) -> web.Application:
    async def host_node(app: web.Application) -> AsyncIterator[None]:
        # runs at the application's start, waits at the yield while it serves, goes on when it leaves
        async with ta.TesseractNode(args.node_host, initial_peers=args.initial_peers) as node:
            app[NODE] = node
            if args.initial_peers:
                app[EXPERT] = await node.get_expert(args.uid)
                yield
                return
            backend = ta.ExpertBackend(torch.nn.Linear(4, 4), args_schema=(ta.TensorSpec((4,)),))
            async with ta.TesseractServer(node, {args.uid: backend}):
                app[EXPERT] = await node.get_expert(args.uid)
                yield

    app = web.Application()
    app.cleanup_ctx.append(host_node)
    app.add_routes([web.post("/apply", apply), web.get("/health", health)])
    return app


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--initial-peers", nargs="*", default=[], metavar="HOST:PORT")
    parser.add_argument("--node-host", default="127.0.0.1", help="0.0.0.0 if the peers are on other computers")
    parser.add_argument("--uid", default="ffn.0.0")
    return parser.parse_args(arguments)


async def main(args: argparse.Namespace) -> None:
    runner = web.AppRunner(make_app(args))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", args.port).start()
        print(f"http://127.0.0.1:{args.port} answers; Ctrl-C leaves", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    try:
        ta.run(main(parse()))
    except (OSError, ValueError, ta.errors.TesseractError) as error:  # such as a port in use: a sentence is enough
        raise SystemExit(f"embed_in_web_app.py: {error}") from None
