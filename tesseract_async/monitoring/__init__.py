"""A swarm observed: `status` (one node's figures), `observer` (many nodes), `prometheus`, and the `dashboard`."""

from tesseract_async.experts.progress import publish_progress
from tesseract_async.monitoring.observer import SwarmObserver
from tesseract_async.monitoring.status import ExpertStatus, NodeStatus, StatusService, ask_status

__all__ = ["ExpertStatus", "NodeStatus", "StatusService", "SwarmObserver", "ask_status", "publish_progress"]
