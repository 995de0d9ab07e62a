"""Settings of the service: arguments of the Serve application, options of `alit serve`, and fields of its YAML file."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from alit.errors import ConfigError


class Settings(BaseModel):
    """Settings of the application: fields of the YAML file of `alit serve --config`, or of Serve's `args`.

    Attributes:
        models: Weights folders by name; null stands for the packaged weights. The first model is the default.
        keys_file: A file of API keys, one `name:key` per line. Without it and without ALIT_KEYS, no key is required.
        keyless: Accept requests from other machines without a key, because a gateway or the network protects the
            service.
        requests_per_minute: The rate limit of each key, in each API process.
        max_body_bytes: The maximum size of a request body.
        max_images: The maximum number of images in a request.
        max_image_bytes: The maximum size of an image file.
        max_pixels: The maximum number of pixels of an image.
        deadline_seconds: The time limit of a request. After it the service stops working on the request and responds
            with 503, or with 408 if the body has not been received.
        max_batch_tokens: The maximum cost of a batch. The cost of an image is the sum of all lengths that it may go
            through.
        batch_wait_seconds: How long a batch waits for further images if the queue was empty.
        queue: The maximum number of images queued in a replica; further requests get 503.
        retry_after_seconds: The Retry-After header of responses with 503.
        max_bytes_in_flight: The maximum size of all request bodies that an API process holds; further requests get 503.
        api_replicas: The number of API processes, which serve HTTP and decode image files.
        min_replicas: The minimum number of replicas, which hold the models.
        max_replicas: The maximum number of replicas.
        target_requests: The number of requests per replica above which replicas are added.
        gpus_per_replica: GPUs per replica.
        threads: CPU threads, and logical CPUs, per replica.
        models_per_replica: The number of models that a replica holds at a time; loading another evicts the least
            recently used one.
        precision: bfloat16 is meant for GPUs, and changes about 2 % of lengths and ids.
        openapi: Serve /openapi.json.
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
    """The address that `alit serve` listens on, and its files.

    Attributes:
        host: The host of the API and its playground.
        port: The port of the API and its playground.
        logs_dir: The folder of the service's log files, including the request log; null for Ray's own folder.
        metrics_port: The port of Ray's Prometheus endpoint, which listens on every interface; null for any free port.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    logs_dir: str | None = None
    metrics_port: int | None = Field(None, ge=1, le=65535)


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_settings(path: Path | None, changes: dict[str, Any]) -> tuple[Settings, ListenAddress]:
    """Reads the settings of a YAML file.

    Args:
        path: The file; None for the defaults.
        changes: Settings that override the file's; None stands for a setting that is not overridden.

    Raises:
        ConfigError: The file cannot be read, or a field is unknown or out of range.
    """
    import yaml

    fields: Any = {}
    if path is not None:
        try:
            fields = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{str(path)!r} cannot be read as YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"{str(path)!r} must hold settings such as 'port: 8000', got {type(fields).__name__}")
    fields |= {name: value for name, value in changes.items() if value is not None}
    address = {name: fields.pop(name) for name in ListenAddress.model_fields if name in fields}
    try:
        return Settings(**fields), ListenAddress(**address)
    except (ValueError, TypeError) as error:  # TypeError: a name that is not a string
        raise ConfigError(f"the service's settings: {_error_summary(error)}") from error


def _error_summary(error: Exception) -> str:
    """Returns pydantic's errors as one sentence."""
    faults = getattr(error, "errors", lambda **_: [])(include_url=False, include_context=False)
    parts = [f"{'.'.join(map(str, f['loc'])) or 'all'}: {f['msg']}, got {f.get('input')!r}"[:300] for f in faults]
    return "; ".join(parts) or str(error)
