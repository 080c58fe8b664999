"""Pages over a socket: phaul's own framing, its sender and its receiver."""
