"""Score models: noise processes, the network, its training, samplers."""
