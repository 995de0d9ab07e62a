"""The Serve application: the endpoints, the process that speaks HTTP, and how both are deployed."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.endpoints import make_app
from serve.replica import Encoder
from serve.service import Api
from serve.settings import Settings


@serve.deployment
@serve.ingress()
class Ingress:
    """Speaks HTTP."""

    def __init__(self, settings: Settings, encoder: DeploymentHandle) -> None:
        self.api = Api(settings, encoder)

    def __serve_build_asgi_app__(self) -> FastAPI:  # called by Serve after the constructor
        return make_app(self.api)


def build(settings: Settings) -> serve.Application:
    """The Serve application: `serve deploy` and `serve run` call it with the YAML's `args`, `alit serve` does too."""
    ongoing = 2 * settings.queue  # requests; the replica itself counts their images
    surge = 0 if settings.gpus_per_replica else 100  # new ones before old ones go, where that takes no second GPU
    deployments: tuple[Any, Any] = Encoder, Ingress  # which Serve's decorators type as functions
    encoder = deployments[0].options(
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": settings.gpus_per_replica},
        max_ongoing_requests=ongoing,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.deadline_seconds,
        max_surge_percent=surge,
        **(
            {"num_replicas": settings.min_replicas}
            if settings.min_replicas == settings.max_replicas
            else {
                "autoscaling_config": {
                    "min_replicas": settings.min_replicas,
                    "max_replicas": settings.max_replicas,
                    "target_ongoing_requests": settings.target_requests,
                }
            }
        ),
    )
    ingress = deployments[1].options(
        num_replicas=settings.api_replicas,
        max_ongoing_requests=2 * ongoing,
        max_queued_requests=2 * ongoing,
        max_surge_percent=100,
        backpressure_config={"status_code": 503, "retry_after_s": settings.retry_after_seconds},
        graceful_shutdown_timeout_s=settings.deadline_seconds,
    )
    return ingress.bind(settings, encoder.bind(settings))
