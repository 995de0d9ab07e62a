"""Online encoding on Ray Serve: planned, nothing here yet."""
