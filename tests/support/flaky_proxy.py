"""An HTTP proxy that fails on purpose, between an S3 client and a real S3 server.

Requests and responses pass byte for byte: AWS signs the `Host` header, so the client signs for the proxy's address, and
the server has to see that same address.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Self

_PIECE = 1 << 18  # bytes
_FAULTS = ("unavailable", "cut", "stalled")
_REFUSALS = {"unavailable": (b"503 Slow Down", b"SlowDown"), "read-only": (b"403 Forbidden", b"AccessDenied")}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER, for no time


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """The start of a request or a response: as it came, the words of its first line, its fields in lower case."""

    raw: bytes
    words: list[bytes]
    fields: dict[bytes, bytes]

    @property
    def last(self) -> bool:
        """No other message follows on this connection."""
        return self.fields.get(b"connection") == b"close"


async def _read_head(reader: StreamReader) -> _Head:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw[:-4].split(b"\r\n")
    fields = {name: value.strip() for name, _, value in (line.lower().partition(b":") for line in lines)}
    return _Head(raw=raw, words=first.split(b" ", 2), fields=fields)


async def _read_exactly(reader: StreamReader, count: int) -> AsyncIterator[bytes]:
    while count:
        piece = await reader.read(min(count, _PIECE))
        if not piece:
            raise EOFError
        count -= len(piece)
        yield piece


async def _read_body(reader: StreamReader, head: _Head) -> AsyncIterator[bytes]:
    """The body as it is on the wire, which of a chunked one includes the sizes of the chunks."""
    if head.fields.get(b"transfer-encoding") == b"chunked":
        size, line = -1, b""
        while size:
            yield (line := await reader.readuntil(b"\r\n"))
            if size := int(line.partition(b";")[0], 16):
                async for piece in _read_exactly(reader, size + len(b"\r\n")):
                    yield piece
        while line != b"\r\n":  # the fields after the last one
            yield (line := await reader.readuntil(b"\r\n"))
    else:
        async for piece in _read_exactly(reader, int(head.fields.get(b"content-length", 0))):
            yield piece


async def _send(request: _Head, reader: StreamReader, writer: StreamWriter) -> bool:
    """Whether the request went out whole; where it did not, the connection to the server is closed."""
    try:
        writer.write(request.raw)
        async for piece in _read_body(reader, request):
            writer.write(piece)
            await writer.drain()
        return True
    except (EOFError, OSError):
        writer.close()
        return False


def _refusal(kind: str, request: _Head) -> bytes:
    status, code = _REFUSALS[kind]
    body = b'<?xml version="1.0"?>\n<Error><Code>%b</Code><Message>The proxy is flaky</Message></Error>' % code
    head = b"HTTP/1.1 %b\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    return head if request.words[0] == b"HEAD" else head + body


class FlakyProxy:
    """A proxy on a free port of 127.0.0.1, in a thread of its own for as long as its `with` lasts.

    A fault is one of three, equally often. `unavailable`: 503 SlowDown, and the server never sees the request. `cut`:
    the server does what it is asked, but the client gets half of the response's body at most (where there is no body,
    no response) before the connection ends, by a reset and by an orderly close in turn. `stalled`: likewise, by an
    orderly close after `stall` seconds of silence.

    Attributes:
        address: where it listens, `127.0.0.1:PORT`.
        faults: how many `requests` came, and how many of them met each fault.
        rate: the share of requests that meet a fault, 0..1; may be changed at any time.
        read_only: whether every PUT, POST and DELETE is answered 403 AccessDenied; may be changed at any time.
    """

    def __init__(self, target: str, *, rate: float = 0.05, stall: float = 20, seed: int = 0) -> None:
        """
        Args:
            target: the server, `HOST:PORT`.
            rate: the attribute's first value.
            stall: in seconds.
            seed: of the faults; the n-th request to come meets the same one in every run.
        """
        self.rate, self.read_only = rate, False
        self.faults = dict.fromkeys(("requests", *_FAULTS), 0)
        self._host, _, self._port = target.rpartition(":")
        self._stall, self._random = stall, random.Random(seed)

    def __enter__(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        # The connections inherit it; asyncio does not set it on those of a socket that it did not make.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._runner, self._stop = asyncio.Runner(loop_factory=asyncio.new_event_loop), asyncio.Event()
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run, name=f"flaky proxy {self.address}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(2)
        assert not self._thread.is_alive(), "the proxy does not stop"

    def _run(self) -> None:
        with self._runner:  # at its end it cancels the connections that are open
            self._runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, sock=self._socket, limit=_PIECE, backlog=1024)
        await self._stop.wait()
        server.close()

    async def _connection(self, reader: StreamReader, writer: StreamWriter) -> None:
        upstream: tuple[StreamReader, StreamWriter] | None = None
        try:
            more = True
            while more:
                request = await _read_head(reader)
                if b"expect" in request.fields:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                fault = self._draw(request)
                if fault in _REFUSALS:
                    async for _ in _read_body(reader, request):
                        pass
                    writer.write(_refusal(fault, request))
                    more = not request.last
                    continue
                if upstream is None or upstream[0].at_eof():  # the server ends idle connections
                    upstream = await asyncio.open_connection(self._host, self._port, limit=_PIECE)
                # At the same time: a server may refuse a request before it has read all of it.
                sending = asyncio.create_task(_send(request, reader, upstream[1]))
                try:
                    more = await self._respond(request, fault, upstream[0], writer)
                    more = more and sending.done() and sending.result()
                finally:
                    sending.cancel()
            writer.close()
            await writer.wait_closed()
        except (EOFError, OSError, asyncio.CancelledError):
            pass  # one side went away, or the proxy stops: the other side learns it now
        finally:
            writer.transport.abort()
            if upstream is not None:
                upstream[1].transport.abort()

    def _draw(self, request: _Head) -> str:
        """What befalls the request: a fault, `reset` for every other `cut`, `read-only`, or nothing."""
        self.faults["requests"] += 1
        faulty, fault = self._random.random() < self.rate, self._random.choice(_FAULTS)
        if self.read_only and request.words[0] in (b"PUT", b"POST", b"DELETE"):
            return "read-only"
        if not faulty:
            return ""
        self.faults[fault] += 1
        return "reset" if fault == "cut" and self.faults[fault] % 2 else fault

    async def _respond(self, request: _Head, fault: str, reader: StreamReader, writer: StreamWriter) -> bool:
        """Passes the server's response on, or what `fault` leaves of it; whether the connection can be used again."""
        response = await _read_head(reader)
        while response.words[1].startswith(b"1"):  # "100 Continue", which the client has had from us
            response = await _read_head(reader)
        bodiless = request.words[0] == b"HEAD" or response.words[1] in (b"204", b"304")
        pieces = _read_exactly(reader, 0) if bodiless else _read_body(reader, response)
        if not fault:
            writer.write(response.raw)
            async for piece in pieces:
                writer.write(piece)
                await writer.drain()
            return not (request.last or response.last)
        if body := b"".join([piece async for piece in pieces]):
            writer.write(response.raw + body[: len(body) // 2])
            await writer.drain()
        if fault == "stalled":
            await asyncio.sleep(self._stall)
        if fault == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        return False
