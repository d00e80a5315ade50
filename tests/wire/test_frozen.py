"""The wire of 0.2.0 is frozen: its bytes stay what they are, and the page that specifies it says what the code does."""

import re
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from tesseract_async.errors import NotPrimary
from tesseract_async.experts.grants import Invite, grant_text, sign_grant
from tesseract_async.identity import Identity, SignedRecord
from tesseract_async.network import datagrams
from tesseract_async.transport.certificates import ALPN
from tesseract_async.wire import apply, compression, frames, heads, messages, packed
from tesseract_async.wire.codecs import CODECS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design" / "wire.md").read_text(encoding="utf-8")
KINDS = (
    "HELLO REQUEST REPLY BEGIN_REQUEST BEGIN_REPLY CHUNK_REQUEST CHUNK_REPLY GRANT_REQUEST GRANT_REPLY CREDIT WINDOW "
    "CANCEL PING PONG CLOSE BULK"
).split()
PAIRS = {
    messages.INFO: (messages.InfoRequest, messages.ExpertInfo),
    messages.FORWARD: (messages.ForwardRequest, messages.ForwardReply),
    messages.BACKWARD: (messages.BackwardRequest, messages.BackwardReply),
    messages.STATE: (messages.StateRequest, messages.StateReply),
    messages.RESTORE: (messages.RestoreRequest, messages.RestoreReply),
    messages.TAKE_OVER: (messages.TakeOverRequest, messages.TakeOverReply),
    messages.TENURE: (messages.TenureRequest, messages.TenureReply),
    messages.PUSH: (messages.PushRequest, messages.UpdatesReply),
    messages.PULL: (messages.PullRequest, messages.UpdatesReply),
    messages.SAMPLES: (messages.SamplesRequest, messages.SamplesReply),
    messages.LOCKSTEP: (messages.LockstepRequest, messages.LockstepReply),
}
HELLO = heads.Hello(bytes(range(16)), False, bytes(32), 1024, 2**23, 2**30, (b"grant",), frozenset({"reply_parts"}))
OWNER = Identity.from_seed(b"o" * 32)
GRANT = sign_grant(OWNER, bytes(16), OWNER.peer_id, ["host", "train"], serial=7, not_after=2**33)
LED = NotPrimary("ffn.3.7 is led by others", primary=bytes(32), retry_after=1.5)


