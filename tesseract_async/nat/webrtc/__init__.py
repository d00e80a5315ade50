"""Pipes through NATs over WebRTC data channels. Imports aiortc with the first one."""
