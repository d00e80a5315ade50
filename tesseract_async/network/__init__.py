"""The DHT, a Kademlia over UDP: machines without I/O (`protocol` and what it uses), and their driver, `network`."""
