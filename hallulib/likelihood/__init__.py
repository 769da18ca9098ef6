"""Score-based generative classification: class-conditional densities and decisions."""
