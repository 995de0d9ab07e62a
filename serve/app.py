"""The Ray Serve application: the HTTP ingress, the replicas with the models, and how both are deployed."""

# no `from __future__ import annotations`: Serve reads the type of the builder's argument
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.endpoints import make_app
from serve.replica import Encoder
from serve.service import EncodingService
from serve.settings import Settings


@serve.deployment
@serve.ingress()
class Ingress:
    """The Ray Serve deployment that serves HTTP.

    Args:
        settings: The service's settings.
        encoder: The deployment with the models.
    """

    def __init__(self, settings: Settings, encoder: DeploymentHandle) -> None:
        self.service = EncodingService(settings, encoder)

    def __serve_build_asgi_app__(self) -> FastAPI:  # called by Serve after the constructor
        return make_app(self.service)


def build(settings: Settings) -> serve.Application:
    """Returns the Serve application; also the builder that `serve deploy` and `serve run` call with the YAML's `args`.

    Args:
        settings: The service's settings.
    """
    max_requests = 2 * settings.queue  # the replica itself counts images
    surge = 0 if settings.gpus_per_replica else 100  # start new replicas first, unless that takes another GPU
    deployments: tuple[Any, Any] = Encoder, Ingress  # which Serve's decorators type as functions
    encoder = deployments[0].options(
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": settings.gpus_per_replica},
        max_ongoing_requests=max_requests,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.deadline_seconds,
        max_surge_percent=surge,
        **_scaling(settings),
    )
    ingress = deployments[1].options(
        num_replicas=settings.api_replicas,
        max_ongoing_requests=2 * max_requests,
        max_queued_requests=2 * max_requests,
        max_surge_percent=100,
        backpressure_config={"status_code": 503, "retry_after_s": settings.retry_after_seconds},
        graceful_shutdown_timeout_s=settings.deadline_seconds,
    )
    return ingress.bind(settings, encoder.bind(settings))


def _scaling(settings: Settings) -> dict[str, Any]:
    """Returns the deployment options that set a fixed number of replicas, or autoscaling."""
    if settings.min_replicas == settings.max_replicas:
        return {"num_replicas": settings.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_requests,
        }
    }
