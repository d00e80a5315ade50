"""What people and programs see of a swarm: nodes' own figures, a picture of all, Prometheus, the dashboard.

`status` is what one node says about itself, `observer` asks many and keeps the picture, `prometheus` writes a node's
metrics as text, `dashboard` serves both over HTTP.
"""

from tesseract_async.monitoring.observer import SwarmObserver, publish_progress
from tesseract_async.monitoring.status import ExpertStatus, NodeStatus, StatusService, ask_status

__all__ = ["ExpertStatus", "NodeStatus", "StatusService", "SwarmObserver", "ask_status", "publish_progress"]
