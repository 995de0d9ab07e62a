"""When an image has enough tokens, and which images run together."""
