"""Image distances: per-image pixel metrics and LPIPS, and the Fréchet Inception distance of two sets."""
