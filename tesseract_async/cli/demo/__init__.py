"""`tesseract demo`: a small swarm of separate processes on this machine, one of which is killed on the way."""
