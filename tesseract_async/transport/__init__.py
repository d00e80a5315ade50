"""Byte pipes to other computers, and the channels to known peers that TLS makes of them."""
