"""From a model's name to its network, and what its files say."""
