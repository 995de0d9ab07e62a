"""The network: base tokenizers, latent distillation, codebook, halting."""
