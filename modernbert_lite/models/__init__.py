"""One file a family: its network, heads, configuration and tensor names."""
