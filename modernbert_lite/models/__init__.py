"""One file per family: its network, heads, configuration and tensor names."""
