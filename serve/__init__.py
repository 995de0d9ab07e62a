"""Online encoding on Ray Serve: the HTTP API, its playground page and a client.

Importing this package imports neither torch nor Ray, and neither does `serve.client`.
"""
