"""What an expert accepts and what a caller prefers: they settle on what loses no more than that, or say why."""

import itertools

import pytest
import torch

from tesseract_async.errors import ProtocolError, SchemaMismatch
from tesseract_async.wire.codecs import AUTO, CODECS, CodecPolicy, Codecs, settle
from tesseract_async.wire.compression import decode, encode

POLICIES = [
    names for count in range(1, len(CODECS) + 1) for names in itertools.permutations(CODECS, count) if count < 4
]


def test_every_preference_settles_on_what_is_accepted_and_loses_no_more() -> None:
    x = torch.randn(3 * 4096, generator=torch.Generator().manual_seed(1))
    x[0] = 70_000.0  # beyond fp16, and an outlier for the blockless uint8
    loss = {codec: (decode(encode(x, codec), x.dtype, tuple(x.shape), codec) - x).abs() for codec in CODECS}
    for names in POLICIES:
        policy = CodecPolicy(inputs=names)
        for preference in (AUTO, *CODECS):
            preferred = Codecs(inputs=preference, outputs="bf16")
            if preference == AUTO:
                assert settle(policy, preferred).inputs == ("none" if "none" in names else names[0])
                continue
            try:
                got = settle(policy, preferred).inputs
            except SchemaMismatch as error:
                assert (
                    preference not in names
                    and "none" not in names
                    and preference in str(error)
                    and "inputs" in str(error)
                )
                continue
            assert got in names and settle(policy, preferred).outputs == "bf16"
            assert got == preference if preference in names else True
            assert loss[got].max() <= loss[preference].max(), f"{preference} became {got}"


def test_preferences_are_one_name_or_names_by_what_travels() -> None:
    assert Codecs.of("bf16") == Codecs("bf16", "bf16", "bf16")
    assert Codecs.of({"outputs": "uint8"}) == Codecs(AUTO, "uint8", AUTO)
    for wrong in ("zip", {"output": "none"}, {"inputs": "zip"}):
        with pytest.raises(ValueError, match="codec"):
            Codecs.of(wrong)  # type: ignore[arg-type]


def test_policies_say_what_is_wrong_with_them() -> None:
    assert CodecPolicy.only({"inputs": "bf16"}) == CodecPolicy(inputs=("bf16",))
    for wrong in ({"inputs": ()}, {"inputs": ("zip",)}, {"gradients": "none"}):
        with pytest.raises(ValueError, match="travel in some of"):
            CodecPolicy(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'weights'"):
        CodecPolicy.only({"weights": "none"})


def test_a_policy_survives_the_wire_and_nonsense_does_not() -> None:
    policy = CodecPolicy(inputs=("bf16", "none"), gradients=("uint8",))
    assert CodecPolicy.decode(policy.encode()) == policy
    assert CodecPolicy.decode({**policy.encode(), "inputs": ["of the future", "bf16", 5]}).inputs == ("bf16",)
    for wrong in (None, [], {}, {**policy.encode(), "outputs": []}, {**policy.encode(), "outputs": ["zip"]}):
        with pytest.raises(ProtocolError):
            CodecPolicy.decode(wrong)
