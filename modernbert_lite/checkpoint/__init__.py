"""A name -> a network, and what its files say."""