def rows(*titles: str) -> list[list[str]]:
    """The cells of the page's table with these columns."""
    head = "| " + " | ".join(titles) + " |\n"
    lines = PAGE.partition(head)[2].splitlines()[1:]
    table = lines[: next(at for at, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_page_says_what_the_code_does() -> None:
    assert f"Version **{frames.VERSION}**" in PAGE and frames.VERSION == datagrams.VERSION == 2
    assert f"ALPN `{ALPN}`" in PAGE
    assert [row[1] for row in rows("kind", "name", "from", "stream", "payload")] == KINDS
    assert [getattr(frames, name) for name in KINDS] == list(range(1, 17))
    assert [int(row[1]) for row in rows("offset", "bytes", "field")] == [1, 1, 2, 4, 8] and frames.HEADER.size == 16
    keys = [row[0].strip("`") for row in rows("key", "value")]
    assert keys == list(msgpack.unpackb(heads.encode_hello(HELLO)[6:]))
    assert [row[0].strip("`") for row in rows("codec", "buffer", "an element x loses at most")] == list(CODECS)
    for sentence in (
        f"has at most {frames.MAX_SMALL:,} bytes; a chunk's has 1 to {frames.MAX_CHUNK:,}",
        f"all but the last have at least {frames.MIN_CHUNK:,} bytes",
        f"*more* has the value {frames.MORE}",
        f"msgpack of at most {packed.MAX_ITEMS:,} values, {packed.MAX_DEPTH} deep",
        f"up to {frames.MAX_BUFFERS:,} raw buffers",
        f"4 bytes head length (at most {frames.MAX_HEAD >> 20} MiB)",
        f"at most {heads.MAX_GRANTS} grants, of at most {heads.MAX_GRANT_BYTES} bytes",
        f"at most {heads.MAX_FEATURES} names, each of 1 to {heads.MAX_FEATURE_LENGTH} characters",
        f"string, 1 to {heads.MAX_METHOD_LENGTH} characters",
        f"a sentence has at most {heads.MAX_SENTENCE_LENGTH:,} characters",
        f"and are at most {frames.MAX_PARTS:,}, the last one",
        f"b = ceil(n / {compression.BLOCK}): b float32",
        f"b = ceil(n / {compression.SMALL_BLOCK}): b bfloat16",
    ):
        assert sentence in " ".join(PAGE.split()), sentence


def test_the_page_lists_the_fields_of_all_messages() -> None:
    listed = {name.strip("`"): (asked, answered) for name, asked, answered in rows("method", "request", "reply")}

    def fields(kind: type) -> str:
        return ", ".join(f"`{one}`" + "?" * (one in kind._field_defaults) for one in kind._fields)  # type: ignore[attr-defined]

    assert listed == {name: (fields(asked), fields(answered)) for name, (asked, answered) in PAIRS.items()}
    kinds = {kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, tuple)}
    assert {kind for pair in PAIRS.values() for kind in pair} == kinds
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tesseract_async").rglob("*.py"))
    methods = set(re.findall(r'"((?:expert|node|nat)\.[a-z_]+)"', source)) - {"node.pem"}
    assert [name for name in sorted(methods) if f"`{name}`" not in PAGE] == []


def apply_request() -> list[object]:
    """The body and buffers of a request for two experts."""
    two = np.array([[0, 1], [3, 7]], np.uint32)
    request = apply.ApplyRequest(
        prefix="ffn",
        experts=two,
        ids=[bytes(range(16)), bytes(range(16, 32))],
        versions=np.array([4, 5], np.int64),
        offsets=np.array([0, 1, 3], np.uint32),
        tensors=[["float32", [2, 3], "none"]],
        num_inputs=1,
        backward=False,
        training=True,
        keep=True,
        seed=9,
        reply_codec="bf16",
        kept=None,
        rows=np.array([1, 0, 1], np.int32),
        weights=np.array([1.0, 0.25, 0.75], np.float32),
    )
    body, buffers = apply.encode_request(request)
    return [body, *map(bytes, buffers)]


X = torch.arange(-8, 13) / 4
BYTES = {
    "hello": heads.encode_hello(HELLO),
    "request": heads.encode_request(heads.RequestHead("expert.info", 1.5, -1, 16, 64, ["ffn.3.7"])),
    "result": heads.encode_result([1, None, b"\x02", "three", 4.5]),
    "error": heads.encode_error(LED),
    "frame": frames.frame(frames.PONG, stream=77, flags=frames.REPORT),
    "table": frames.encode_table(5, [1, 2**40]),
    "apply": msgpack.packb(apply_request()),
    "datagram": datagrams.encode_request(
        datagrams.FIND, 0, b"t" * 8, b"s" * 32, token=b"k" * 8, challenge=b"", arguments=[bytes(32)]
    ),
    "record": SignedRecord.sign(OWNER, bytes(32), sequence=5, expiration=1.5e9, value=b"value", subkey="name").body,
    "grant": GRANT.blob,
    "invite": Invite(f"digits@{OWNER.peer_id}", ("198.51.100.7:31337",), grant_text(GRANT)).text().encode(),
    **{codec: bytes(compression.encode(X, codec)) for codec in CODECS},
}


@pytest.mark.parametrize("name", list(BYTES))
def test_bytes_are_those_of_0_2_0(name: str) -> None:
    """Nodes of 0.2.0 run for years: where this fails, they would be shut out. Never change what it compares with."""
    assert BYTES[name].hex() == FROZEN[name]


FROZEN = {
    "hello": (
        "54535241000288a773657373696f6ec410000102030405060708090a0b0c0d0e0fa462756c6bc2a7706565725f6964c4"
        "200000000000000000000000000000000000000000000000000000000000000000a96d61785f63616c6c73cd0400a96d"
        "61785f736d616c6cce00800000ab6d61785f6d657373616765ce40000000a66772616e747391c4056772616e74a86665"
        "61747572657391ab7265706c795f7061727473"
    ),
    "request": "96ab6578706572742e696e666fcd05ddff104091a766666e2e332e37",
    "result": "92009501c0c40102a57468726565cb4012000000000000",
    "error": (
        "9401ab6e6f745f7072696d617279b866666e2e332e37206973206c6564206279206f746865727382a77072696d617279"
        "c4200000000000000000000000000000000000000000000000000000000000000000ab72657472795f6166746572cb3f"
        "f8000000000000"
    ),
    "frame": "0e01000000000000000000000000004d",
    "table": "000000050000000200000000000000010000010000000000",
    "apply": (
        "939da366666ec41000000000010000000300000007000000c420000102030405060708090a0b0c0d0e0f101112131415"
        "161718191a1b1c1d1e1fc41004000000000000000500000000000000c40c0000000001000000030000009193a7666c6f"
        "61743332920203a46e6f6e6501c2c3c309a462663136c0c40c010000000000000001000000c40c0000803f0000803e00"
        "00403f"
    ),
    "datagram": (
        "540202007474747474747474737373737373737373737373737373737373737373737373737373737373737393c4086b"
        "6b6b6b6b6b6b6bc400c4200000000000000000000000000000000000000000000000000000000000000000"
    ),
    "record": (
        "2a15d82c740858c73940358f3a2ad531069e039fdcdbf3eb9b5324db58077bd073b8492db45da907be3ecea83bfcbc84"
        "868c43f17f83d64429b4a323fd222405c86d01ad8b2fb694b22ff60e3c9d9e7ed90db5604772b74450d40913b9a9cbaf"
        "00000000000000050000015d3ef7980002046e616d6576616c7565"
    ),
    "grant": (
        "c86d01ad8b2fb694b22ff60e3c9d9e7ed90db5604772b74450d40913b9a9cbaf500c7fc5cacf03a4424c83018f395f2b"
        "caad1ecbacdd46a4e56805716f40d54a603e8034dee076e36726d33ebd8a6259c50061f0dac5aaf84730277e67242b09"
        "97c41000000000000000000000000000000000c420e577275f191892ed88311038fd26de52488a74e0852efc97c3a466"
        "87a4a050d803a007cf0000000200000000c400"
    ),
    "invite": (
        "746573736572616374312d6b396c485a476c6e6158527a514755314e7a63794e7a566d4d546b784f446b795a5751344f"
        "444d784d54417a4f475a6b4d6a5a6b5a5455794e446734595463305a5441344e544a6c5a6d4d354e324d7a595451324e"
        "6a6733595452684d4455775a446952736a45354f4334314d5334784d4441754e7a6f7a4d544d7a4e38536b5a38687441"
        "61324c4c37615573695f32446a79646e6e375a4462566752334b335246445543524f35716375765541785f7863725041"
        "36524354494d426a7a6c664b387174487375733355616b355767466357394131557067506f4130337542323432636d30"
        "7a3639696d4a5a78514268384e7246717668484d43642d5a795172435a66454541414141414141414141414141414141"
        "41414141414445494f56334a31385a474a4c74694445514f50306d336c4a49696e5467685337386c384f6b5a6f656b6f"
        "464459413641487a77414141414941414141417841433533576167"
    ),
    "none": (
        "000000c00000e0bf0000c0bf0000a0bf000080bf000040bf000000bf000080be000000000000803e0000003f0000403f"
        "0000803f0000a03f0000c03f0000e03f0000004000001040000020400000304000004040"
    ),
    "bf16": "00c0e0bfc0bfa0bf80bf40bf00bf80be0000803e003f403f803fa03fc03fe03f00401040204030404040",
    "fp16": "00c000bf00be00bd00bc00ba00b800b4000000340038003a003c003d003e003f00408040004180410042",
    "uint8": "000000c0a1a0a03c000d1a2633404d596673808c99a6b3bfccd9e6f2ff",
    "uint8_blockwise": "000000c0a1a0a03c000d1a2633404d596673808c99a6b3bfccd9e6f2ff",
    "int4_blockwise": "db3e4354667798a9baccddee8f",
}
