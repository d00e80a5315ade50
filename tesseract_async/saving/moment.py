"""TrainerMoment: a trainer that shares parameters, at the moment of a save point."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from tesseract_async.identity import PeerID
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.fragments import holds_push, read_fragment, read_manifest
from tesseract_async.shared_parameters import SharedParameters
from tesseract_async.shared_part import Asked


class TrainerMoment:
    """A trainer at one moment, from which it can go on with its pieces as they were saved."""

    def __init__(self, shared: SharedParameters[Any]) -> None:
        """Note it now. No step may be under way."""
        self.model = copy.deepcopy(shared.model)
        self.state: StateDict = shared.state_dict()
        self._calls = [part.asked or Asked(part.copy.anchor) for part in shared.parts]
        """The calls of each piece: the one that was under way, or one that would have begun then."""

    def go_on(self, states: Sequence[StateDict], peer: PeerID) -> None:
        """Take the pieces of these whole states for the answers to the calls: `model` gets what others added since,
        and what this trainer (`peer`) pushed is learned once. Raises: ProtocolError."""
        manifest = read_manifest(states[0]["module"])
        for number, (call, state) in enumerate(zip(self._calls, states, strict=True)):
            form, before = manifest.part(number), call.anchor
            anchor = read_fragment(form, state["module"], state["version"])[0].anchor
            if call.sent is not None and holds_push(state, peer, call.call_id):
                before, self.state["parts"][number][1] = call.sent, call.steps
            if not torch.equal(anchor, before):
                manifest.layout.add(self.model, form.cut, anchor - before)
