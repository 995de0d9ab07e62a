"""How the service is set up: typed arguments of the Serve application, of `alit serve`, and of its YAML file."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from alit.errors import ConfigError


class Settings(BaseModel):
    """Of the application; every field may stand in the YAML file of `alit serve --config`, or under Serve's `args`.

    Attributes:
        models: weights folders by name, the packaged one where the folder is null; the first is the default.
        keys_file: API keys, one `name:key` per line; without one, and without ALIT_KEYS, no key is asked for.
        keyless: whether other machines may come in without a key: where a gateway or the network keeps strangers out.
        requests_per_minute: of each key, in each process that speaks HTTP.
        max_body_bytes: of a request.
        max_images: of a request.
        max_image_bytes, max_pixels: of an image.
        deadline_seconds: after which a request is not worked on any more, and answered with 503; 408 where its body
            has not come.
        max_batch_tokens: of work in one batch: the tokens of every length that each image may go through, added up.
        batch_wait_seconds: for which a batch waits for more images when none waited before.
        queue: images that may wait in a replica; requests beyond are told to come back.
        retry_after_seconds: when.
        max_bytes_in_flight: of the bodies that one process that speaks HTTP holds at once; likewise.
        api_replicas, min_replicas, max_replicas: processes that speak HTTP; least and most that hold the models.
        target_requests: requests on each of the latter at which more of them are started, up to the most.
        gpus_per_replica: GPUs of each of the latter.
        threads: CPU threads, and logical CPUs, of each of the latter.
        models_per_replica: how many models each of them holds at once; others wait until the longest unused one leaves.
        precision: bfloat16 is made for GPUs, and changes some 2 % of lengths and ids.
        openapi: whether /openapi.json is served.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")], str | None] = {"nano": None}
    keys_file: str | None = None
    keyless: bool = False
    requests_per_minute: int = Field(600, ge=1)
    max_body_bytes: int = Field(64 << 20, ge=1024)
    max_images: int = Field(64, ge=1, le=4096)
    max_image_bytes: int = Field(32 << 20, ge=1)
    max_pixels: int = Field(50_000_000, ge=1)
    deadline_seconds: float = Field(30, gt=0)
    max_batch_tokens: int = Field(2048, ge=1)
    batch_wait_seconds: float = Field(0.01, ge=0)
    queue: int = Field(256, ge=1)
    retry_after_seconds: int = Field(1, ge=1)
    max_bytes_in_flight: int = Field(1 << 30, ge=1024)
    api_replicas: int = Field(1, ge=1)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_requests: float = Field(4, gt=0)
    gpus_per_replica: float = Field(0, ge=0)
    threads: int = Field(1, ge=1)
    models_per_replica: int = Field(4, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    openapi: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.models:
            raise ValueError("models must name at least one weights folder")
        if self.queue < self.max_images:
            raise ValueError(f"queue must be at least max_images {self.max_images}, got {self.queue}")
        if self.max_bytes_in_flight < self.max_body_bytes:
            raise ValueError(
                f"max_bytes_in_flight must be at least max_body_bytes {self.max_body_bytes}, "
                f"got {self.max_bytes_in_flight}"
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas must be at least min_replicas {self.min_replicas}, got {self.max_replicas}")
        return self


class ListenAddress(BaseModel):
    """Where `alit serve` listens.

    Attributes:
        host, port: of the API and its page.
        logs_dir: for the service's log files, the requests' among them; Ray's own folder when null.
        metrics_port: of Ray's Prometheus endpoint, which listens on every interface; any free one when null.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    logs_dir: str | None = None
    metrics_port: int | None = Field(None, ge=1, le=65535)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_settings(path: Path | None, changes: dict[str, Any]) -> tuple[Settings, ListenAddress]:
    """The settings of a YAML file, of which `changes` replace some.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or out of range.
    """
    import yaml

    found: Any = {}
    if path is not None:
        try:
            found = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{str(path)!r} cannot be read as YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{str(path)!r} must hold settings such as 'port: 8000', got {type(found).__name__}")
    found |= {name: value for name, value in changes.items() if value is not None}
    where = {name: found.pop(name) for name in ListenAddress.model_fields if name in found}
    try:
        return Settings(**found), ListenAddress(**where)
    except (ValueError, TypeError) as error:  # TypeError: a name that is no text
        raise ConfigError(f"the service's settings: {describe(error)}") from error


def describe(error: Exception) -> str:
    """pydantic's errors as one sentence."""
    problems = getattr(error, "errors", lambda **_: [])(include_url=False, include_context=False)
    parts = [f"{'.'.join(map(str, p['loc'])) or 'all'}: {p['msg']}, got {p.get('input')!r}"[:300] for p in problems]
    return "; ".join(parts) or str(error)
