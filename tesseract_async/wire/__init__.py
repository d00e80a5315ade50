"""Bytes to meaning and back, without I/O: frames, messages (msgpack), tensors, compression."""
