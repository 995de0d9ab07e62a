"""Decoding of image files to pixels, and encoding of pixels as files."""
