"""grpc.aio's side of the small calls (`loads.SMALL`), over TLS: tensors travel as the bytes of a unary call.

Runs in the environment of `peers/requirements_rpc.txt`:

    .venv-rpc/bin/python -m tests.benchmarks.peers.rpc_grpc [LOAD ...]
"""

import asyncio
import datetime
from multiprocessing.connection import Connection

import grpc
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.benchmarks.loads import Load
from tests.benchmarks.modules import KINDS
from tests.benchmarks.peers.small_calls import callers_on_loop, main, measure
from tests.benchmarks.processes import ClientResult, Gate, in_thread, wait_for_stop

METHOD = "/bench.Expert/apply"
HOST = "expert.test"


def make_certificate() -> tuple[bytes, bytes]:
    """A key and a self-signed certificate, of a kind that gRPC's TLS library takes."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(pem)


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(1, -1)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def serve(pipe: Connection, load: Load, key: bytes, certificate: bytes) -> None:
    torch.set_num_threads(1)
    module = KINDS[load.kind](load.width)

    async def apply(x: torch.Tensor, context: object) -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    async def run() -> None:
        handler = grpc.unary_unary_rpc_method_handler(apply, tensor_of, bytes_of)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Expert", {"apply": handler}),))
        credentials = grpc.ssl_server_credentials([(key, certificate)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        pipe.send(("value", port))
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()

        def watch() -> None:
            wait_for_stop(pipe)
            loop.call_soon_threadsafe(stopped.set)

        in_thread(watch)
        await stopped.wait()
        await server.stop(None)

    asyncio.run(run())


def client(index: int, gate: Gate, load: Load, port: int, key: bytes, certificate: bytes) -> ClientResult:
    torch.set_num_threads(1)
    row = torch.randn(load.rows, load.width)

    async def run() -> ClientResult:
        credentials = grpc.ssl_channel_credentials(certificate)
        options = [("grpc.ssl_target_name_override", HOST)]
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
            apply = channel.unary_unary(METHOD, bytes_of, tensor_of)
            return await callers_on_loop(lambda: apply(row), gate, load.num_callers)

    return asyncio.run(run())


def run(load: Load) -> None:
    measure(load, serve, client, make_certificate())


if __name__ == "__main__":
    main(run, backward=False)
